"""Choosing where networks run."""

from __future__ import annotations

import torch

from pmvis_core.errors import ResourceError


def find_device(name: str) -> torch.device:
    """Return the device called ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.

    Raises:
        ResourceError: it is not on this machine, or the name is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ResourceError(f"no device `{name}`", "use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"device `{name}` is not here: {torch.cuda.device_count()} GPUs are usable",
            "use `--device cpu`, or look at `pmvis doctor`",
        )
    return device
