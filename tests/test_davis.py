"""DAVIS folders: what is written is read again, and what is odd is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pmvis_core import masks
from pmvis_core.errors import DataError, ResourceError, UsageError
from pmvis_core.formats.davis import (
    HIGHEST,
    VOID,
    object_number,
    palette,
    read_davis,
    read_davis_predictions,
    read_indices,
    write_davis,
)
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation
from pmvis_core.types import Category, VideoInfo

HEIGHT, WIDTH = 6, 9


def save(folder: Path, name: str, frames: np.ndarray, mode: str = "P") -> None:
    """Write (T, H, W) indices by PIL alone."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(frames):
        image = Image.fromarray(frame.astype(np.uint8))
        if mode == "P":
            image.putpalette([255, 0, 0] * 256)
        elif mode != "L":
            image = image.convert(mode)
        image.save(folder / name / f"{t:05d}.png")


def read_back(rows: list[Annotation], frames: int) -> np.ndarray:
    """Return annotations as (T, H, W) indices."""
    values = np.zeros((frames, HEIGHT, WIDTH), np.uint8)
    for row in rows:
        for frame, rle in zip(values, row.rles, strict=True):
            if rle is not None:
                frame[masks.decode(rle).astype(bool)] = object_number(row)
    return values


@given(
    seed=st.integers(0, 2**32 - 1),
    values=st.lists(st.integers(1, 255), min_size=1, max_size=6, unique=True),
    frames=st.integers(1, 4),
)
@settings(max_examples=30, deadline=None)
def test_round_trip(seed: int, values: list[int], frames: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.choice([0, *values], (2, frames, HEIGHT, WIDTH)).astype(np.uint8)
    drawn[:, 0, 0, 0] = 1  # not all void
    with TemporaryDirectory() as place:
        folder = Path(place)
        save(folder / "in", "b", drawn[0])
        save(folder / "in", "a", drawn[1])
        truth = read_davis(folder / "in")
        assert [(v.id, v.name, v.length) for v in truth.videos] == [
            (1, "a", frames),
            (2, "b", frames),
        ]
        assert [row.id for row in truth.annotations] == list(range(1, len(truth.annotations) + 1))
        assert all(row.iscrowd == (object_number(row) == VOID) for row in truth.annotations)
        numbers = write_davis(truth, folder / "out")
        assert all(n == number for of in numbers.values() for n, number in of.items())
        for n, name in enumerate("ba"):
            rows = [row for row in truth.annotations if row.video_id == 2 - n]
            np.testing.assert_array_equal(read_back(rows, frames), drawn[n])
            written = [read_indices(p) for p in sorted((folder / "out" / name).iterdir())]
            np.testing.assert_array_equal(np.array(written), drawn[n])


def test_predictions_follow_the_truth(tmp_path: Path) -> None:
    frames = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    frames[:, 0, :3], frames[1, 4] = 1, 7
    save(tmp_path / "truth", "cat", frames)
    save(tmp_path / "found", "cat", frames)
    save(tmp_path / "found", "dog", frames)  # not asked for
    (tmp_path / "found" / "notes.txt").write_text("x")
    found = read_davis_predictions(tmp_path / "found", read_davis(tmp_path / "truth"))
    assert [(row.id, object_number(row), row.score, row.video_id) for row in found] == [
        (1, 1, 1.0, 1),
        (2, 7, 1.0, 1),
    ]
    assert [rle is None for rle in found[1].rles] == [True, False, True]
    assert found[0].mask_areas == (3, 3, 3)
    video = VideoInfo(40, "cat", HEIGHT, WIDTH, 3)  # no file names: 00000, 00001, ...
    other = Dataset("truth", (Category(5, "thing"),), (video,), ())
    row = read_davis_predictions(tmp_path / "found", other)[0]
    assert (row.video_id, row.category_id) == (40, 5)


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_modes_that_hold_indices(mode: str, tmp_path: Path) -> None:
    frames = np.zeros((1, HEIGHT, WIDTH), np.uint8)
    frames[0, 2:4] = 255 if mode == "1" else 3
    save(tmp_path, "v", frames, mode)
    (row,) = read_davis(tmp_path).annotations
    assert (object_number(row), row.mask_areas) == (1 if mode == "1" else 3, (2 * WIDTH,))


def test_a_palette_never_changes_the_indices(tmp_path: Path) -> None:
    """All colours alike, where OpenCV would see one object at most."""
    frame = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    save(tmp_path, "v", frame[None])
    path = tmp_path / "v" / "00000.png"
    np.testing.assert_array_equal(read_indices(path), frame)
    seen = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert len(np.unique(seen.reshape(-1, seen.shape[-1]), axis=0)) == 1


def test_palette_is_that_of_pascal_voc() -> None:
    colours = np.frombuffer(palette(), np.uint8).reshape(256, 3).tolist()
    assert colours[:5] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colours[8] == [64, 0, 0]
    assert colours[255] == [224, 224, 192]
    assert len({tuple(colour) for colour in colours}) == 256


def test_davis_2016_is_binary(tmp_path: Path) -> None:
    frames = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    frames[:, 1] = 255
    save(tmp_path, "v", frames, "L")
    with pytest.raises(DataError, match="no value but 0 and 255") as caught:
        read_davis(tmp_path)
    assert "binary" in (caught.value.hint or "")
    (row,) = read_davis(tmp_path, binary=True).annotations
    assert (object_number(row), row.iscrowd) == (1, False)
    truth = read_davis(tmp_path, binary=True)
    with pytest.raises(DataError, match="holds the value 255"):
        read_davis_predictions(tmp_path, truth)
    assert len(read_davis_predictions(tmp_path, truth, binary=True)) == 1


def test_what_is_no_davis_folder_is_an_error(tmp_path: Path) -> None:
    frames = np.ones((2, HEIGHT, WIDTH), np.uint8)
    with pytest.raises(DataError, match="is no folder"):
        read_davis(tmp_path / "absent")
    with pytest.raises(DataError, match="no folder with PNGs"):
        read_davis(tmp_path)
    for mode in ("RGB", "RGBA", "LA"):
        save(tmp_path / mode, "v", frames, mode)
        with pytest.raises(DataError, match=f"mode {mode}, expected indices"):
            read_davis(tmp_path / mode)
    deep = tmp_path / "deep" / "v"
    deep.mkdir(parents=True)
    Image.fromarray(frames[0].astype(np.uint16)).save(deep / "0.png")
    with pytest.raises(DataError, match="mode I;16"):
        read_davis(deep.parent)
    save(tmp_path / "sizes", "v", frames)
    Image.fromarray(np.ones((3, 3), np.uint8)).save(tmp_path / "sizes" / "v" / "9.png")
    with pytest.raises(DataError, match=r"9.png` is 3x3, expected 6x9"):
        read_davis(tmp_path / "sizes")
    save(tmp_path / "broken", "v", frames)
    path = tmp_path / "broken" / "v" / "00001.png"
    whole = path.read_bytes()
    for data in (b"", b"GIF89a", whole[:40], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"00001.png` cannot be read as a PNG"):
            read_davis(tmp_path / "broken")


@given(data=st.binary(max_size=200), cut=st.integers(0, 900), at=st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_a_damaged_png_is_an_error_or_an_image(data: bytes, cut: int, at: int) -> None:
    with TemporaryDirectory() as place:
        save(Path(place), "v", np.ones((1, HEIGHT, WIDTH), np.uint8))
        path = Path(place) / "v" / "00000.png"
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + data + whole[at + cut :])
        try:
            assert read_indices(path).ndim == 2
        except DataError as error:
            assert "00000.png" in error.message


def test_results_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    frames = np.ones((3, HEIGHT, WIDTH), np.uint8)
    save(tmp_path / "truth", "v", frames)
    truth = read_davis(tmp_path / "truth")
    found = tmp_path / "found"
    found.mkdir()
    with pytest.raises(DataError, match="no folder `v`"):
        read_davis_predictions(found, truth)
    save(found, "v", frames)
    (found / "v" / "00000.png").unlink()
    with pytest.raises(DataError, match=r"00000.png` is missing, frame 0 of video `v`"):
        read_davis_predictions(found, truth)
    (row,) = read_davis_predictions(found, truth, ends=False)
    assert row.mask_areas == (None, HEIGHT * WIDTH, HEIGHT * WIDTH)
    (found / "v" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"00001.png` is missing"):
        read_davis_predictions(found, truth, ends=False)
    save(found, "v", frames[:, :3])
    with pytest.raises(DataError, match="is 3x9, expected 6x9"):
        read_davis_predictions(found, truth)
    outside = replace(truth, videos=(replace(truth.videos[0], name="../v"),))
    with pytest.raises(DataError, match=r"called `../v`"):
        read_davis_predictions(found, outside)


def box(number: int, columns: slice, score: float | None, **changes: object) -> Annotation:
    """Return a one-frame annotation of some columns."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[:, columns] = 1
    rle = masks.encode(pixels)
    row = Annotation(number, 1, 1, (rle,), (masks.area(rle),), score=score)
    return replace(row, **changes)


def source(*rows: Annotation, **changes: object) -> Dataset:
    """Return a dataset of one video of one frame."""
    video = replace(VideoInfo(1, "v", HEIGHT, WIDTH, 1), **changes)
    return Dataset("file", (Category(1, "object"),), (video,), rows)


def test_pixels_of_several_tracks_go_to_the_best(tmp_path: Path) -> None:
    rows = (
        box(3, slice(0, 4), 0.5),
        box(2, slice(3, 6), 0.9),
        box(9, slice(5, 8), 0.9),
        box(5, slice(0, 9), None, iscrowd=True),
    )
    assert write_davis(source(*rows), tmp_path / "out") == {1: {3: 3, 2: 2, 9: 9}}
    written = read_indices(tmp_path / "out" / "v" / "00000.png")
    assert written[0].tolist() == [3, 3, 3, 2, 2, 2, 9, 9, VOID]
    with Image.open(tmp_path / "out" / "v" / "00000.png") as image:
        assert image.mode == "P"
        assert bytes(image.getpalette() or ()) == palette()


def test_ids_that_no_png_holds_are_numbered_by_score(tmp_path: Path) -> None:
    rows = (box(1, slice(0, 3), 0.2), box(700, slice(3, 6), 0.8))
    assert write_davis(source(*rows), tmp_path / "out") == {1: {700: 1, 1: 2}}
    assert read_indices(tmp_path / "out" / "v" / "00000.png")[0, :6].tolist() == [2, 2, 2, 1, 1, 1]


def test_frames_keep_their_names(tmp_path: Path) -> None:
    write_davis(source(file_names=("x/000123.jpg",)), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out" / "v").iterdir()] == ["000123.png"]


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_davis(source(), full)
    assert (full / "x").read_text() == "mine"
    many = [box(n, slice(0, 1), 0.5) for n in range(1, HIGHEST + 2)]
    cases = [
        (source(*many), "has 255 tracks"),
        (source(name="../up"), "called `../up`"),
        (source(name="/up"), "called `/up`"),
        (replace(source(), videos=(*source().videos, replace(source().videos[0], id=2))), "two"),
    ]
    for dataset, text in cases:
        with pytest.raises(DataError, match=text):
            write_davis(dataset, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    write_davis(source(), tmp_path / "out")  # what a failure left is in nobody's way
    assert not (tmp_path / "out.part").exists()
    with pytest.raises(ResourceError, match="cannot write"):
        write_davis(source(), full / "x" / "out")
