"""Parts of videos, cameras and lists: which frames come, under which name, and what is broken."""

from __future__ import annotations

import io
import itertools
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmvis_core.errors import DataError, ResourceError, UsageError
from pmvis_core.types import VideoInfo
from pmvis_core.video.frames import camera_number, find_frames, open_videos, write_video
from pmvis_core.video.sources import (
    ENDLESS,
    Camera,
    FrameSource,
    SelectedFrames,
    VideoFile,
    kept_info,
    select_frames,
    split_slice,
)


class Numbers(FrameSource):
    """Frames that show their own number, at ten a second."""

    fps = 10.0

    def __init__(self, length, names=False):
        files = tuple(f"{t}.jpg" for t in range(length)) if names else ()
        super().__init__(VideoInfo(3, "clip", 1, 1, length, files))

    def readings(self, which=None):
        for t in range(self.info.length) if which is None else which:
            yield self[t]

    def __getitem__(self, t):
        return np.full((1, 1, 3), t, np.uint8)

    def _measure(self):
        raise AssertionError


def shown(source):
    return [int(frame[0, 0, 0]) for frame in source.frames()]


@given(st.integers(1, 40), st.integers(0, 39), st.integers(1, 50), st.integers(1, 9))
def test_a_part_is_a_slice(length, start, end, every):
    expected = list(range(length))[start:end:every]
    if not expected:
        with pytest.raises(UsageError, match="leaves none"):
            select_frames(Numbers(length), str(start), str(end), every)
        return
    part = select_frames(Numbers(length), str(start), str(end), every)
    assert shown(part) == expected
    assert part.info.length == len(part) == len(expected)
    assert [int(part[t][0, 0, 0]) for t in range(len(part))] == expected
    again = SelectedFrames(part, range(0, len(part), 2))
    assert shown(again) == expected[::2]
    name, which = split_slice(again.info.name)
    assert name == "clip"
    assert list(range(length))[which.start : which.stop : which.step] == expected[::2]


def test_the_whole_is_itself_and_files_keep_their_names():
    whole = Numbers(5, names=True)
    assert select_frames(whole) is whole
    part = select_frames(whole, "0.1s", "0.5s", 2)
    assert part.info == VideoInfo(3, "clip", 1, 1, 2, ("1.jpg", "3.jpg"))
    assert part.fps == 5


@pytest.mark.parametrize("text", ["-1", "x", "1.5", "nan", "1e99s", "-2s", "s"])
def test_what_is_no_place(text):
    with pytest.raises(UsageError, match="expected a frame"):
        select_frames(Numbers(5), text)


def test_left_out_frames_are_not_of_the_video():
    files = Numbers(4, names=True).info
    assert kept_info(files, [0, 1, 2, 3]) is files
    assert kept_info(files, [0, 3]).file_names == ("0.jpg", "3.jpg")
    assert kept_info(Numbers(4).info, [0, 1]).name == "clip[0:2:1]"
    part = SelectedFrames(Numbers(40), range(10, 40, 5)).info
    assert (part.name, kept_info(part, [0, 1]).name) == ("clip[10:40:5]", "clip[10:20:5]")


class Device:
    """A camera of three frames."""

    def __init__(self, frames=3):
        self.left = frames
        self.released = False

    def isOpened(self):
        return self.left > 0

    def read(self):
        self.left -= 1
        return (True, np.full((2, 4, 3), self.left, np.uint8)) if self.left >= 0 else (False, None)

    def get(self, _):
        return 25.0

    def release(self):
        self.released = True


def test_a_camera_ends_when_it_gives_no_more():
    device = Device()
    camera = Camera(0, lambda index: device)
    assert camera.info == VideoInfo(1, "camera0", 2, 4, ENDLESS)
    assert shown(camera) == [2, 1, 0]
    assert device.released
    with pytest.raises(DataError, match="again"):
        camera[0]


def test_a_camera_ends_when_it_is_stopped_and_its_parts_with_it():
    part = select_frames(Camera(0, lambda index: Device(100)), "1s", every=3)
    assert part.live
    taken = []
    for frame in part.frames():
        taken.append(int(frame[0, 0, 0]))
        if len(taken) == 3:
            part.stop()
    assert taken == [74, 71, 68]


