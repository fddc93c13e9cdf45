"""MOTS in both its forms: the same objects, and every fault by its name."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.formats.davis import object_number
from pmvis_core.formats.mots import read_lines, read_mots, read_mots_predictions
from pmvis_core.formats.ytvis import Dataset
from pmvis_core.formats.ytvis_annotation import Annotation

HEIGHT, WIDTH = 6, 9
VALUES = (1001, 1002, 2001, 2255, 10000)


def text_of(frames: np.ndarray, first: int = 0) -> str:
    """Return (T, H, W) values as MOTS text."""
    lines = [
        f"{t} {value} {value // 1000} {HEIGHT} {WIDTH} {masks.encode(frame == value)['counts']}"
        for t, frame in enumerate(frames, start=first)
        for value in np.unique(frame).tolist()
        if value
    ]
    return "".join(f"{line}\n" for line in lines)


def save(folder: Path, name: str, frames: np.ndarray) -> None:
    """Write (T, H, W) values as 16-bit PNGs."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame.astype(np.uint16)).save(folder / name / f"{t:06d}.png")


def drawn(seed: int, frames: int = 3) -> np.ndarray:
    """Draw (T, H, W) values; the last frame is not empty."""
    values = np.random.default_rng(seed).choice([0, *VALUES], (frames, HEIGHT, WIDTH))
    values[-1, 0, 0] = 1001
    return values.astype(np.uint16)


def read_back(rows: tuple[Annotation, ...], video_id: int, frames: int) -> np.ndarray:
    """Return annotations as (T, H, W) values."""
    values = np.zeros((frames, HEIGHT, WIDTH), np.uint16)
    for row in rows:
        if row.video_id == video_id:
            for frame, rle in zip(values, row.rles, strict=True):
                if rle is not None:
                    value = 10000 if row.iscrowd else object_number(row)
                    frame[masks.decode(rle).astype(bool)] = value
    return values


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 4), first=st.integers(0, 1))
@settings(max_examples=30, deadline=None)
def test_both_forms_give_the_same(seed: int, frames: int, first: int) -> None:
    videos = {"0002": drawn(seed, frames), "0011": drawn(seed + 1, frames)}
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "txt").mkdir()
        for name, values in videos.items():
            save(folder / "png", name, values)
            (folder / "txt" / f"{name}.txt").write_text(text_of(values, first))
        pictures = read_mots(folder / "png")
        texts = read_mots(folder / "txt", first_frame=first)
        for truth in (pictures, texts):
            assert [video.name for video in truth.videos] == list(videos)
            for number, values in enumerate(videos.values(), start=1):
                np.testing.assert_array_equal(read_back(truth.annotations, number, frames), values)
            assert len(list(truth)) == 2  # every track fits its video, ids are unique
        assert pictures.annotations == texts.annotations
        assert all(row.category_id == object_number(row) // 1000 for row in texts.annotations
                   if not row.iscrowd)  # fmt: skip
        for path, truth in ((folder / "png", pictures), (folder / "txt", texts)):
            found = read_mots_predictions(path, truth)
            objects = [row for row in truth.annotations if not row.iscrowd]
            assert [row.rles for row in found] == [row.rles for row in objects]
            assert [row.id for row in found] == list(range(1, len(found) + 1))
            assert {row.score for row in found} <= {1.0}


def test_what_is_ignored_is_a_crowd_of_each_category(tmp_path: Path) -> None:
    values = np.zeros((2, HEIGHT, WIDTH), np.uint16)
    values[0, :2], values[0, 3], values[1, 5] = 10000, 1001, 2001
    path = tmp_path / "0002.txt"
    path.write_text(text_of(values))
    truth = read_mots(path)
    assert [c.name for c in truth.categories] == ["car", "pedestrian"]
    crowds = [row for row in truth.annotations if row.iscrowd]
    assert [(row.category_id, row.mask_areas) for row in crowds] == [
        (1, (2 * WIDTH, None)),
        (2, (2 * WIDTH, None)),
    ]
    assert len({row.id for row in truth.annotations}) == len(truth.annotations) == 4


def test_regions_of_a_frame_to_ignore_are_joined(tmp_path: Path) -> None:
    parts = [text_of(np.full((1, HEIGHT, WIDTH), 10000) * (np.arange(WIDTH) == n)) for n in (1, 4)]
    path = tmp_path / "0002.txt"
    path.write_text("\n".join(parts))
    assert [row.mask_areas for row in read_mots(path).annotations] == [(2 * HEIGHT,)] * 2


