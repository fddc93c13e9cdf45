"""Pictures: colours that stay, labels that do not cover each other, sheets that hold everything."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pmvis_core import masks
from pmvis_core.errors import UsageError
from pmvis_core.report.drawing import (
    ACCENT,
    GREY,
    Tag,
    blank,
    enlarge_mask,
    fitted,
    place_tags,
    text_width,
    track_colour,
)
from pmvis_core.report.page import (
    PICTURE_SUFFIXES,
    ResultTable,
    SheetGroup,
    Strip,
    best_rows,
    contact_sheet,
    demo_picture,
    draw_table,
    found_strip,
    keyframe,
    overlay,
    overlay_video,
    spread_frames,
    truth_strip,
    write_picture,
)
from pmvis_core.types import Supervision, Track, VideoInfo, VideoTracks
from pmvis_core.video.frames import open_videos

NAMES = {1: "disc", 2: "square"}
HEIGHT, WIDTH, LENGTH = 48, 64, 5


def _mask(x: int, y: int = 10, side: int = 14) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + side, x : x + side] = 1
    return mask


def _track(number, x, *, score=0.9, category=1, absent=(), **more):
    rles = [None if t in absent else masks.encode(_mask(x + t)) for t in range(LENGTH)]
    scores = tuple(None if t in absent else score for t in range(LENGTH))
    return Track(number, category, score, scores, tuple(rles), **more)


@pytest.fixture
def source(tmp_path):
    for t in range(LENGTH):
        folder = tmp_path / "clip"
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"{t}.png"), np.full((HEIGHT, WIDTH, 3), 40, np.uint8))
    return open_videos(tmp_path / "clip")[0]


def _grey() -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), 40, np.uint8)


def test_colours_are_stable_and_differ():
    colours = [track_colour(n) for n in range(40)]
    assert colours == [track_colour(n) for n in range(40)]
    assert len(set(colours)) == 40
    assert all(0 <= part <= 255 for colour in colours for part in colour)


def test_only_the_best_row_of_an_instance_is_drawn():
    rows = [
        _track(0, 2, score=0.4, instance=7),
        _track(1, 2, score=0.6, category=2, instance=7),
        _track(2, 30, score=0.5),
        _track(7, 40, score=0.2),
    ]
    assert [row.id for row in best_rows(rows, 0.3)] == [1, 2]
    assert [row.id for row in best_rows(rows)] == [1, 2, 7]


def test_an_instance_keeps_its_colour_whatever_its_row():
    once = found_strip("tracks", [_track(0, 2, instance=3)], 0.0)
    other = found_strip("tracks", [_track(5, 2, instance=3)], 0.0)
    assert list(once.colours.values()) == list(other.colours.values())


def test_found_tracks_take_the_colours_of_the_true_ones_one_to_one():
    truth = truth_strip("truth", [_track(1, 2), _track(2, 40)])
    rows = [_track(10, 3, score=0.9), _track(11, 41, score=0.8), _track(12, 5, score=0.7)]
    found = found_strip("model", [*rows, _track(13, 22, score=0.6)], 0.0, truth)
    assert found.colours[10] == truth.colours[1]
    assert found.colours[11] == truth.colours[2]
    assert found.colours[12] == GREY
    assert found.colours[13] == GREY


def test_overlay_tints_the_mask_and_leaves_the_rest():
    track = _track(0, 20)
    strip = Strip("tracks", (track,), {0: (250, 0, 0)})
    picture = overlay(_grey(), strip, 0, {}, (HEIGHT * 6, WIDTH * 6))
    inside = picture[17 * 6, 27 * 6].astype(int)
    assert inside[0] > 100 > inside[1]
    assert (picture[-6:, :6] == 40).all()


def test_overlay_draws_nothing_where_a_track_is_absent():
    strip = found_strip("tracks", [_track(0, 20, absent=(2,))], 0.0)
    assert (overlay(_grey(), strip, 2, NAMES, (HEIGHT, WIDTH)) == 40).all()
    assert not (overlay(_grey(), strip, 1, NAMES, (HEIGHT, WIDTH)) == 40).all()


def test_overlay_leaves_its_input_alone():
    frame = _grey()
    overlay(frame, found_strip("tracks", [_track(0, 20)], 0.0), 0, NAMES, (HEIGHT, WIDTH))
    assert (frame == 40).all()


def test_labels_do_not_cover_one_another():
    crowd = [Tag(f"object {n}", (n, 200, 0), (40, 40, 80, 80)) for n in range(30)]
    canvas = blank(120, 160, (0, 0, 0))
    place_tags(canvas, crowd, 11)
    areas = [int((canvas[..., 1] > 150).sum())]
    place_tags(single := blank(120, 160, (0, 0, 0)), crowd[:1], 11)
    one = int((single[..., 1] > 150).sum())
    assert 2 * one < areas[0] <= 7.5 * one


@pytest.mark.parametrize("box", [(0, 0, 4, 4), (150, 110, 160, 120), (-20, -20, 300, 300)])
def test_labels_at_the_border_stay_in_the_picture(box):
    canvas = blank(120, 160, (0, 0, 0))
    place_tags(canvas, [Tag("crescent 0.87", (0, 200, 0), box)], 12)
    assert canvas.any()
    assert not canvas[:, -1].any()


def test_a_label_wider_than_the_picture_is_cut_off_not_an_error():
    place_tags(blank(30, 20), [Tag("a very long category name", (9, 200, 9), (0, 0, 9, 9))], 12)


def test_enlarged_masks_keep_their_share():
    mask = _mask(20)
    for factor in (0.5, 1.0, 3.0, 6.0):
        size = (int(HEIGHT * factor), int(WIDTH * factor))
        assert enlarge_mask(mask, *size).mean() == pytest.approx(mask.mean(), rel=0.08)


def test_texts_are_shortened_to_fit():
    assert fitted("short", 14, 200) == "short"
    short = fitted("a_very_long_name_of_a_video", 14, 90)
    assert text_width(short, 14) <= 90
    assert ".." in short


@pytest.mark.parametrize("length", [1, 2, 5, 10, 100])
@pytest.mark.parametrize("columns", [1, 2, 6])
def test_sheet_frames_are_spread_in_order_and_hold_the_key(length, columns):
    for key in (None, 0, length // 2, length - 1):
        shown = spread_frames(length, columns, key)
        assert len(shown) == min(length, columns) == len(set(shown))
        assert shown == sorted(shown)
        assert all(0 <= t < length for t in shown)
        assert key is None or key in shown


def test_the_key_frame_is_refines_or_the_best_scored_of_the_best_track():
    scores = (0.1, 0.7, None, 0.9, 0.9)
    track = Track(0, 1, 0.65, scores, _track(0, 5, absent=(2,)).rles)
    worse = _track(1, 20, score=0.2)
    assert keyframe([worse, track]) == 3
    assert keyframe([worse, _track(2, 5, keyframe=1)]) == 1
    assert keyframe([_track(0, 5, supervision=Supervision.MASK)]) is None
    assert keyframe([]) is None


def test_a_sheet_has_a_row_a_strip_and_frames_its_key(source):
    truth = truth_strip("truth", [_track(0, 5, supervision=Supervision.MASK)])
    found = found_strip("tracks", [_track(0, 6, keyframe=2)], 0.0, truth)
    one = contact_sheet([SheetGroup("clip", source, (found,))], NAMES, columns=4)
    two = contact_sheet([SheetGroup("clip", source, (truth, found))], NAMES, columns=4)
    assert two.shape[1] == one.shape[1]
    assert two.shape[0] > one.shape[0] + 100
    framed = (two == np.array(ACCENT)).all(axis=2)
    assert framed.any(axis=0).sum() > 150
    bare = contact_sheet([SheetGroup("clip", source, (truth,))], NAMES)
    assert not (bare == np.array(ACCENT)).all(axis=2).any()


def test_a_sheet_without_tracks_or_with_one_frame_is_drawn(source):
    empty = found_strip("tracks", [], 0.3)
    assert contact_sheet([SheetGroup("clip", source, (empty,))], NAMES, columns=1).size
    with pytest.raises(UsageError, match="no video"):
        contact_sheet([], NAMES)


def test_overlay_videos_have_frames_of_one_size(source, tmp_path):
    tall = tmp_path / "tall"
    tall.mkdir()
    cv2.imwrite(str(tall / "0.png"), np.full((90, 30, 3), 200, np.uint8))
    empty = found_strip("tracks", [], 0.3)
    groups = [SheetGroup("clip", source, (empty,))]
    groups.append(SheetGroup("tall", open_videos(tall)[0], (empty,)))
    frames = list(overlay_video(groups, NAMES))
    assert len(frames) == LENGTH + 1
    assert len({frame.shape for frame in frames}) == 1
    assert frames[0].shape[0] >= 384


def test_tables_draw_every_cell_and_the_best_row_bold():
    rows = (("image model", "24.1"), ("video model", "27.9"))
    plain = draw_table(ResultTable(("model", "AP"), rows), 400)
    bold = draw_table(ResultTable(("model", "AP"), rows, best=1), 400)
    assert plain.shape == bold.shape
    assert bold.astype(int).sum() < plain.astype(int).sum()


def test_the_demo_picture_holds_truth_and_models(source):
    info = VideoInfo(1, "clip", HEIGHT, WIDTH, LENGTH)
    truth = VideoTracks(info, (_track(0, 5), _track(1, 40)))
    models = {"image model": truth.with_tracks((_track(4, 6),)), "video model": truth}
    table = ResultTable(("model", "AP"), (("image model", "1.0"), ("video model", "2.0")), 1)
    once = demo_picture([(source, truth, models)], NAMES, table)
    again = demo_picture([(source, truth, models)], NAMES, table)
    assert np.array_equal(once, again)
    assert once.shape[0] > 400


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_pictures_are_written_in_rgb_and_whole(tmp_path, suffix):
    picture = blank(20, 30, (200, 10, 30))
    write_picture(tmp_path / f"a{suffix}", picture)
    read = cv2.imread(str(tmp_path / f"a{suffix}"))[:, :, ::-1].astype(int)
    assert np.abs(read - picture).max() < 8
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_pictures_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot write a picture"):
        write_picture(tmp_path / "a.gif", blank(2, 2))
