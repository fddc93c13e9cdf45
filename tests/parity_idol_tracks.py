"""What IDOL makes of the network's predictions, against reference outputs.

The part of `parity_idol` for ``B*`` (whole clips), ``G*`` (single images), ``T*`` (the tracker and
its memory, frame by frame) and ``V*`` (from stored predictions to the rows of a video). Everything
runs through `VideoInference`, with the network's answers overheard or replaced by the stored ones.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmvis_core import masks
from pmvis_core.association import UNTRACKED, Detections, OnlineTracker
from pmvis_core.checkpoint import Checkpoint
from pmvis_core.config import TrackerConfig
from pmvis_core.errors import DataError
from pmvis_core.infer import InferOptions, VideoInference, network_size, prepare_image
from pmvis_core.inference.images import segment_image
from pmvis_core.inference.segmenter import FrameSegmenter
from pmvis_core.models.idol import IDOL
from pmvis_core.types import Category, Track, VideoInfo
from pmvis_core.video.image_files import Frame
from pmvis_core.video.sources import FrameSource
from tests.golden_idol import Quantity, backbone_of, model_for, near, same, unpacked

MASK_NOISE = 2e-2
"""Logits nearer to 0 than this may fall on either side of it: ten times the noise at 480 pixels."""
PIXEL_NOISE = 5e-6
"""Share of a clip's mask pixels that may differ."""
STATE_TOLERANCE = 1e-5


class Clip(FrameSource):
    """Frames (T, H, W, 3) in memory, some of them broken."""

    def __init__(self, frames: NDArray[np.uint8], broken: Sequence[int] = ()) -> None:
        """Keep them."""
        names = tuple(f"{t:05d}.jpg" for t in range(len(frames)))
        super().__init__(VideoInfo(1, "clip", *frames.shape[1:3], len(frames), names))
        self.images = frames
        self.broken = broken

    def readings(self, which: range | None = None) -> Iterator[Frame | DataError]:
        """Yield the frames, or why they are broken."""
        for t in range(len(self.images)) if which is None else which:
            yield DataError(f"frame {t} is torn") if t in self.broken else self.images[t]

    def __getitem__(self, t: int) -> Frame:
        """Return one frame."""
        return self.images[t]

    def _measure(self) -> VideoInfo:
        """Nothing is left to measure."""
        raise AssertionError


@dataclass
class Stored:
    """Predictions that come from a file, of the one decoder layer that counts."""

    logits: Tensor
    boxes: Tensor
    embeddings: Tensor
    sizes: Tensor
    masks: Tensor
    """(B, Q, h, w)."""

    def mask_logits(self, layer: Tensor | int, batch: Tensor, query: Tensor) -> Tensor:
        """Return the stored logits of chosen queries."""
        return self.masks[batch, query]


