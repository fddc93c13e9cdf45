"""Stills whose objects tell by their colour who they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pmvis_core import masks

COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (250, 20, 250)]
BACKGROUND = (90, 90, 90)


def draw_stills(folder: Path, count: int = 3, **more: Any) -> Path:
    """Write stills with an object of each flat colour, as PNG; ``more`` goes into the JSON."""
    images, annotations = [], []
    for i in range(count):
        picture = np.full((120, 160, 3), BACKGROUND, np.uint8)
        for k, colour in enumerate(COLOURS):
            box = np.array([10 + 30 * k, 15 + 17 * ((k + i) % 5), 24, 30 + 3 * i])
            x, y, w, h = (int(v) for v in box)
            picture[y : y + h, x : x + w] = colour
            mask = np.zeros((120, 160), np.uint8)
            mask[y : y + h, x : x + w] = 1
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            shape: Any = [polygon] if k % 2 else masks.encode(mask)
            number = len(annotations) + 1
            annotations.append(
                {"id": number, "image_id": i + 1, "category_id": 1, "segmentation": shape}
                | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            )
        cv2.imwrite(str(folder / f"{i}.png"), picture[:, :, ::-1])
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 120, "width": 160})
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    for key, extra in more.items():
        data[key] += extra
    (folder / "stills.json").write_text(json.dumps(data))
    return folder / "stills.json"
