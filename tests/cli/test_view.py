"""`pmvis view` as a command: choices, both outputs, pipes, and inputs that do not fit."""

from __future__ import annotations

import json

import cv2
import pytest

from pmvis_cli.view import choose
from pmvis_core.errors import UsageError
from pmvis_core.formats.ytvis import open_tracks
from pmvis_core.synthetic import benchmark as synthetic
from pmvis_core.synthetic.benchmark import SynthConfig
from pmvis_core.tracks_io import TracksWriter
from pmvis_core.types import VideoInfo, VideoTracks

TINY = SynthConfig(
    mask_stills=0, box_stills=0, val_stills=0, train_videos=0, valid_videos=4, frames=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view") / "set"
    synthetic.draw(folder, 0, TINY)
    source = open_tracks(folder / "videos" / "valid.json")
    with TracksWriter(folder / "x.tracks.jsonl", source.header) as out:
        for video in source:
            out.write(video)
    return folder


def _videos(count):
    return [VideoTracks(VideoInfo(10 + n, f"clip{n}", 4, 4, 1), ()) for n in range(count)]


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ("2", [10, 11]),
        ("99", [10, 11, 12, 13]),
        ("all", [10, 11, 12, 13]),
        ("12,", [12]),
        ("13, 10", [10, 13]),
        ("clip1,12", [11, 12]),
        ("clip3", [13]),
    ],
)
def test_videos_are_chosen_by_count_id_or_name(wanted, ids):
    assert [video.video.id for video in choose(_videos(4), wanted)] == ids


def test_a_video_that_is_not_there_is_an_error():
    with pytest.raises(UsageError, match="no video `14`"):
        list(choose(_videos(4), "10,14"))


def test_a_choice_reads_to_the_end_so_that_a_cut_file_is_noticed():
    def cut():
        yield from _videos(3)
        raise UsageError("cut off")

    with pytest.raises(UsageError, match="cut off"):
        list(choose(cut(), "1"))


def test_a_contact_sheet_is_drawn(pmvis, folder, tmp_path):
    sheet = tmp_path / "sheet.png"
    words = ("--frames", folder / "videos/valid/JPEGImages", "-o", sheet)
    done = pmvis("view", folder / "x.tracks.jsonl", *words, "--videos", 3)
    assert done.code == 0, done.err
    assert done.out == ""
    tall = cv2.imread(str(sheet)).shape[0]
    assert pmvis("view", folder / "x.tracks.jsonl", *words, "--videos", "2,").code == 0
    assert cv2.imread(str(sheet)).shape[0] < tall


def test_an_overlay_video_beside_the_truth_is_drawn(pmvis, folder, tmp_path):
    valid = folder / "videos" / "valid.json"
    words = (folder / "x.tracks.jsonl", "--frames", valid, "--videos", 2, "--fps", 4)
    for name, more in (("one", ()), ("two", ("--gt", valid))):
        done = pmvis("view", *words, *more, "-o", tmp_path / f"{name}.mp4")
        assert done.code == 0, done.err
    sizes = []
    for name in ("one", "two"):
        capture = cv2.VideoCapture(str(tmp_path / f"{name}.mp4"))
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 2 * TINY.frames
        sizes.append(capture.read()[1].shape)
        capture.release()
    assert sizes[1][1] == 2 * sizes[0][1]


def test_youtube_vis_json_and_standard_input_are_read(pmvis, folder, tmp_path):
    words = ("--frames", folder / "videos" / "valid.json", "-o", tmp_path / "a.jpg")
    assert pmvis("view", folder / "videos" / "valid.json", *words).code == 0
    data = (folder / "x.tracks.jsonl").read_bytes()
    assert pmvis("view", *words, stdin=data).code == 0
    cut = data[: data.rfind(b'{"end"')]
    (tmp_path / "a.jpg").unlink()
    done = pmvis("view", *words, stdin=cut)
    assert done.code == 3
    assert "end record" in done.err
    assert not (tmp_path / "a.jpg").exists()


def test_wrong_outputs_and_choices_are_usage_errors(pmvis, folder, tmp_path):
    words = ("view", folder / "x.tracks.jsonl", "--frames", folder / "videos" / "valid.json")
    for more in (("-o", tmp_path / "a.gif"), ("-o", tmp_path / "a.png", "--videos", "77,")):
        done = pmvis(*words, *more)
        assert done.code == 2, done.err
    assert not list(tmp_path.iterdir())


def test_missing_and_broken_frames_are_data_errors(pmvis, folder, tmp_path):
    words = ("view", folder / "x.tracks.jsonl", "-o", tmp_path / "a.png")
    done = pmvis(*words, "--frames", tmp_path)
    assert done.code == 3
    assert "not found" in done.err
    other = tmp_path / "frames" / "valid0001"
    other.mkdir(parents=True)
    whole = (folder / "videos/valid/JPEGImages/valid0001/00000.jpg").read_bytes()
    (other / "00000.jpg").write_bytes(whole[:-300])
    done = pmvis(*words, "--frames", tmp_path / "frames", "--videos", 1)
    assert done.code == 3
    assert "video 1 `valid0001`, frame 0" in done.err
    assert "truncated" in done.err


def test_a_truth_of_other_categories_or_videos_is_a_data_error(pmvis, folder, tmp_path):
    data = json.loads((folder / "videos" / "valid.json").read_text())
    words = ("view", folder / "x.tracks.jsonl", "--frames", folder / "videos" / "valid.json")
    more = {**data, "categories": [*data["categories"], {"id": 99, "name": "unseen"}]}
    (tmp_path / "gt.json").write_text(json.dumps(more))
    assert pmvis(*words, "--gt", tmp_path / "gt.json", "-o", tmp_path / "more.png").code == 0
    renamed = {**data, "categories": [{**c, "name": f"x{c['id']}"} for c in data["categories"]]}
    fewer = {**data, "videos": data["videos"][1:]}
    fewer["annotations"] = [row for row in data["annotations"] if row["video_id"] != 1]
    for content, message in ((renamed, "another vocabulary"), (fewer, "is not there")):
        (tmp_path / "gt.json").write_text(json.dumps(content))
        done = pmvis(*words, "--gt", tmp_path / "gt.json", "-o", tmp_path / "a.png")
        assert done.code == 3
        assert message in done.err