@dataclass
class Overheard:
    """Predictions that write down which masks are asked for."""

    told: Any
    queries: list[Tensor]
    masks: list[Tensor]

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on."""
        return getattr(self.told, name)

    def mask_logits(self, layer: Tensor | int, batch: Tensor, query: Tensor) -> Tensor:
        """Pass on, and remember."""
        self.queries.append(query)
        self.masks.append(self.told.mask_logits(layer, batch, query))
        return self.masks[-1]


@dataclass
class Listener:
    """A segmenter and a tracker in one that pass on, and write down, what others answer."""

    segmenter: Any
    tracker: OnlineTracker
    predictions: list[Any] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    detections: list[Detections] = field(default_factory=list)
    answers: list[tuple[Tensor, list[int]]] = field(default_factory=list)

    def frames_at_once(self, size: tuple[int, int], most: int) -> int:
        """Take as many as the network would; stored predictions come one by one."""
        real = isinstance(self.segmenter, FrameSegmenter)
        return self.segmenter.frames_at_once(size, most) if real else 1

    def __call__(self, images: Sequence[Tensor]) -> Any:
        """Predict for a batch; what is written down is by frame."""
        told = self.segmenter(images)
        parts = [told.rows(i, i + 1) for i in range(len(images))] if len(images) > 1 else [told]
        self.predictions += parts
        return Overheard(told, self.queries, self.masks)

    def update(self, detections: Detections) -> tuple[Tensor, list[int]]:
        """Track one frame."""
        self.detections.append(detections)
        self.answers.append(self.tracker.update(detections))
        return self.answers[-1]


def labelled(
    clip: Clip,
    segmenter: Any,
    classes: int,
    config: TrackerConfig,
    single_label: bool = False,
) -> tuple[Listener, tuple[Track, ...]]:
    """Label a clip, and return what was overheard and the rows."""
    vocabulary = tuple(Category(i + 1, f"c{i + 1}") for i in range(classes))
    checkpoint = Checkpoint(cast(IDOL, None), vocabulary, config)
    listener = Listener(segmenter, OnlineTracker(config))
    options = InferOptions(single_label=single_label)
    with VideoInference(cast(FrameSegmenter, listener), checkpoint, clip, options) as run:
        run._tracker = cast(OnlineTracker, listener)
        for _ in run:
            pass
        return listener, run.tracks().tracks


def check_clip(name: str, stored: Any) -> Iterator[Quantity]:
    """Compare a whole clip: input, predictions, detections, ids, and the rows to the pixel."""
    short, long = sorted(stored["image_size"].tolist())
    config = TrackerConfig(short_side=short, long_side=max(long, TrackerConfig().long_side))
    frames = stored["frames"]
    size = network_size(frames.shape[1:3], config)
    yield same(f"{name} size", size, stored["image_size"])
    resized = np.stack([prepare_image(frame, size).numpy() for frame in frames])
    sums = [zlib.crc32(image.tobytes()) for image in resized]
    yield same(f"{name} input", sums, stored["resized_crc32"])
    classes = stored["pred_logits"].shape[-1]
    # Arranging the network for speed changes it for good.
    model = copy.deepcopy(model_for(backbone_of(name), classes))
    segmenter = FrameSegmenter(model, torch.device("cpu"))
    heard, tracks = labelled(Clip(frames), segmenter, classes, config)
    logits = torch.cat([p.logits[-1] for p in heard.predictions])
    boxes = torch.cat([p.boxes[-1] for p in heard.predictions])
    yield near(f"{name} logits", logits, stored["pred_logits"], 2.4e-3)
    yield near(f"{name} boxes", boxes, stored["pred_boxes"], 5e-5)
    for t in range(len(frames)):
        yield from _detections(f"{name} frame {t}", heard, t, f"f{t}_", stored)
    yield from _rows(name, tracks, stored, "out_", stored["track_masks_bits"], 2e-5)


def _detections(name: str, heard: Listener, t: int, head: str, stored: Any) -> Iterator[Quantity]:
    """Compare what the tracker was given in one frame, and what it answered."""
    queries, (rows, ids) = heard.queries[t], heard.answers[t]
    yield same(f"{name} queries", queries, stored[f"{head}det_queries"])
    yield same(f"{name} kept", queries[rows], stored[f"{head}kept_queries"])
    yield same(f"{name} ids", ids, np.maximum(stored[f"{head}ids"], UNTRACKED))
    if len(queries) != len(stored[f"{head}det_queries"]):
        return
    given, predictions = heard.detections[t], heard.predictions[t]
    labels = predictions.logits[-1, 0, queries].argmax(-1)
    yield same(f"{name} labels", labels, stored[f"{head}det_labels"])
    found = torch.cat([predictions.boxes[-1, 0, queries], given.scores[:, None]], 1)
    yield near(f"{name} boxes and scores", found, stored[f"{head}det_bboxes"], 1e-4)
    yield near(f"{name} embeddings", given.embeddings, stored[f"{head}det_embeds"], 5e-4)
    logits = heard.masks[t]
    some = stored[f"{head}det_mask_logits_sub"]
    yield near(f"{name} mask logits", logits[: len(some), ::2, ::2], some, MASK_NOISE)
    wanted = unpacked(stored[f"{head}det_mask_bits"], tuple(logits.shape[1:]))
    wrong = (logits > 0).numpy() != wanted
    firm = wrong & (logits.abs() > MASK_NOISE).numpy()
    detail = f"{int(wrong.sum())} of {wrong.size} pixels differ, {int(firm.sum())} of them firm"
    yield f"{name} masks", not firm.any(), detail


def _rows(
    name: str, tracks: Sequence[Track], stored: Any, head: str, bits: Any, tolerance: float
) -> Iterator[Quantity]:
    """Compare the rows of a video: classes, scores, presence and every pixel."""
    labels = [track.category_id - 1 for track in tracks]
    order = list(dict.fromkeys(track.instance for track in tracks))
    owner = "out_track" if head == "out_" else f"{head}track_of_output"
    present = stored["track_present" if head == "out_" else f"{head}present"].astype(bool)
    yield same(f"{name} classes", labels, stored[f"{head}labels"])
    yield near(f"{name} scores", [t.score for t in tracks], stored[f"{head}scores"], tolerance)
    yield same(f"{name} tracks", [order.index(t.instance) for t in tracks], stored[owner])
    found = np.array([[r is not None for r in t.rles] for t in tracks])
    yield same(f"{name} presence", found, present[stored[owner]])
    if found.shape != present[stored[owner]].shape:
        return
    flips = pixels = 0
    shape = tuple(stored["ori_size"].tolist())
    for track, row in zip(tracks, stored[owner].tolist(), strict=True):
        wanted = unpacked(bits[row], shape)
        for t in track.present:
            pixels += wanted[t].size
            flips += int((masks.decode(track.rles[t]) != wanted[t]).sum())
    yield f"{name} masks", flips <= PIXEL_NOISE * pixels, f"{flips} of {pixels} pixels differ"


def check_assembly(name: str, stored: Any) -> Iterator[Quantity]:
    """Compare what becomes of stored predictions, scored by mean, single class, and maximum."""
    frames, _, classes = stored["pred_logits"].shape
    height, width = stored["ori_size"].tolist()
    clip = Clip(np.zeros((frames, height, width, 3), np.uint8))
    cases = [("m0", "mean", False), ("m1", "mean", True), ("m2", "max", False)]
    for case, score_type, single in cases:
        if f"{case}_scores" not in stored:
            continue
        config = TrackerConfig(short_side=0, score_type=score_type)
        heard, tracks = labelled(clip, _replayed(stored), classes, config, single)
        label = f"{name} {case}"
        yield from _rows(label, tracks, stored, f"{case}_", stored[f"{case}_masks_bits"], 1e-5)
        wrong = []
        for t, (rows, ids) in enumerate(heard.answers):
            queries = heard.queries[t][rows].tolist()
            pairs = [(q, i) for q, i in zip(queries, ids, strict=True) if i != UNTRACKED]
            wanted = zip(stored[f"f{t:02d}_queries"], stored[f"f{t:02d}_ids"], strict=True)
            if pairs != [(q, i) for q, i in wanted if i >= 0]:
                wrong.append(t)
        yield f"{label} answers of the tracker", not wrong, f"frames that differ: {wrong}"


def _replayed(stored: Any) -> Any:
    """Return a segmenter that answers with the stored predictions, frame after frame."""
    names = ("pred_logits", "pred_boxes", "pred_inst_embed", "pred_masks")
    logits, boxes, embeddings, all_masks = (torch.from_numpy(stored[n]) for n in names)
    size = torch.from_numpy(stored["image_size"])[None]
    answers = (
        Stored(logit[None, None], box[None, None], embedding[None], size, mask[None, :, 0])
        for logit, box, embedding, mask in zip(logits, boxes, embeddings, all_masks, strict=True)
    )
    return lambda images: next(answers)


def check_images(name: str, stored: Any) -> Iterator[Quantity]:
    """Compare the instances of single images, made of stored predictions."""
    names = ("pred_logits", "pred_boxes", "pred_masks")
    logits, boxes, all_masks = (torch.from_numpy(stored[n]) for n in names)
    sizes = torch.from_numpy(stored["image_sizes"])
    predictions = Stored(logits[None], boxes[None], logits, sizes, all_masks)
    for row, size in enumerate(stored["out_sizes"].tolist()):
        height, width = sizes[row].tolist()
        found = segment_image(predictions, row, (height, width), (size[0], size[1]))
        label, head = f"{name} image {row}", f"i{row}_"
        yield near(f"{label} scores", found.scores, stored[f"{head}scores"], 1e-6)
        yield same(f"{label} classes", found.labels, stored[f"{head}classes"])
        yield near(f"{label} boxes", found.boxes, stored[f"{head}boxes_xyxy"], 1e-4)
        wanted = unpacked(stored[f"{head}masks_bits"], tuple(size))
        yield same(f"{label} masks", found.masks, wanted)


def check_tracker(name: str, stored: Any) -> Iterator[Quantity]:
    """Compare ids and all that the tracker remembers, frame by frame."""
    options = dict(zip(stored["opt_names"].tolist(), stored["opt_values"].tolist(), strict=True))
    config = tracker_config(options)
    tracker = OnlineTracker(config)
    wrong: dict[str, list[int]] = {"kept rows": [], "ids": []}
    worst: dict[str, float] = {"momentum embeddings": 0.0, "matched embeddings": 0.0}
    frames = sum(key.endswith("_in_bboxes") for key in stored.files)
    for t in range(frames):
        head = f"f{t:02d}_"
        rows, ids = tracker.update(
            Detections(
                torch.from_numpy(stored[f"{head}in_bboxes"][:, 4]),
                torch.from_numpy(stored[f"{head}in_embeds"]),
                torch.from_numpy(stored[f"{head}in_masks"][:, 0]) > 0,
            )
        )
        known = tracker.tracklets
        facts = {
            "kept rows": (rows.tolist(), stored[f"{head}out_kept"]),
            "ids": (ids, np.maximum(stored[f"{head}out_ids"], UNTRACKED)),
            "remembered ids": ([k.id for k in known], stored[f"{head}state_ids"]),
        }
        if known and f"{head}state_embed" in stored:
            facts["frames seen"] = ([k.seen_frames for k in known], stored[f"{head}state_exist"])
            facts["last frames"] = ([k.last_frame for k in known], stored[f"{head}state_last"])
            lengths = [len(k.embeddings) for k in known]
            facts["memory lengths"] = (lengths, stored[f"{head}state_memlen"])
            same_ids = np.array_equal(*facts["remembered ids"])
            pairs = {
                "momentum embeddings": ([k.momentum_embedding for k in known], "state_embed"),
                "matched embeddings": ([k.memory(config) for k in known], "state_memo_embeds"),
            }
            for what, (embeddings, key) in pairs.items():
                found = torch.stack(embeddings).numpy()
                off = np.abs(found - stored[head + key]).max() if same_ids else np.inf
                worst[what] = max(worst[what], float(off))
        for what, (ours, theirs) in facts.items():
            if not np.array_equal(ours, theirs):
                wrong.setdefault(what, []).append(t)
            wrong.setdefault(what, [])
    for what, places in wrong.items():
        yield f"{name} {what}", not places, f"{frames} frames; differ in {places}"
    for what, off in worst.items():
        yield f"{name} {what}", off <= STATE_TOLERANCE, f"off by {off:.1e} at most"


def tracker_config(options: dict[str, float]) -> TrackerConfig:
    """Return the tracker that the published constructor's arguments describe."""
    config = TrackerConfig(
        mask_nms=options["nms_thr_pre"],
        init_score=options["init_score_thr"],
        new_score=options["addnew_score_thr"],
        memory_frames=int(options["memory_len"]),
        max_gap_frames=int(options["memo_tracklet_frames"]),
        momentum=options["memo_momentum"],
    )
    return replace(
        config,
        long_match=bool(options["long_match"]),
        frame_weight=bool(options["frame_weight"]),
        temporal_weight=bool(options["temporal_weight"]),
    )
