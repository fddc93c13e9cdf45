"""A benchmark of a few pictures, mapped and ready to train on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pmvis_core.synthetic.benchmark import SynthConfig, draw

FEW = SynthConfig(
    mask_stills=12, box_stills=9, val_stills=2, train_videos=3, valid_videos=2, frames=4
)


def draw_tiny(folder: Path) -> Path:
    """Draw into ``folder/synth`` and map into ``folder/maps``."""
    synth = folder / "synth"
    draw(synth, 0, FEW)
    command = [sys.executable, "-m", "pmvis_cli.app", "map-categories"]
    command += ["--target", f"{synth}/target.json", "--coco", f"{synth}/coco/instances_train.json"]
    command += ["--imagenet-bbox", f"{synth}/imagenet/Annotations", "-o", f"{folder}/maps"]
    subprocess.run(command, check=True, capture_output=True)
    return folder