def test_a_camera_that_is_not_there_is_a_missing_resource():
    with pytest.raises(ResourceError, match="camera 7"):
        _ = Camera(7, lambda index: Device(0)).info


def test_a_number_is_a_camera_unless_it_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [camera_number(tmp_path.__class__(p)) for p in ("0", "webcam:12", "a", "webcam:")] == [
        0, 12, None, None,
    ]  # fmt: skip
    (tmp_path / "0").mkdir()
    assert camera_number(tmp_path.__class__("0")) is None


def _draw(folder, count):
    folder.mkdir(parents=True)
    for t in range(count):
        assert cv2.imwrite(str(folder / f"{t}.png"), np.full((8, 8, 3), t, np.uint8))


def test_a_list_of_paths_becomes_videos_by_folder(tmp_path, monkeypatch):
    _draw(tmp_path / "a", 3)
    _draw(tmp_path / "b", 2)
    write_video(tmp_path / "c.mp4", iter([np.zeros((16, 16, 3), np.uint8)] * 2))
    lines = [tmp_path / "a/2.png", tmp_path / "a/0.png", tmp_path / "b", tmp_path / "c.mp4",
             tmp_path / "a/1.png"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    found = open_videos(tmp_path.__class__("-"))
    assert [(v.info.id, v.info.name, v.info.length) for v in found] == [
        (1, "a", 2), (2, "b", 2), (3, "c", 2), (4, "a", 1),
    ]  # fmt: skip
    assert shown(found[0]) == [2, 0]


@pytest.mark.parametrize("text", ["", "\n", "nowhere\n"])
def test_a_list_that_names_nothing_is_refused(text, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(DataError, match="standard input names"):
        open_videos(tmp_path.__class__("-"))


def test_a_video_that_ends_early_gives_its_beginning(tmp_path):
    write_video(tmp_path / "a.mp4", iter([np.full((16, 16, 3), 8 * t, np.uint8) for t in range(9)]))
    longer = VideoInfo(1, "a", 16, 16, 12)
    readings = list(VideoFile(tmp_path / "a.mp4", 1, "a", longer).readings())
    assert [isinstance(r, DataError) for r in readings] == [False] * 9 + [True] * 3
    shorter = VideoInfo(1, "a", 16, 16, 7)
    readings = list(VideoFile(tmp_path / "a.mp4", 1, "a", shorter).readings())
    assert [isinstance(r, DataError) for r in readings] == [False] * 7 + [True]
    assert "goes on after 7 frames" in str(readings[-1])


def test_broken_images_are_told_one_by_one(tmp_path):
    _draw(tmp_path / "a", 4)
    for t in (0, 2):
        (tmp_path / f"a/{t}.png").write_bytes(b"")
    (video,) = open_videos(tmp_path / "a")
    assert video.info.height == 8
    assert [isinstance(r, DataError) for r in video.readings()] == [True, False, True, False]
    assert [isinstance(r, DataError) for r in video.readings(range(1, 4, 2))] == [False, False]
    with pytest.raises(DataError, match="frame 0"):
        list(video.frames())


@pytest.mark.parametrize(("start", "every"), [(0, 1), (5, 1), (0, 4), (3, 7), (19, 1)])
def test_a_part_of_a_video_file_has_the_frames_of_the_whole(tmp_path, start, every):
    frames = [np.full((16, 16, 3), 10 * t, np.uint8) for t in range(20)]
    write_video(tmp_path / "a.mp4", iter(frames))
    whole = list(open_videos(tmp_path / "a.mp4")[0].frames())
    part = select_frames(open_videos(tmp_path / "a.mp4")[0], str(start), every=every)
    expected = list(itertools.islice(whole, start, None, every))
    assert all((a == b).all() for a, b in zip(part.frames(), expected, strict=True))
    again = find_frames(part.info, tmp_path)
    assert all((a == b).all() for a, b in zip(again.frames(), expected, strict=True))


def test_a_video_may_have_any_suffix_if_it_is_named(tmp_path):
    write_video(tmp_path / "a.mp4", iter([np.zeros((16, 16, 3), np.uint8)] * 3))
    (tmp_path / "a.mp4").rename(tmp_path / "a.video")
    assert open_videos(tmp_path / "a.video")[0].info.length == 3