def test_layout_and_lengths_of_mots_challenge(tmp_path: Path) -> None:
    values = drawn(3)
    place = tmp_path / "MOTS20-02" / "gt"
    place.mkdir(parents=True)
    (place / "gt.txt").write_text(text_of(values, first=1))
    assert [v.length for v in read_mots(tmp_path, first_frame=1).videos] == [3]
    truth = read_mots(tmp_path, first_frame=1, lengths={"MOTS20-02": 5})
    assert (truth.videos[0].name, truth.videos[0].length) == ("MOTS20-02", 5)
    results = tmp_path / "found"
    results.mkdir()
    (results / "MOTS20-02.txt").write_text("")
    assert read_mots_predictions(results, truth) == ()
    (results / "MOTS20-02.txt").write_text(text_of(values[:1], first=5))
    assert {row.rles[:4] for row in read_mots_predictions(results, truth)} == {(None,) * 4}
    for first, text in ((0, "frame 0"), (6, "frame 6")):
        (results / "MOTS20-02.txt").write_text(text_of(values[:1], first=first))
        with pytest.raises(DataError, match=f"{text}: the sequence has frames 000001 to 000005"):
            read_mots_predictions(results, truth)


GOOD = text_of(np.full((1, 2, 2), 1001)).strip().replace(f"{HEIGHT} {WIDTH}", "2 2")
RUNS = GOOD.split()[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no mask"),
        ("0 1001 1 2 2", "line 1 has 5 fields"),
        (f"{GOOD}\n{GOOD} 1", "line 2 has 7 fields"),
        (f"0 1001 3 2 2 {RUNS}", "class 3, expected 1"),
        (f"-1 1001 1 2 2 {RUNS}", "expected whole numbers"),
        (f"0 1001.0 1 2 2 {RUNS}", "expected whole numbers"),
        (f"0 1001 1 99999999999 2 {RUNS}", "expected whole numbers"),
        (f"0 1001 1 3 2 {RUNS}", "line 1: "),
        (f"{GOOD}\n{GOOD}", "frame 0: object 1001 occurs twice"),
        (f"{GOOD}\n0 1001 2 2 2 {RUNS}", "frame 0: object 1001 occurs twice"),
        (f"{GOOD}\n0 1002 1 2 2 {RUNS}", "frame 0: masks overlap"),
        (f"{GOOD}\n0 10000 10 2 2 {RUNS}", "frame 0: masks overlap"),
        (f"{GOOD}\n1 1001 1 1 4 {RUNS}", "frame 1: a mask is 1x4, expected 2x2"),
        ("\u00e9", "cannot be read as text"),
    ],
)
def test_faults_of_a_text(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "0002.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_mots(path)


@given(
    fields=st.lists(
        st.one_of(
            st.integers(-2, 11).map(str),
            st.sampled_from(["1001", "2", "10", RUNS, "\x1c", "\n", " ", "`", "1e3", "0x2"]),
            st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=8),
        ),
        max_size=14,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_or_refused(fields: list[str]) -> None:
    with TemporaryDirectory() as place:
        path = Path(place) / "0002.txt"
        path.write_text(" ".join(fields))
        try:
            for line in read_lines(path):
                assert masks.area(line.rle) >= 0
        except DataError as error:
            assert "0002.txt" in error.message


def test_faults_of_pictures(tmp_path: Path) -> None:
    for value in (1, 999, 3001, 9001, 10001, 65535):
        save(tmp_path / str(value), "0002", np.full((1, 2, 2), value))
        with pytest.raises(DataError, match=rf"000000.png` has value {value}, expected"):
            read_mots(tmp_path / str(value))
    save(tmp_path / "sizes", "0002", np.full((1, 2, 2), 1001))
    Image.fromarray(np.full((3, 2), 1001, np.uint16)).save(tmp_path / "sizes" / "0002" / "9.png")
    with pytest.raises(DataError, match=r"9.png` is 3x2, expected 2x2"):
        read_mots(tmp_path / "sizes")
    Image.fromarray(np.full((2, 2), 5, np.uint8)).save(tmp_path / "sizes" / "0002" / "9.png")
    with pytest.raises(DataError, match=r"9.png` is an image of mode L") as caught:
        read_mots(tmp_path / "sizes")
    assert "16-bit" in (caught.value.hint or "")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_mots(tmp_path / "absent")
    with pytest.raises(DataError, match="holds neither"):
        read_mots(tmp_path)
    save(tmp_path / "png", "0002", drawn(1))
    truth = read_mots(tmp_path / "png")
    assert isinstance(truth, Dataset)
    save(tmp_path / "found", "0003", drawn(1))
    with pytest.raises(DataError, match="no sequence `0002`"):
        read_mots_predictions(tmp_path / "found", truth)
    save(tmp_path / "short", "0002", drawn(1)[:2])
    with pytest.raises(DataError, match=r"000002.png` is missing"):
        read_mots_predictions(tmp_path / "short", truth)
