"""Bad input, command by command: one clear message, its exit code, and no output touched.

`world` holds one broken file of each kind; a case is a command line, the exit code (2 usage, 3
data, 4 resource), parts of the one message, and whether a hint follows. ``{w}`` stands for the
world, ``{o}`` and ``{p}`` for outputs that exist already, ``{d}`` for a folder that does not.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pmvis_cli.app import main
from pmvis_core.video.frames import write_video

Run = Callable[..., Any]
MINE = b"what was here before\n"


class Bomb:
    """Executes code when it is unpickled."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.crater),)


def rewrite(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Write a JSON file's content beside it under another name, changed."""
    value = json.loads(path.read_text())
    change(value)
    path.with_name(name).write_text(json.dumps(value))


def rewrite_lines(path: Path, name: str, change: Callable[[list[Any]], Any]) -> None:
    """Write a tracks file's lines beside it under another name, changed; `None` is `NaN`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.with_name(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def spoil_frame(videos: Path, name: str, spoil: Callable[[Path], Any]) -> None:
    """Copy the training videos and spoil a frame of the second."""
    place = videos.with_name(name)
    shutil.copytree(videos, place)
    spoil(place / "train/JPEGImages/train0002/00002.jpg")


def cut(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shrink(path: Path) -> None:
    """Replace an image by a smaller one."""
    cv2.imwrite(str(path), np.zeros((40, 30, 3), np.uint8))


def spoil_tracks(raw: Path) -> None:
    """Write broken tracks files beside a whole one."""

    def track(lines: list[Any]) -> dict[str, Any]:
        found: dict[str, Any] = lines[2]["tracks"][0]
        return found

    rewrite_lines(raw, "category.tracks.jsonl", lambda x: track(x).update(category_id=77))
    rewrite_lines(raw, "rle.tracks.jsonl", lambda x: track(x).update(masks=["05", *[None] * 3]))
    rewrite_lines(raw, "nan.tracks.jsonl", lambda x: track(x).update(score=float("nan")))
    rewrite_lines(raw, "twice.tracks.jsonl", lambda x: x.insert(2, x[1]))
    rewrite_lines(raw, "cut.tracks.jsonl", lambda x: x.pop())
    rewrite_lines(raw, "future.tracks.jsonl", lambda x: x[0].update(pmvis_tracks=99))
    rewrite_lines(raw, "frames.tracks.jsonl", lambda x: x[2]["video"].update(length=9))
    rewrite_lines(raw, "none.tracks.jsonl", lambda x: x.__setitem__(slice(1, None), [END]))


END = {"end": {"videos": 0, "tracks": 0, "digest": "e3b0c44298fc1c14"}}


def spoil_dataset(truth: Path) -> None:
    """Write broken YouTube-VIS files beside a whole one."""
    bad = {"size": [96, 128], "counts": "05"}

    def row(value: Any) -> dict[str, Any]:
        found: dict[str, Any] = value["annotations"][0]
        return found

    rewrite(truth, "category.json", lambda x: row(x).update(category_id=77))
    rewrite(truth, "rle.json", lambda x: row(x).update(segmentations=[bad, None, None, None]))
    rewrite(truth, "nan.json", lambda x: row(x).update(score=float("nan")))
    rewrite(truth, "twice.json", lambda x: x["videos"].append(x["videos"][0]))
    rewrite(truth, "no_videos.json", lambda x: x.pop("videos"))


def spoil_stills(data: Path) -> None:
    """Write broken training files beside a whole one, and spoilt images beside whole ones."""
    images = json.loads(data.read_text())["images"]
    first = data.parent / images[0]["file_name"]
    for name, spoil in (("cut", cut), ("odd", shrink), ("missing", Path.unlink)):
        place = first.with_name(f"{name}.jpg")
        shutil.copy(first, place)
        spoil(place)

        def point(value: Any, place: Path = place) -> None:
            for image in value["images"]:
                image["file_name"] = os.path.relpath(place, data.parent)

        rewrite(data, f"{name}.json", point)
    bad = {"size": [images[0]["height"], images[0]["width"]], "counts": "05"}
    rewrite(data, "category.json", lambda x: x["annotations"][0].update(category_id=77))
    rewrite(data, "rle.json", lambda x: x["annotations"][0].update(segmentation=bad))
    rewrite(data, "nan.json", lambda x: x["annotations"][0].update(area=float("nan")))
    rewrite(data, "twice.json", lambda x: x["images"].append(x["images"][0]))
    rewrite(data, "none.json", lambda x: x.update(annotations=[]))


def spoil_weights(folder: Path, run: Path) -> None:
    """Write what is no model: pickles that would run code, foreign tensors, half a model."""
    (folder / "pickle").mkdir()
    bomb = pickle.dumps(Bomb(folder / "crater"), protocol=2)
    (folder / "pickle/model.safetensors").write_bytes(bomb)
    (folder / "pickle.pth").write_bytes(bomb)
    torch.save({"model": Bomb(folder / "crater")}, folder / "zip.pth")
    save_file({"a": np.zeros(3, np.float32)}, folder / "foreign.safetensors")
    shutil.copytree(run, folder / "half")
    cut(folder / "half/model.safetensors")
    shutil.copytree(run, folder / "resumed")
    (folder / "resumed/model.safetensors").unlink()
    (folder / "resumed/state.pt").write_bytes(bomb)
    (folder / "notes").mkdir()
    (folder / "notes/notes.txt").write_bytes(MINE)


@pytest.fixture(scope="module")
def world(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny benchmark and one broken file of each kind."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    videos, raw = folder / "synth/videos", folder / "raw.tracks.jsonl"
    words = ["-q", "infer", "--weights", str(folder / "run"), "--frames", f"{videos}/train.json"]
    assert main([*words, "--device", "cpu", "-o", str(raw)]) == 0
    for name, spoil in (("cut", cut), ("odd", shrink), ("missing", Path.unlink)):
        spoil_frame(videos, name, spoil)
    spoil_frame(videos, "empty", lambda path: path.write_bytes(b""))
    spoil_tracks(raw)
    spoil_dataset(videos / "train_truth.json")
    spoil_stills(folder / "maps/train_image.json")
    spoil_weights(folder, folder / "run")
    pictures = np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), np.uint8)
    write_video(folder / "cut.mp4", iter(pictures))
    cut(folder / "cut.mp4")
    for name in ("empty.mp4", "empty.json", "empty.tracks.jsonl", "empty.pth"):
        (folder / name).write_bytes(b"")
    (folder / "text.mp4").write_text("no video")
    (folder / "folder").mkdir()
    return folder


INFER = "infer --weights {w}/run --device cpu -o {o} --frames"
FRAMES = "{w}/synth/videos/train.json"
REFINE = "refine -o {o} --frames"
IMAGE = (
    "train-image --preset tiny --device cpu --steps 1 --set train.pairs_per_batch=2 -o {d} --data"
)
VIDEO = "train-video --init {w}/run --device cpu --on-error stop --steps 9 -o {d} --frames"
MAP = "map-categories --target {w}/synth/target.json -o {d}"
TRUTH = "{w}/synth/videos/train_truth.json"
STILLS = "{w}/maps/train_image.json"

PICTURES = [
    (f"{INFER} {{w}}/synth/missing/train.json", 3, ["`train0002`, frame 2", "not exist"], True),
    (f"{INFER} {{w}}/synth/cut/train.json", 3, ["`train0002`, frame 2", "is truncated"], True),
    (f"{INFER} {{w}}/synth/empty/train.json", 3, ["`train0002`, frame 2", "is empty"], False),
    (f"{INFER} {{w}}/synth/odd/train.json", 3, ["frame 2 is 30x40, expected 128x96"], True),
    (f"{INFER} {{w}}/synth/odd/train/JPEGImages/train0002", 3, ["frame 2 is 30x40"], True),
    (f"{INFER} {{w}}/cut.mp4", 3, ["cut.mp4` cannot be opened as a video"], True),
    (f"{INFER} {{w}}/empty.mp4", 3, ["empty.mp4` is empty"], False),
    (f"{INFER} {{w}}/text.mp4", 3, ["text.mp4` cannot be opened as a video"], True),
    (f"{INFER} {{w}}/none.mp4", 3, ["none.mp4` does not exist"], True),
    (f"{INFER} {{w}}/folder", 3, ["folder` holds no frames"], True),
    (f"{INFER} {{w}}/empty.json", 3, ["empty.json` is empty, expected JSON"], False),
    (f"{REFINE} {{w}}/synth/missing {{w}}/raw.tracks.jsonl", 3, ["not found"], True),
    (f"{REFINE} {{w}}/synth/cut/train.json {{w}}/raw.tracks.jsonl", 3, ["truncated"], True),
    (f"{REFINE} {{w}}/synth/odd/train.json {{w}}/raw.tracks.jsonl", 3, ["30x40"], True),
    (f"{REFINE} {{w}}/cut.mp4 {{w}}/raw.tracks.jsonl", 3, ["`train0001` not found"], True),
    (
        "view {w}/raw.tracks.jsonl --frames {w}/synth/cut/train.json --min-score 0 -o {p}",
        3,
        ["is truncated"],
        True,
    ),
    (f"{IMAGE} {{w}}/maps/missing.json", 3, ["21 of 21 training images are missing"], True),
    (f"{IMAGE} {{w}}/maps/cut.json", 3, ["training image", "cut.jpg` is truncated"], True),
    (f"{IMAGE} {{w}}/maps/odd.json", 3, ["odd.jpg` is 30x40 pixels"], True),
    (f"{VIDEO} {{w}}/synth/missing/train.json --pseudo {{w}}/raw.tracks.jsonl", 3, ["2"], True),
    (f"{VIDEO} {{w}}/synth/cut/train.json --pseudo {{w}}/raw.tracks.jsonl", 3, ["trunc"], True),
    (f"{VIDEO} {{w}}/synth/odd/train.json --pseudo {{w}}/raw.tracks.jsonl", 3, ["30x40"], True),
]

TRACKS = [
    (f"{command} {{w}}/{name}.tracks.jsonl", 3, parts, hint)
    for command in ("filter -o {o}", f"{REFINE} {FRAMES}", f"{VIDEO} {FRAMES} --pseudo")
    for name, parts, hint in (
        ("category", ["category.tracks.jsonl:3", "category id 77, not in the vocabulary"], False),
        ("rle", ["rle.tracks.jsonl:3", "frame 0", "cover 5 pixels"], True),
        ("nan", ["nan.tracks.jsonl:3: holds `NaN`, expected a finite number"], False),
        ("twice", ["twice.tracks.jsonl:3: video id 1 occurs a second time"], False),
        ("cut", ["ended after 3 videos without its end record"], True),
        ("empty", ["empty.tracks.jsonl is empty, expected a tracks file"], True),
        ("future", ["format version 99, this pmvis reads 1"], False),
        ("frames", ["frames.tracks.jsonl:3", "4 file names, 9 frames"], False),
        ("absent", ["absent.tracks.jsonl` does not exist"], True),
    )
]

EVAL = "eval {w}/raw.tracks.jsonl -o {o} --gt"

DOCUMENTS = [
    (f"{EVAL} {{w}}/synth/videos/rle.json", 3, ["annotation 1, frame 0", "5 pixels"], True),
    (f"{EVAL} {{w}}/synth/videos/category.json --strict", 3, ["unlisted categories"], True),
    (f"{EVAL} {{w}}/synth/videos/twice.json --strict", 3, ["occur more than once"], True),
    (f"{EVAL} {{w}}/synth/videos/nan.json", 3, ["holds `NaN`"], False),
    (f"{EVAL} {{w}}/empty.json", 3, ["is empty, expected JSON"], False),
    (f"{EVAL} {{w}}/absent.json", 3, ["absent.json` does not exist"], True),
    (f"{EVAL} {{w}}/synth/stills_val.json", 3, ["has no `videos`"], True),
    (f"eval {{w}}/cut.tracks.jsonl -o {{o}} --gt {TRUTH}", 3, ["end record"], True),
    (f"eval {{w}}/nan.tracks.jsonl -o {{o}} --gt {TRUTH}", 3, ["holds `NaN`"], False),
    (f"eval {{w}}/empty.tracks.jsonl -o {{o}} --gt {TRUTH}", 3, ["is empty"], True),
    ("convert {w}/synth/videos/twice.json --to tracks -o {o}", 3, ["twice"], False),
    ("convert {w}/synth/videos/category.json --to tracks -o {o}", 3, ["id 77"], False),
    ("convert {w}/synth/videos/rle.json --to tracks -o {o}", 3, ["frame 0"], True),
    ("convert {w}/synth/videos/no_videos.json --to tracks -o {o}", 3, ["no `videos`"], True),
    ("convert {w}/maps/rle.json --to dataset -o {o}", 3, ["annotation 1", "5 pixels"], True),
    ("convert {w}/maps/train_image.json --to dataset -o {o}", 3, ["has no mask"], True),
    ("convert {w}/empty.json --to dataset -o {o}", 3, ["is empty"], True),
    (f"{IMAGE} {{w}}/maps/category.json", 3, ["annotation 1 has category id 77"], False),
    (f"{IMAGE} {{w}}/maps/rle.json", 3, ["annotation 1", "5 pixels"], True),
    (f"{IMAGE} {{w}}/maps/nan.json", 3, ["holds `NaN`"], False),
    (f"{IMAGE} {{w}}/maps/twice.json", 3, ["image id 1 occurs a second time"], False),
    (f"{IMAGE} {{w}}/maps/none.json", 3, ["no annotation to train on"], True),
    (f"{IMAGE} {{w}}/empty.json", 3, ["is empty"], False),
    (f"{VIDEO} {FRAMES} --pseudo {{w}}/none.tracks.jsonl", 3, ["no track", "0 videos"], True),
    (f"{MAP} --coco {{w}}/maps/category.json", 3, ["category id 77, not listed"], False),
    (f"{MAP} --coco {{w}}/maps/nan.json", 3, ["holds `NaN`"], False),
    (f"{MAP} --coco {{w}}/empty.json", 3, ["is empty"], False),
    (f"{MAP} --coco {{w}}/maps/missing.json", 3, ["no picture of"], True),
    (f"{MAP} --imagenet-bbox {{w}}/folder", 3, ["folder"], True),
    ("map-categories --target {w}/empty.json --coco x -o {d}", 3, ["is empty"], False),
]

INFER_WITH = f"infer --device cpu --frames {FRAMES} -o {{o}} --weights"
IMAGE_WITH = f"{IMAGE} {STILLS}"

WEIGHTS = [
    (f"{INFER_WITH} {{w}}/pickle", 4, ["is not a safetensors file"], True),
    (f"{INFER_WITH} {{w}}/pickle.pth", 3, ["which no tensor needs; it was not run"], True),
    (f"{INFER_WITH} {{w}}/half", 4, ["is not a safetensors file"], True),
    (f"{INFER_WITH} {{w}}/foreign.safetensors", 4, ["holds tensors but no pmvis model"], True),
    (f"{INFER_WITH} {{w}}/absent", 4, ["absent` do not exist"], True),
    (f"{INFER_WITH} {{w}}/folder", 4, ["model.safetensors` do not exist"], True),
    (f"{INFER_WITH} {{w}}/run --set mask_nsm=0.3", 2, ["mask_nsm"], True),
    (f"{INFER_WITH} {{w}}/run --set mask_nms=high", 2, ["mask_nms"], False),
    (f"{INFER_WITH} {{w}}/run --device cuda:99", 4, ["`cuda:99` is not here"], True),
    (f"{INFER_WITH} {{w}}/run --device gpu", 4, ["no device `gpu`"], True),
    (f"{INFER_WITH} {{w}}/run --device meta", 4, ["no device `meta`"], True),
    (f"{IMAGE_WITH} --init {{w}}/pickle", 4, ["is not a safetensors file"], True),
    (f"{IMAGE_WITH} --init {{w}}/absent", 4, ["absent` do not exist"], True),
    (f"{IMAGE_WITH} --init-backbone {{w}}/pickle.pth", 3, ["which no tensor needs"], True),
    (f"{IMAGE_WITH} --init-backbone {{w}}/zip.pth", 3, ["which no tensor needs"], True),
    (f"{IMAGE_WITH} --init-backbone {{w}}/empty.pth", 4, ["no checkpoint of plain"], True),
    (f"{IMAGE_WITH} --init-backbone {{w}}/absent.pth", 4, ["absent.pth` do not exist"], True),
    (f"{IMAGE_WITH} --init-backbone {{w}}/foreign.safetensors", 4, ["lacks", "of the"], True),
    (f"{IMAGE_WITH} --device cuda:99", 4, ["`cuda:99` is not here"], True),
    (f"{VIDEO} {FRAMES} --pseudo {{w}}/raw.tracks.jsonl --init {{w}}/half", 4, ["no"], True),
]

OPTIONS = [
    (f"{IMAGE_WITH} -o {{w}}/notes", 2, ["notes` is not empty and holds no run"], True),
    (f"{IMAGE_WITH} -o {{o}}", 2, ["is a file, expected a run folder"], True),
    (f"{IMAGE_WITH} --set train.steps=7 -o {{w}}/run", 2, ["made from other inputs"], True),
    (f"{IMAGE_WITH} --preset tinny", 2, ["no preset `tinny`"], True),
    (f"{IMAGE_WITH} --set train.stpes=3", 2, ["stpes"], True),
    (f"{IMAGE_WITH} --set train.log_every=many", 2, ["log_every", "expected int"], False),
    (f"{IMAGE_WITH} --set train.steps", 2, ["has no `=`"], True),
    (f"{IMAGE_WITH} --config {{w}}/absent.toml", 3, ["absent.toml` does not exist"], True),
    (f"{IMAGE_WITH} --config {{w}}/empty.mp4 --preset x", 2, ["no preset"], True),
    (f"{IMAGE_WITH} --preset tiny --no-mask-loss", 2, ["without any loss"], True),
    (f"{INFER} {FRAMES} --shard 3/2", 2, ["`--shard 3/2`"], False),
    (f"{INFER} {{w}}/synth/videos --root x", 2, ["`--root` is for a JSON"], True),
    (f"{INFER} {FRAMES} --root {{w}}/folder", 3, ["`train0001` not found"], True),
    (
        f"{REFINE} {FRAMES} {{w}}/raw.tracks.jsonl --method folw",
        2,
        ["`folw`, expected one of"],
        False,
    ),
    ("map-categories --target ovis --imagenet-bbox x --hide-masks 2 -o {d}", 2, ["--coco"], False),
    ("convert {w}/raw.tracks.jsonl --target ovis --to dataset -o {o}", 2, ["--target"], False),
    ("convert {w}/maps/category.json --target ovi --to dataset -o {o}", 3, ["id 77"], False),
    ("filter {w}/raw.tracks.jsonl --topk some -o {o}", 2, ["--topk is `some`"], False),
]


def ids(case: Any) -> str | None:
    return case.replace("{w}/", "").replace(" ", "_")[:70] if isinstance(case, str) else None


@pytest.mark.parametrize(
    ("line", "code", "parts", "hint"), [*PICTURES, *TRACKS, *DOCUMENTS, *WEIGHTS, *OPTIONS], ids=ids
)
def test_bad_input(
    pmvis: Run, world: Path, tmp_path: Path, line: str, code: int, parts: list[str], hint: bool
) -> None:
    out, picture, folder = tmp_path / "out", tmp_path / "out.png", tmp_path / "run"
    for path in (out, picture):
        path.write_bytes(MINE)
    done = pmvis(*line.format(w=world, o=out, p=picture, d=folder).split())
    complaints = [text for text in done.err.splitlines() if text.startswith("error:")]
    assert done.code == code, done.err
    assert len(complaints) == 1, done.err
    for part in parts:
        assert part in complaints[0]
    assert ("  hint: " in done.err) == hint, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert out.read_bytes() == picture.read_bytes() == MINE
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "out.part", "out.png", "run"}
    assert not list(folder.rglob("*.safetensors")) + list(folder.rglob("*.json.part"))
    assert not (world / "crater").exists()
    assert (world / "notes/notes.txt").read_bytes() == MINE


def test_a_pickle_in_place_of_a_state_is_refused(pmvis: Run, world: Path) -> None:
    words = "train-image --preset tiny --device cpu --steps 2 --set train.pairs_per_batch=2"
    for setting in (world / "run/config.toml").read_text().partition("[tracker]\n")[2].splitlines():
        words += f" --set tracker.{setting.replace(' ', '')}"
    data = ["--data", world / "maps/train_image.json", "-o", world / "resumed"]
    done = pmvis(*words.split(), *data)
    assert (done.code, "state.pt" in done.err) == (4, True), done.err
    assert "hint: " in done.err
    assert not (world / "crater").exists()
    assert not (world / "resumed/model.safetensors").exists()


def test_decoders_do_not_speak_beside_the_message(shell: Run, world: Path) -> None:
    done = shell(f"echo '[]' > r.json; pmvis convert r.json --to tracks --videos {world}/cut.mp4")
    assert (done.code, done.out) == (3, "")
    assert [line[:7] for line in done.err.splitlines()] == ["error: ", "  hint:"], done.err
