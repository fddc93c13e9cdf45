"""`refine --method sam2`: masks carried by SAM 2 (Ravi et al., 2024), through `transformers`.

For people who hold those weights; the extra ``pmvis[sam2]`` installs the package. A `Propagator`
(see `flow`): each object has a session of its own, begun with its key mask, so objects do
not compete; a frame is encoded once for all of them. Sessions of the library keep every frame and
full-size mask for ever; here they keep what the model can still look back at.

    propagator = Sam2Propagator(load_sam2(Path("sam2.1-hiera-tiny")), torch.device("cpu"))
    sweep = propagator.open(frames, video).sweep()
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pmvis_core.errors import ResourceError, UsageError
from pmvis_core.propagation.deaot import MEAN, PRECISIONS, STD
from pmvis_core.propagation.flow import Prediction, SoftMask, Sweep
from pmvis_core.propagation.frame_cache import BoundedCache, Frames, ReadAhead
from pmvis_core.types import VideoInfo

Bytes = NDArray[np.uint8]
_LIBRARY = "transformers.models.sam2_video.modeling_sam2_video"
_OBJECT = 1
"""Name of the one object of a session."""


def load_sam2(folder: Path) -> Any:
    """Return the video model of SAM 2 in a folder of `transformers`; nothing is downloaded.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.

    Raises:
        ResourceError: the package or the files are missing, or do not fit.
    """
    try:
        model: Any = import_module("transformers").Sam2VideoModel
    except (ImportError, AttributeError) as error:
        raise ResourceError(
            "`--method sam2` needs the package transformers (4.56 or later), which is not here",
            "install it with `pip install 'pmvis[sam2]'`",
        ) from error
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ResourceError(
                f"`{folder}` holds no `{name}`",
                "give the folder of a SAM 2 video model as transformers saves it",
            )
    try:
        return model.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(f"`{folder}` is no SAM 2 video model ({error})") from error


class Sam2Propagator:
    """Carries masks with SAM 2."""

    name = "sam2"
    patience: int | None = None
    """An object may come back: the model says by itself when there is none."""

    def __init__(
        self, model: Any, device: torch.device, precision: str = "fp32", cached_bytes: int = 1 << 30
    ) -> None:
        """Take a ``Sam2VideoModel``.

        Args:
            model: with its weights; it is moved to ``device``.
            device: where it runs.
            precision: a key of `PRECISIONS`; the lower ones are for a GPU.
            cached_bytes: room for the features of frames that several passes share.

        Raises:
            UsageError: there is no such precision.
        """
        if precision not in PRECISIONS:
            raise UsageError(f"precision `{precision}`, expected one of: {', '.join(PRECISIONS)}")
        self.model = model.to(device).eval()
        self.device, self.dtype = device, PRECISIONS[precision]
        self.cached_bytes = cached_bytes

    def open(self, frames: Frames, video: VideoInfo) -> Sam2Video:
        """Prepare for one video."""
        return Sam2Video(self, frames, video)


class _SharedFeatures:
    """Features of frames, for all sessions of a video; the library's own cache serves one."""

    def __init__(self, limit_bytes: int) -> None:
        """Start empty."""
        self._cache: BoundedCache[dict[str, Any]] = BoundedCache(limit_bytes, _bytes)

    def cache_vision_features(self, frame_idx: int, features: dict[str, Any]) -> None:
        """Keep a frame's features."""
        self._cache.put(frame_idx, features)

    def get_vision_features(self, frame_idx: int) -> dict[str, Any] | None:
        """Return a frame's features, if they are still here."""
        return self._cache.find(frame_idx)


