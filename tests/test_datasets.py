"""Stills and pseudo-labelled videos as key/reference pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from pmvis_core import masks
from pmvis_core.data.augment import IDOL_STILLS, IDOL_VIDEOS, SMALL_FRAMES, AugmentConfig
from pmvis_core.data.datasets import (
    CocoImages,
    Mixture,
    PseudoVideos,
    annotation_ledger,
    batches,
    image_mixture,
)
from pmvis_core.data.samples import Frame, KeyReferencePair, Targets
from pmvis_core.errors import DataError
from pmvis_core.tracks_io import TracksHeader, TracksWriter
from pmvis_core.types import RLE, Category, Supervision, Track, VideoInfo, VideoTracks

AS_IS = AugmentConfig(flip_probability=0, min_sizes=(), crop_probability=0)
FLIPPED = replace(AS_IS, flip_probability=1)
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
HEIGHT, WIDTH = 40, 60


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), pixels)


def rectangle(x1: int, y1: int, x2: int, y2: int) -> RLE:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y1:y2, x1:x2] = 1
    return masks.encode(mask)


def still_annotations() -> list[dict[str, Any]]:
    polygon = [[10.0, 10, 30, 10, 30, 25, 10, 25]]
    rle = rectangle(40, 5, 55, 35)
    runs = [0, HEIGHT * WIDTH]
    whole = {"size": [HEIGHT, WIDTH], "counts": runs}
    return [
        {"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 15], "segmentation": polygon},
        {"image_id": 1, "category_id": 7, "bbox": [40, 5, 15, 30], "segmentation": dict(rle)},
        {"image_id": 1, "category_id": 7, "bbox": [0, 0, 60, 40], "segmentation": whole},
        {"image_id": 1, "category_id": 3, "bbox": [1, 1, 9, 9], "iscrowd": 1, "segmentation": rle},
        {"image_id": 2, "category_id": 7, "bbox": [5, 6, 20, 22]},
        {"image_id": 2, "category_id": 3, "bbox": [1.5, 2.5, 8, 9], "segmentation": []},
        {"image_id": 3, "category_id": 3, "bbox": [1, 1, 9, 9], "iscrowd": 1, "segmentation": rle},
    ]


def write_stills(folder: Path, annotations: Sequence[dict[str, Any]] | None = None) -> Path:
    images = []
    for number, source in ((1, "coco"), (2, "imagenet"), (3, "coco")):
        write_image(folder / f"images/{number}.png", number)
        size = {"height": HEIGHT, "width": WIDTH}
        images.append({"id": number, "file_name": f"images/{number}.png", "source": source, **size})
    rows = still_annotations() if annotations is None else annotations
    data = {
        "categories": CATEGORIES,
        "images": images,
        "annotations": [{"id": i, **row} for i, row in enumerate(rows, 1)],
    }
    path = folder / "train_image.json"
    path.write_text(json.dumps(data))
    return path


def info(number: int, length: int) -> VideoInfo:
    names = tuple(f"v{number}/{t}.png" for t in range(length))
    return VideoInfo(number, f"v{number}", HEIGHT, WIDTH, length, names)


def track(number: int, rles: Sequence[RLE | None], **fields: Any) -> Track:
    values: dict[str, Any] = {"category_id": 3, "score": 0.5} | fields
    scores = tuple(None if rle is None else values["score"] for rle in rles)
    return Track(id=number, frame_scores=scores, rles=tuple(rles), **values)


def write_videos(folder: Path, videos: Sequence[VideoTracks]) -> Path:
    path = folder / "pseudo.tracks.jsonl"
    header = TracksHeader((Category(3, "cat"), Category(7, "dog")))
    with TracksWriter(path, header) as out:
        for video in videos:
            for t, name in enumerate(video.video.file_names):
                write_image(folder / name, 100 * video.video.id + t)
            out.write(video)
    return path


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pixel_boxes(frame: Frame) -> np.ndarray:
    height, width = frame.image.shape[1:]
    box = frame.targets.boxes.double().numpy() * [width, height, width, height]
    return np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1)


def assert_equal_pairs(a: KeyReferencePair, b: KeyReferencePair) -> None:
    for one, other in ((a.key, b.key), (a.reference, b.reference)):
        assert torch.equal(one.image, other.image)
        for name in ("labels", "boxes", "masks", "valid", "ignored"):
            assert torch.equal(getattr(one.targets, name), getattr(other.targets, name))
        assert one.targets.supervision == other.targets.supervision


def assert_well_formed(frame: Frame) -> None:
    found: Targets = frame.targets
    n = len(found)
    assert frame.image.dtype == torch.float32 and frame.image.is_contiguous()
    assert 0 <= frame.image.min() and frame.image.max() <= 255
    assert found.labels.shape == (n,) and found.labels.dtype == torch.int64
    assert found.boxes.shape == (n, 4) and found.boxes.dtype == torch.float32
    assert found.masks.shape == (n, *frame.image.shape[1:]) and found.masks.dtype == torch.bool
    assert found.valid.shape == (n,) and found.valid.dtype == torch.bool
    assert found.ignored.shape[1:] == (4,) and found.ignored.dtype == torch.float32
    assert (pixel_boxes(frame) > -1e-3).all()


def test_stills_state_their_supervision(tmp_path: Path) -> None:
    images = CocoImages(write_stills(tmp_path), None, AS_IS)
    assert [category.id for category in images.categories] == [3, 7]
    assert len(images) == 2  # the third image holds a crowd only
    pair = images.sample(0, rng())
    found = pair.key.targets
    assert found.labels.tolist() == [0, 1, 1]
    assert found.supervision == (Supervision.MASK,) * 3
    assert found.masks.sum((1, 2)).tolist() == [20 * 15, 15 * 30, HEIGHT * WIDTH]
    np.testing.assert_allclose(pixel_boxes(pair.key)[1], [40, 5, 55, 35], atol=1e-4)
    boxed = images.sample(1, rng()).key.targets
    assert boxed.supervision == (Supervision.BOX,) * 2
    assert not boxed.masks.any()
    assert boxed.valid.all()


def test_pixels_are_rgb_and_unchanged_without_augmentation(tmp_path: Path) -> None:
    images = CocoImages(write_stills(tmp_path), None, AS_IS)
    expected = cv2.cvtColor(cv2.imread(str(tmp_path / "images/1.png")), cv2.COLOR_BGR2RGB)
    seen = images.sample(0, rng()).key.image.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(seen, expected)


def test_flipped_targets_lie_where_the_pixels_go(tmp_path: Path) -> None:
    json_path = write_stills(tmp_path)
    plain = CocoImages(json_path, None, AS_IS).sample(0, rng()).key
    mirrored = CocoImages(json_path, None, FLIPPED).sample(0, rng()).key
    assert torch.equal(mirrored.image.flip(2), plain.image)
    rle_row = 1
    assert torch.equal(mirrored.targets.masks.flip(2)[rle_row], plain.targets.masks[rle_row])
    np.testing.assert_allclose(pixel_boxes(mirrored)[0], [30, 10, 50, 25], atol=1e-4)


@pytest.mark.parametrize("config", [IDOL_STILLS, SMALL_FRAMES])
def test_key_and_reference_of_a_still_differ_but_share_rows(
    tmp_path: Path, config: AugmentConfig
) -> None:
    images = CocoImages(write_stills(tmp_path), None, config)
    for seed in range(6):
        pair = images.sample(0, rng(seed))
        for frame in (pair.key, pair.reference):
            assert_well_formed(frame)
            assert frame.original_height == HEIGHT
        assert torch.equal(pair.key.targets.labels, pair.reference.targets.labels)
        assert pair.key.targets.valid.all()
        assert not torch.equal(pair.key.image, pair.reference.image)
        assert_equal_pairs(pair, images.sample(0, rng(seed)))


def test_rows_outside_the_key_are_dropped_from_both(tmp_path: Path) -> None:
    """The left object leaves the frame under some shifts; rows always follow the key."""
    rows = [
        {"image_id": 1, "category_id": 3, "bbox": [0, 10, 3, 10], "segmentation": None},
        {"image_id": 1, "category_id": 7, "bbox": [25, 15, 10, 10], "segmentation": None},
    ]
    config = replace(AS_IS, shift=0.3)
    images = CocoImages(write_stills(tmp_path, rows), None, config)
    kinds = set()
    for seed in range(40):
        pair = images.sample(0, rng(seed))
        key, reference = pair.key.targets, pair.reference.targets
        assert key.valid.all() and len(key) == len(reference)
        assert 1 in key.labels.tolist()
        empty = ~reference.valid
        assert (reference.boxes[empty][:, 2:].amin(1) == 0).all()
        kinds.add((len(key), bool(empty.any()), len(reference.ignored)))
    # Seen in both; in the key only; in neither; in the reference only (ignored there).
    assert kinds == {(2, False, 0), (2, True, 0), (1, False, 0), (1, False, 1)}


def test_the_cache_changes_nothing(tmp_path: Path) -> None:
    json_path = write_stills(tmp_path)
    plain = CocoImages(json_path, None, SMALL_FRAMES)
    cached = CocoImages(json_path, None, SMALL_FRAMES, cache_bytes=1 << 20)
    small = CocoImages(json_path, None, SMALL_FRAMES, cache_bytes=100)
    for seed in range(3):
        pair = plain.sample(0, rng(seed))
        assert_equal_pairs(pair, cached.sample(0, rng(seed)))
        assert_equal_pairs(pair, small.sample(0, rng(seed)))
    (tmp_path / "images/1.png").unlink()
    assert_equal_pairs(plain_pair := cached.sample(0, rng(5)), plain_pair)
    with pytest.raises(DataError, match="does not exist"):
        small.sample(0, rng())


def test_image_faults_are_named(tmp_path: Path) -> None:
    json_path = write_stills(tmp_path)
    images = CocoImages(json_path, None, AS_IS)
    file = tmp_path / "images/1.png"
    write_image(file, size=(HEIGHT, WIDTH + 1))
    with pytest.raises(DataError, match=r"1\.png` is 61x40 pixels, the annotations say 60x40"):
        images.sample(0, rng())
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"1\.png` is truncated"):
        images.sample(0, rng())
    file.unlink()
    with pytest.raises(DataError, match=r"1 of 2 training images are missing, first `.*1\.png`"):
        CocoImages(json_path, None, AS_IS)


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    json_path = write_stills(tmp_path)
    moved = json_path.rename(tmp_path.parent / f"{tmp_path.name}.json")
    assert len(CocoImages(moved, tmp_path, AS_IS)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 4}, "category id 4"),
        ({"segmentation": {"size": [4, 4], "counts": "0"}}, "size is .4, 4."),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5]}}, "runs cover 5"),
        ({"segmentation": [[1, 2, 3, 4, 5, "x"]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "malformed polygon"),
        ({"segmentation": [[1.0, 2, 3, 4]]}, "no annotation to train on"),
        ({"iscrowd": 1}, "no annotation to train on"),
    ],
)
def test_annotation_faults_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5], **change}
    with pytest.raises(DataError, match=message):
        CocoImages(write_stills(tmp_path, [row]), None, AS_IS)


def test_mixture_of_masked_and_boxed_stills(tmp_path: Path) -> None:
    images = CocoImages(write_stills(tmp_path), None, AS_IS)
    masked, box_only = images.split()
    assert (len(masked), len(box_only)) == (1, 1)
    mixture = image_mixture(images)
    np.testing.assert_allclose(mixture.probabilities, [4 / 7, 3 / 7])
    assert len(image_mixture(masked).sources) == 1
    drawn = [next(stream)[0] for stream in [batches(mixture, 1, 0)] for _ in range(300)]
    share = np.mean([pair.key.targets.supervision[0] is Supervision.BOX for pair in drawn])
    assert abs(share - 3 / 7) < 0.1


def test_ledger_counts_what_people_drew(tmp_path: Path) -> None:
    images = CocoImages(write_stills(tmp_path), None, AS_IS)
    two = track(1, [rectangle(1, 1, 9, 9)] * 2)
    videos = PseudoVideos(
        write_videos(tmp_path, [VideoTracks(info(1, 2), (two,))]), tmp_path, AS_IS
    )
    ledger = annotation_ledger(Mixture([image_mixture(images), videos], [1, 1]))
    assert ledger == {
        "sources": {
            "coco": {"images": 1, "mask": 3},
            "imagenet": {"box": 2, "images": 1},
            "videos": {"ignored": 0, "pseudo": 1, "videos": 1},
        },
        "human": {"masks": 3, "boxes": 2, "points": 0, "video_labels": 0},
        "pseudo": 1,
    }


def test_the_earlier_frame_is_the_key(tmp_path: Path) -> None:
    rles = [rectangle(2 * t, t, 2 * t + 10, t + 8) for t in range(15)]
    path = write_videos(tmp_path, [VideoTracks(info(1, 15), (track(1, rles),))])
    videos = PseudoVideos(path, tmp_path, AS_IS, max_gap=3)
    gaps = set()
    for seed in range(60):
        pair = videos.sample(0, rng(seed))
        first, second = (float(pixel_boxes(f)[0, 1]) for f in (pair.key, pair.reference))
        gaps.add(round(second - first))
    assert gaps == {1, 2, 3}


def test_boxes_of_videos_are_those_of_the_seen_masks(tmp_path: Path) -> None:
    rles = [rectangle(10, 5, 50, 30)] * 3
    path = write_videos(tmp_path, [VideoTracks(info(1, 3), (track(1, rles),))])
    for config in (IDOL_VIDEOS, SMALL_FRAMES):
        videos = PseudoVideos(path, tmp_path, config)
        for seed in range(6):
            pair = videos.sample(0, rng(seed))
            for frame in (pair.key, pair.reference):
                assert_well_formed(frame)
                rows, columns = (frame.targets.masks[0].any(axis) for axis in (1, 0))
                expected = [
                    columns.nonzero()[0, 0], rows.nonzero()[0, 0],
                    columns.nonzero()[-1, 0] + 1, rows.nonzero()[-1, 0] + 1,
                ]  # fmt: skip
                np.testing.assert_allclose(pixel_boxes(frame)[0], expected, atol=1e-3)
            assert_equal_pairs(pair, videos.sample(0, rng(seed)))


def test_a_video_of_one_frame_gives_it_twice(tmp_path: Path) -> None:
    path = write_videos(
        tmp_path, [VideoTracks(info(1, 1), (track(1, [rectangle(10, 5, 50, 30)]),))]
    )
    pair = PseudoVideos(path, None, SMALL_FRAMES).sample(0, rng())
    assert pair.reference.targets.valid.all()
    assert not torch.equal(pair.key.image, pair.reference.image)


def test_instances_of_one_frame_only(tmp_path: Path) -> None:
    """The row seen in the key alone stays; the one seen in the reference alone is ignored there."""
    here, there = rectangle(1, 1, 11, 11), rectangle(40, 20, 60, 40)
    tracks = (track(1, [here, None]), track(2, [None, there], category_id=7))
    path = write_videos(tmp_path, [VideoTracks(info(1, 2), tracks)])
    pair = PseudoVideos(path, tmp_path, AS_IS).sample(0, rng())
    assert pair.key.targets.labels.tolist() == [0]
    assert pair.reference.targets.valid.tolist() == [False]
    assert not pair.reference.targets.masks.any()
    expected = torch.tensor([[50 / 60, 30 / 40, 20 / 60, 20 / 40]])
    assert torch.allclose(pair.reference.targets.ignored, expected)
    assert len(pair.key.targets.ignored) == 0


def test_unseen_rows_stay_where_they_are_asked_for(tmp_path: Path) -> None:
    here, there = rectangle(1, 1, 11, 11), rectangle(40, 20, 60, 40)
    tracks = (track(1, [None, there]), track(2, [here, None], category_id=7))
    path = write_videos(tmp_path, [VideoTracks(info(1, 2), tracks)])
    pair = PseudoVideos(path, tmp_path, AS_IS, keep_unseen=True).sample(0, rng())
    assert pair.key.targets.valid.tolist() == [False, True]
    assert pair.reference.targets.valid.tolist() == [True, False]
    assert pair.key.targets.labels.tolist() == pair.reference.targets.labels.tolist() == [0, 1]


def test_set_aside_tracks_become_ignored_regions(tmp_path: Path) -> None:
    box, other = rectangle(0, 0, 30, 20), rectangle(30, 20, 60, 40)
    video = VideoTracks(
        info(1, 2),
        (track(1, [box, box], instance=1),),
        (
            track(2, [box, box], instance=1, category_id=7, score=0.2),  # a kept object's
            track(3, [other, None], instance=2),
            track(4, [other, None], instance=2, category_id=7, score=0.1),
        ),
    )
    videos = PseudoVideos(write_videos(tmp_path, [video]), tmp_path, FLIPPED)
    pair = videos.sample(0, rng())
    assert torch.allclose(pair.key.targets.ignored, torch.tensor([[0.25, 0.75, 0.5, 0.5]]))
    assert len(pair.reference.targets.ignored) == 0
    assert len(pair.key.targets) == 1


def test_dropped_tracks_become_background_where_that_is_asked_for(tmp_path: Path) -> None:
    box, other = rectangle(0, 0, 20, 15), rectangle(30, 20, 60, 40)
    crowd = rectangle(40, 0, 60, 15)
    video = VideoTracks(
        info(1, 2),
        (track(1, [box, box]),),
        (track(2, [other, other], lineage={"filter": "topk"}), track(3, [crowd, crowd])),
    )
    path = write_videos(tmp_path, [video])
    for dropped, regions in ((None, 2), ("ignore", 2), ("background", 1)):
        videos = PseudoVideos(path, tmp_path, AS_IS, dropped=dropped)
        assert len(videos.sample(0, rng()).key.targets.ignored) == regions
        assert videos.ledger()["videos"]["ignored"] == regions


@pytest.mark.parametrize(
    ("lineage", "stage"),
    [
        ({"stage": "filter", "topk": 1}, "filter"),
        ({"stage": "refine", "keep": {"topk": 1}}, "refine"),
        ({"stage": "filter", "topk": 1, "keep_ignored": True}, ""),
        ({"stage": "infer"}, ""),
    ],
)
def test_dropped_tracks_that_the_file_has_not_cannot_be_ignored(
    tmp_path: Path, lineage: dict[str, Any], stage: str
) -> None:
    box = rectangle(0, 0, 20, 15)
    path = write_videos(tmp_path, [VideoTracks(info(1, 2), (track(1, [box, box]),))])
    header, *rest = path.read_text().splitlines(keepends=True)
    changed = json.loads(header) | {"lineage": [lineage]}
    path.write_text(json.dumps(changed) + "\n" + "".join(rest))
    if stage:
        with pytest.raises(DataError, match=f"without the tracks that `{stage}` dropped"):
            PseudoVideos(path, tmp_path, AS_IS, dropped="ignore")
    else:
        PseudoVideos(path, tmp_path, AS_IS, dropped="ignore")
    PseudoVideos(path, tmp_path, AS_IS)


def test_set_aside_duplicates_are_no_ignored_regions(tmp_path: Path) -> None:
    box, near = rectangle(0, 0, 30, 20), rectangle(2, 0, 30, 18)
    video = VideoTracks(info(1, 2), (track(1, [box, None]),), (track(2, [near, near]),))
    pair = PseudoVideos(write_videos(tmp_path, [video]), tmp_path, AS_IS).sample(0, rng())
    assert len(pair.key.targets.ignored) == 0
    # Where the kept track is absent the other one may be right.
    assert len(pair.reference.targets.ignored) == 1


def test_the_best_row_of_an_instance_counts(tmp_path: Path) -> None:
    rles = [rectangle(1, 1, 20, 20)] * 2
    tracks = (
        track(1, rles, instance=5, score=0.4),
        track(2, rles, instance=5, score=0.6, category_id=7),
        track(3, rles, score=0.1),
    )
    videos = PseudoVideos(
        write_videos(tmp_path, [VideoTracks(info(1, 2), tracks)]), tmp_path, AS_IS
    )
    pair = videos.sample(0, rng())
    assert pair.key.targets.labels.tolist() == [1, 0]
    assert pair.key.targets.supervision == (Supervision.PSEUDO,) * 2


def test_videos_without_tracks_are_left_out(tmp_path: Path) -> None:
    full = VideoTracks(info(1, 2), (track(1, [rectangle(1, 1, 9, 9), None]),))
    absent = VideoTracks(info(2, 2), (track(1, [None, None]),))
    bare = VideoTracks(info(3, 2), ())
    videos = PseudoVideos(write_videos(tmp_path, [full, absent, bare]), tmp_path, AS_IS)
    assert (len(videos), videos.left_out) == (1, 2)
    with pytest.raises(DataError, match="no track in its 2 videos"):
        PseudoVideos(write_videos(tmp_path, [absent, bare]), tmp_path, AS_IS)


def test_video_faults_are_named(tmp_path: Path) -> None:
    path = write_videos(
        tmp_path, [VideoTracks(info(1, 2), (track(1, [rectangle(1, 1, 9, 9)] * 2),))]
    )
    videos = PseudoVideos(path, None, AS_IS)
    write_image(tmp_path / "v1/1.png", size=(HEIGHT, WIDTH + 2))
    with pytest.raises(DataError, match=r"video 1 `v1`, frame 1.* 62x40"):
        videos.sample(0, rng())
    with pytest.raises(DataError, match="not found"):
        PseudoVideos(path, tmp_path / "else/where", AS_IS)


def test_real_stills_and_videos(shared: Path) -> None:
    real = shared / "real"
    images = CocoImages(real / "images/instances_train.json", real / "images/train", IDOL_STILLS)
    videos = PseudoVideos(real / "videos/annotations.json", None, IDOL_VIDEOS)
    for source in (images, videos):
        for index in (0, 5):
            pair = source.sample(index, rng(index))
            assert_well_formed(pair.key)
            assert_well_formed(pair.reference)
            assert len(pair.key.targets) == len(pair.reference.targets)
