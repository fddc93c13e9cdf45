"""`pmvis convert-weights`: published IDOL checkpoints to our model files, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmvis_cli.console import get_console
from pmvis_cli.infer import Categories

OURS = ".safetensors"
OFFICIAL = ".pth"


def convert_weights(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Run folder, or a file of pmvis or IDOL."),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="`.safetensors`: pmvis's form; `.pth`: IDOL's."),
    ],
    categories: Categories = "",
) -> None:
    """Convert a model between IDOL's published form and ours.

    Examples:
      pmvis convert-weights idol_ytvis21_r50.pth r50.safetensors
      pmvis convert-weights pmvis_ovis.pth ovis.safetensors --categories ovis
      pmvis convert-weights runs/video model_final.pth

    Reads: a run folder, a model of ours, or a checkpoint of IDOL or PM-VIS. Nothing in it is ever
      executed; `pmvis -v` lists what became of its tensors.
    Writes: `.safetensors`: weights, config, thresholds and vocabulary in one file, for `infer
      --weights` and `--init`. `.pth`: `{"model": tensors}` by the published names, aliases
      included, which IDOL's own code loads; for ResNet-50, ResNet-101 and Swin-L.

    next: `pmvis infer --weights DST --frames videos/`
    """
    from pmvis_core.checkpoint import load_model, save_model, save_official
    from pmvis_core.errors import UsageError

    console = get_console()
    if target.suffix not in (OURS, OFFICIAL):
        raise UsageError(
            f"`{target}` ends in neither `{OURS}` (pmvis) nor `{OFFICIAL}` (IDOL)",
            "the ending says which form to write",
        )
    found = load_model(source, categories)
    found.report.tell(console.say, console.detail)
    if target.suffix == OURS:
        weights = found.model.state_dict()
        save_model(target, weights, found.model.config, found.categories, found.tracker)
    else:
        save_official(target, found.model)
    console.say(f"wrote {target}")
