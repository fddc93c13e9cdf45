"""Random files of ground truth and results, in any spelling of JSON and with any oddity."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from pmvis_core import masks, rle_numpy

SIZE = (9, 12)
LEVELS = ("no_occlusion", "slight_occlusion", "severe_occlusion", None)


class Drawn:
    """Draws small ground truth and results that overlap, tie and are odd now and then."""

    def __init__(self, seed: int) -> None:
        """Start; the same seed draws the same."""
        self.rng = random.Random(seed)
        self.odd = self.rng.random() < 0.6

    def chance(self, share: float) -> bool:
        """Return True in a share of the cases."""
        return self.rng.random() < share

    def rarely(self, share: float) -> bool:
        """Return True in a share of the cases of files that may be odd."""
        return self.odd and self.chance(share)

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Draw a rectangle near one of two places."""
        x, y = self.rng.choice([(1, 1), (5, 3)])
        x, y = x + self.rng.randint(0, 1), y + self.rng.randint(0, 1)
        return x, y, min(size[1], x + self.rng.randint(3, 5)), min(size[0], y + 4)

    def mask(self, size: tuple[int, int], *, plain: float) -> Any:
        """Draw the mask of a frame in one of its forms."""
        if self.chance(0.15):
            return self.rng.choice([None, [], {}, None])
        x1, y1, x2, y2 = self.box(size)
        if self.chance(plain / 2):
            return [[x1, y1, x2, y1, x2, y2 - 0.5, x1, y2]] * self.rng.randint(1, 2)
        pixels = np.zeros(size, np.uint8)
        if not self.chance(0.05):
            pixels[y1:y2, x1:x2] = 1
            pixels[y1, x1] = self.rng.randint(0, 1)
        rle = dict(masks.encode(pixels))
        if self.chance(plain):
            runs = rle_numpy.text_to_runs(rle["counts"].encode(), pixels.size).tolist()
            rle["counts"] = [*runs, 0] if self.chance(0.1) else runs
        if self.chance(0.1):
            rle["note"] = ["}", {"counts": "]"}]
        return rle

    def track(self, videos: list[dict[str, Any]], *, plain: float) -> dict[str, Any]:
        """Draw what annotations and results share."""
        video = self.rng.choice(videos)
        size = (video["height"], video["width"])
        if self.rarely(0.05):
            size = (size[0] + 1, size[1])
        length = video["length"] + (self.rng.choice([-1, 1]) if self.rarely(0.05) else 0)
        category = self.rng.choice([3, 1, 8])
        return {
            "video_id": video["id"] if self.chance(0.9) else float(video["id"]),
            "category_id": 5 if self.rarely(0.1) else category,
            "segmentations": [self.mask(size, plain=plain) for _ in range(length)],
        }

    def annotation(self, number: int, videos: list[dict[str, Any]]) -> dict[str, Any]:
        """Draw an annotation."""
        row = self.track(videos, plain=0.3)
        row["id"] = 0 if self.rarely(0.05) else number
        if self.rarely(0.05):
            row["video_id"] = 99
        row["iscrowd"] = self.rng.choice([0, 0, 0, 1, False, True, None, 0.0])
        sizes = [0, None, 3.7, 128**2, 128.0**2, 2e4, 65536, 1e5, 0.1]
        if not self.rarely(0.1):
            row["areas"] = [self.rng.choice(sizes) for _ in range(self.rng.randint(0, 40))]
        if self.chance(0.1):
            row["pmvis"] = {"track_id": 3, "supervision": "box", "lineage": {}, "x": None}
        row["occlusion"] = [self.rng.choice(LEVELS) for _ in row["segmentations"]]
        if self.rarely(0.05):
            row["occlusion"] = self.rng.choice([None, [], ["much"], [1], "no"])
        row["bboxes"] = [[1.5, 2e3, -0.0, 1e-3], None]
        return row

    def files(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Draw ground truth and results."""
        videos = [
            {"id": number, "height": SIZE[0], "width": SIZE[1], "length": self.rng.randint(1, 3)}
            for number in self.rng.sample(range(1, 9), 3)
        ]
        truth = {
            "info": {"pmvis": {"lineage": [1]}, "ü": "é\n\u2028\U0001f600"},
            "videos": videos + (videos[:1] if self.rarely(0.05) else []),
            "annotations": [self.annotation(n + 1, videos) for n in range(self.rng.randint(0, 8))],
            "categories": [{"id": n, "name": f'c{n} \\ "ß"'} for n in (8, 1, 3)],
        }
        if truth["annotations"] and self.rarely(0.1):
            truth["annotations"].append(dict(self.rng.choice(truth["annotations"]), video_id=1))
        results = []
        for _ in range(self.rng.randint(0, 14)):
            row = self.track(videos, plain=0.2 if self.rarely(0.1) else 0.0)
            row["score"] = self.rng.choice([0, 1, -0.0, 0.1, 0.30000000000000004, 1e-3, 2.5e1])
            if self.chance(0.1):
                row["areas"] = [1, None]
            results.append(row)
        if self.rarely(0.05):
            results = results * 12  # more than a hundred of one video and category
        return truth, results


class Writer:
    """Writes JSON in any of its spellings."""

    def __init__(self, rng: random.Random) -> None:
        """Choose how often what happens."""
        self.rng = rng
        self.loose = rng.random() < 0.5
        self.escapes = rng.choice([0.0, 0.0, 0.1])

    def text(self, value: Any) -> str:
        """Return a value as JSON."""
        if isinstance(value, dict):
            items = list(value.items())
            if self.loose:
                self.rng.shuffle(items)
                if items and self.rng.random() < 0.003:  # the last of equal keys counts
                    items.insert(0, (self.rng.choice(items)[0], self.rng.choice([None, 7, "x"])))
            entries = [
                f"{self.text(k)}{self.space()}:{self.space()}{self.text(v)}" for k, v in items
            ]
            return self.wrapped("{", entries, "}")
        if isinstance(value, list):
            return self.wrapped("[", [self.text(entry) for entry in value], "]")
        if isinstance(value, str):
            return self.string(value)
        return json.dumps(value)

    def wrapped(self, opening: str, entries: list[str], closing: str) -> str:
        """Return entries between brackets."""
        joined = f"{self.space()},{self.space()}".join(entries)
        return f"{opening}{self.space()}{joined}{self.space()}{closing}"

    def space(self) -> str:
        """Return no space or some."""
        return self.rng.choice(["", "", " ", "\n", "\t \r"]) if self.loose else ""

    def string(self, value: str) -> str:
        """Return a string, some of its characters escaped though they need not be."""
        plain = json.dumps(value, ensure_ascii=self.rng.random() < 0.5)
        if not self.escapes:
            return plain
        return (
            "".join(
                f"\\u{ord(c):04x}" if c.isalnum() and self.rng.random() < self.escapes else c
                for c in plain
            )
            if "\\" not in plain and value not in KEYS
            else plain
        )


KEYS = set(
    "video_id category_id score segmentations id iscrowd areas size counts videos annotations "
    "categories pmvis occlusion supervision track_id lineage box height width length info note "
    "bboxes x name no_occlusion slight_occlusion severe_occlusion".split()
)


def write(folder: Path, seed: int) -> tuple[Path, Path]:
    """Draw files and write them."""
    drawn = Drawn(seed)
    truth, results = drawn.files()
    writer = Writer(drawn.rng)
    paths = folder / "truth.json", folder / "results.json"
    paths[0].write_text(writer.text(truth), encoding="utf-8")
    paths[1].write_text(writer.text(results) + writer.space(), encoding="utf-8")
    return paths