class Sam2Video:
    """One video, of which the passes share frames and features."""

    def __init__(self, owner: Sam2Propagator, frames: Frames, video: VideoInfo) -> None:
        """Read nothing yet."""
        self.owner, self.size = owner, (video.height, video.width)
        self.side = int(owner.model.config.image_size)
        self.features = _SharedFeatures(owner.cached_bytes)
        self._images = ReadAhead(frames, video.length, self._prepared)
        self._last: tuple[int, Tensor] | None = None

    def sweep(self) -> Sweep:
        """Return a new pass with an empty memory."""
        return Sam2Sweep(self)

    def pixels(self, t: int) -> Tensor:
        """Return frame ``t`` as the model takes it, (1, 3, side, side)."""
        if self._last is None or self._last[0] != t:
            self._last = t, self._images[t].to(self.owner.device)
        return self._last[1]

    def _prepared(self, frame: Bytes) -> Tensor:
        """Bend a frame to a square and normalise it."""
        image = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None]
        size = (self.side, self.side)
        image = F.interpolate(image.float() / 255, size=size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
        return (image - mean) / std


class Sam2Sweep:
    """One pass through a video in one direction."""

    def __init__(self, video: Sam2Video) -> None:
        """Start with nothing to carry."""
        self._video = video
        self._sessions: dict[int, Any] = {}
        self._t: int | None = None

    @torch.inference_mode()
    def add(self, number: int, mask: Bytes) -> None:
        """Start or restart object ``number`` from this frame's mask, (H, W), nonzero inside."""
        assert self._t is not None, "advance to a frame before adding an object"
        video = self._video
        session = import_module(_LIBRARY).Sam2VideoInferenceSession(
            video_height=video.size[0],
            video_width=video.size[1],
            inference_device=video.owner.device,
            inference_state_device=video.owner.device,
            video_storage_device=video.owner.device,
            dtype=torch.float32,
        )
        session.cache = video.features
        whole = torch.from_numpy((mask != 0).astype(np.float32))[None, None]
        size = (video.side, video.side)
        small = F.interpolate(whole, size=size, mode="bilinear", antialias=True)
        index = session.obj_id_to_idx(_OBJECT)
        session.add_mask_inputs(index, self._t, (small >= 0.5).float())
        session.obj_with_new_inputs = [_OBJECT]
        self._run(session, self._t, backwards=False)
        self._sessions[number] = session

    def drop(self, number: int) -> None:
        """Forget object ``number``."""
        self._sessions.pop(number, None)

    @torch.inference_mode()
    def advance(self, t: int) -> dict[int, Prediction]:
        """Go to frame ``t`` and predict every live object."""
        backwards = self._t is not None and t < self._t
        self._t = t
        return {
            number: SoftMask(self._run(session, t, backwards))
            for number, session in self._sessions.items()
        }

    def _run(self, session: Any, t: int, backwards: bool) -> NDArray[np.float32]:
        """Let the model look at a frame; return the object's probability (H, W)."""
        owner, video = self._video.owner, self._video
        lower = owner.dtype != torch.float32
        with torch.autocast(owner.device.type, owner.dtype, lower):
            seen = owner.model(session, frame_idx=t, frame=video.pixels(t), reverse=backwards)
        _forget(session, t, owner.model.config)
        logits = seen.pred_masks.float().view(1, 1, *seen.pred_masks.shape[-2:])
        full = F.interpolate(logits, size=video.size, mode="bilinear", align_corners=False)
        return np.asarray(full[0, 0].sigmoid().cpu().numpy(), np.float32)


def _forget(session: Any, t: int, config: Any) -> None:
    """Drop what the model will not look at again: pixels, full-size masks, frames long gone."""
    session.processed_frames = None
    reach = max(config.num_maskmem, config.max_object_pointers_in_encoder)
    for outputs in session.output_dict_per_obj.values():
        tracked = outputs["non_cond_frame_outputs"]
        for old in [frame for frame in tracked if abs(frame - t) >= reach]:
            del tracked[old]
        for kept in (*outputs["cond_frame_outputs"].values(), *tracked.values()):
            kept.pop("high_res_masks", None)


def _bytes(features: dict[str, Any]) -> int:
    """Return how much room features take."""
    tensors = [x for value in features.values() for x in value]
    return sum(x.numel() * x.element_size() for x in tensors)
