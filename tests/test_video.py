"""Frames in and out: every kind of source, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmvis_core.errors import DataError, ResourceError, UsageError
from pmvis_core.types import VideoInfo
from pmvis_core.video.frames import (
    ImageFrames,
    VideoFile,
    find_frames,
    is_whole,
    natural_key,
    open_videos,
    read_image,
    write_video,
)


def _frame(t: int, height: int = 24, width: int = 32) -> np.ndarray:
    frame = np.full((height, width, 3), (200, 20 * t, 60), np.uint8)
    frame[2:9, t : t + 6] = 255
    return frame


def _write(path, frame, params=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), frame[:, :, ::-1], list(params))


def _clip(folder, count=4, suffix=".png", **size):
    for t in range(count):
        _write(folder / f"{t:05d}{suffix}", _frame(t, **size))
    return folder


def _encode(path, fourcc, count=30):
    size = (32, 24)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 10, size)
    if not writer.isOpened():
        pytest.skip(f"this OpenCV cannot write {fourcc} in {path.suffix}")
    for t in range(count):
        writer.write(np.full((24, 32, 3), 8 * t, np.uint8))
    writer.release()
    return path


def test_a_folder_of_frames_is_one_video_in_rgb(tmp_path):
    (video,) = open_videos(_clip(tmp_path / "clip"))
    names = tuple(f"{t:05d}.png" for t in range(4))
    assert video.info == VideoInfo(1, "clip", 24, 32, 4, names)
    frames = list(video.frames())
    assert all(np.array_equal(frame, _frame(t)) for t, frame in enumerate(frames))
    assert np.array_equal(video[2], _frame(2))
    assert frames[0].dtype == np.uint8
    assert frames[0].flags.c_contiguous
    assert len(video) == 4


def test_a_folder_of_folders_is_many_videos_in_natural_order(tmp_path):
    for name in ("clip10", "clip2", ".hidden"):
        _clip(tmp_path / name, count=2)
    (tmp_path / "empty").mkdir()
    videos = open_videos(tmp_path)
    assert [(v.info.id, v.info.name) for v in videos] == [(1, "clip2"), (2, "clip10")]
    assert videos[1].info.file_names == ("clip10/00000.png", "clip10/00001.png")


def test_frames_sort_by_number_not_by_letter(tmp_path):
    for t in (10, 9, 1, 100):
        _write(tmp_path / "c" / f"f{t}.png", _frame(t % 10))
    (video,) = open_videos(tmp_path / "c")
    assert video.info.file_names == ("f1.png", "f9.png", "f10.png", "f100.png")


@given(st.lists(st.text("a01.9²_", min_size=1, max_size=8), unique=True, max_size=8))
def test_natural_order_is_total_and_stable(names):
    once = sorted(names, key=natural_key)
    assert sorted(reversed(once), key=natural_key) == once


@pytest.mark.parametrize("place", [".", "JPEGImages", "valid/JPEGImages"])
def test_a_youtube_vis_json_keeps_its_ids_and_finds_its_frames(tmp_path, place):
    _clip(tmp_path / place / "a", count=3)
    video = {"id": 7, "height": 24, "width": 32, "length": 3}
    video["file_names"] = [f"a/{t:05d}.png" for t in range(3)]
    data = {"videos": [video], "categories": [{"id": 1, "name": "disc"}]}
    (tmp_path / "valid.json").write_text(json.dumps(data))
    (source,) = open_videos(tmp_path / "valid.json")
    assert source.info.id == 7
    assert np.array_equal(source[1], _frame(1))
    if place != ".":
        (source,) = open_videos(tmp_path / "valid.json", tmp_path / place)
        assert len(list(source.frames())) == 3


@pytest.mark.parametrize(
    ("name", "fourcc"),
    [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"), ("a.mov", "mp4v")],
)
def test_a_video_file_streams_and_seeks_to_the_same_frames(tmp_path, name, fourcc):
    _encode(tmp_path / name, fourcc)
    (video,) = open_videos(tmp_path / name)
    assert (video.info.name, video.info.height, video.info.width) == ("a", 24, 32)
    frames = list(video.frames())
    assert len(frames) == video.info.length == 30
    for t in (0, 17, 29):
        assert np.array_equal(video[t], frames[t])
        assert abs(int(frames[t].mean()) - 8 * t) <= 6
    with pytest.raises(IndexError):
        video[30]


def test_a_folder_of_video_files_is_many_videos(tmp_path):
    _encode(tmp_path / "b2.mp4", "mp4v", 3)
    _encode(tmp_path / "b10.avi", "MJPG", 3)
    assert [v.info.name for v in open_videos(tmp_path)] == ["b2", "b10"]


@pytest.mark.parametrize(
    ("name", "fourcc"),
    [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"), ("a.mov", "mp4v")],
)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_truncated_video_file_is_an_error_that_names_it(tmp_path, name, fourcc, share):
    whole = _encode(tmp_path / name, fourcc).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=f"video 1 `a`: `.*{name}`") as caught:
        list(open_videos(tmp_path / name)[0].frames())
    assert "cut off" in caught.value.hint


def test_an_empty_or_foreign_video_file_is_an_error(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video at all")
    for name, message in (("empty", "is empty"), ("text", "cannot be opened")):
        with pytest.raises(DataError, match=message):
            _ = open_videos(tmp_path / f"{name}.mp4")[0].info


def test_a_video_file_that_is_not_as_long_as_declared_is_an_error(tmp_path):
    _encode(tmp_path / "a.mp4", "mp4v", 10)
    for length, message in ((12, "ends after 10 frames"), (9, "goes on after 9 frames")):
        source = find_frames(VideoInfo(3, "a", 24, 32, length), tmp_path)
        with pytest.raises(DataError, match=message):
            list(source.frames())


def test_every_cut_of_a_jpeg_is_noticed_and_appended_bytes_are_not_minded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for progressive in (0, 1):
        path = tmp_path / f"{progressive}.jpg"
        _write(path, noise, (cv2.IMWRITE_JPEG_PROGRESSIVE, progressive))
        data = path.read_bytes()
        assert is_whole(data)
        assert is_whole(data + b"\0" * 100)
        assert not any(is_whole(data[:n]) for n in range(2, len(data)))


def test_the_end_marker_of_an_embedded_thumbnail_does_not_count():
    _, small = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))
    _, large = cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))
    thumbnail = small.tobytes()
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = b"\xff\xd8" + segment + large.tobytes()[2:]
    assert is_whole(data)
    assert not is_whole(data[: len(segment) + 40])


@given(st.binary(max_size=200))
def test_any_bytes_get_an_answer(data):
    assert is_whole(data) in (True, False)
    assert is_whole(b"\xff\xd8" + data) in (True, False)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_truncated_frame_names_file_video_and_frame(tmp_path, suffix):
    _clip(tmp_path / "clip", suffix=suffix)
    path = tmp_path / "clip" / f"00002{suffix}"
    path.write_bytes(path.read_bytes()[:-20])
    (video,) = open_videos(tmp_path / "clip")
    with pytest.raises(DataError, match=f"video 1 `clip`, frame 2: .*00002{suffix}` is truncated"):
        list(video.frames())
    assert video[1].shape == (24, 32, 3)


def test_missing_empty_and_foreign_frames_are_errors(tmp_path):
    _clip(tmp_path / "clip")
    (video,) = open_videos(tmp_path / "clip")
    path = tmp_path / "clip" / "00001.png"
    for content, message in ((b"", "is empty"), (b"no image", "no image"), (None, "not exist")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=f"frame 1: .*{message}"):
            list(video.frames())
        path.touch()


def test_a_frame_of_another_size_says_got_and_expected(tmp_path):
    _clip(tmp_path / "clip")
    _write(tmp_path / "clip" / "00003.png", _frame(0, height=30, width=20))
    (video,) = open_videos(tmp_path / "clip")
    with pytest.raises(DataError, match="frame 3 is 20x30, expected 32x24"):
        list(video.frames())
    with pytest.raises(DataError, match="frame 3 is 20x30, expected 32x24"):
        _ = video[3]


def test_a_declared_size_is_checked_on_the_first_frame_too(tmp_path):
    _clip(tmp_path / "clip", count=1)
    declared = VideoInfo(5, "clip", 48, 64, 1, ("00000.png",))
    with pytest.raises(DataError, match="video 5 `clip`, frame 0 is 32x24, expected 64x48"):
        list(find_frames(declared, tmp_path / "clip").frames())


def test_grey_alpha_palette_and_deep_images_become_rgb(tmp_path):
    grey = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    cv2.imwrite(str(tmp_path / "deep.png"), grey.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([grey] * 4))
    for name in ("grey", "deep", "alpha"):
        image = read_image(tmp_path / f"{name}.png")
        assert image.dtype == np.uint8
        assert np.array_equal(image, np.dstack([grey] * 3))


def test_exif_orientation_is_obeyed(tmp_path):
    _, data = cv2.imencode(".jpg", _frame(0)[:, :, ::-1])
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    segment = b"\xff\xe1" + (len(tiff) + 8).to_bytes(2, "big") + b"Exif\0\0" + tiff
    (tmp_path / "turned.jpg").write_bytes(b"\xff\xd8" + segment + data.tobytes()[2:])
    assert read_image(tmp_path / "turned.jpg").shape == (32, 24, 3)


def test_places_without_videos_are_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.mp4", tmp_path / "notes.txt"):
        with pytest.raises(DataError):
            open_videos(path)


def test_frames_are_found_from_the_place_they_were_opened_from(tmp_path):
    _clip(tmp_path / "set" / "a", count=2)
    (tmp_path / "files").mkdir()
    _encode(tmp_path / "files" / "b.mp4", "mp4v", 3)
    for name in ("set", "set/a", "files", "files/b.mp4"):
        place = tmp_path / name
        (video,) = open_videos(place)
        again = find_frames(video.info, place)
        assert again.info == video.info
        assert np.array_equal(again[1], video[1])


def test_one_video_of_a_set_is_found_in_its_own_folder_and_the_reverse(tmp_path):
    _clip(tmp_path / "a", count=2)
    of_set, alone = open_videos(tmp_path)[0].info, open_videos(tmp_path / "a")[0].info
    assert isinstance(find_frames(of_set, tmp_path / "a"), ImageFrames)
    assert isinstance(find_frames(alone, tmp_path), ImageFrames)


def test_frames_that_are_nowhere_are_an_error_that_says_where_was_looked(tmp_path):
    images = VideoInfo(4, "gone", 24, 32, 1, ("gone/0.png",))
    with pytest.raises(DataError, match=r"video 4 `gone` not found: .*gone/0\.png"):
        find_frames(images, tmp_path)
    with pytest.raises(DataError, match="video 5 `lost` not found"):
        find_frames(VideoInfo(5, "lost", 24, 32, 1), tmp_path)
    with pytest.raises(DataError, match="names 1 frame files, expected 3"):
        find_frames(VideoInfo(4, "gone", 24, 32, 3, ("gone/0.png",)), tmp_path)


def test_nothing_is_read_before_it_is_needed(tmp_path):
    for name in ("a", "b"):
        _clip(tmp_path / name, count=1)
    (tmp_path / "b" / "00000.png").write_bytes(b"broken")
    first, second = open_videos(tmp_path)
    assert first.info.length == 1
    with pytest.raises(DataError, match="video 2 `b`"):
        _ = second.info


def test_written_video_reads_back_and_is_the_same_twice(tmp_path):
    frames = [_frame(t, 25, 31) for t in range(6)]
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", iter(frames), 5.0)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    video = VideoFile(tmp_path / "a.mp4", 1, "a")
    assert (video.info.height, video.info.width, video.info.length) == (26, 32, 6)
    read = video[0][:25, :31].astype(int)
    assert np.abs(read - frames[0]).mean() < 12


def test_a_failing_writer_leaves_the_old_file_and_no_new_one(tmp_path):
    path = tmp_path / "out.mp4"
    write_video(path, iter([_frame(0)]))
    before = path.read_bytes()

    def broken():
        yield _frame(1)
        raise DataError("upstream failed")

    with pytest.raises(DataError):
        write_video(path, broken())
    assert path.read_bytes() == before


def test_unwritable_videos_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot write a video"):
        write_video(tmp_path / "out.gif", iter([_frame(0)]))
    with pytest.raises(UsageError, match="no frame"):
        write_video(tmp_path / "out.mp4", iter([]))
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError):
        write_video(tmp_path / "file" / "out.mp4", iter([_frame(0)]))


def test_every_real_image_is_whole_and_its_halves_are_not(shared):
    paths = sorted((shared / "real").rglob("*.jpg"))[::40]
    if not paths:
        pytest.skip("no real images beside the project")
    for path in paths:
        data = path.read_bytes()
        assert is_whole(data)
        assert not is_whole(data[: len(data) // 2])


def test_a_folder_may_move_with_its_frames(tmp_path):
    _clip(tmp_path / "old" / "a", count=2)
    info = open_videos(tmp_path / "old")[0].info
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert np.array_equal(find_frames(info, tmp_path / "new")[0], _frame(0))
