"""The operators' schemas, the libraries that carry them, and the choice between those.

Schemas are defined here, so that torch knows every operator whether or not a compiler was at hand.
``_C.so`` adds the kernels for CPUs when this module is imported. ``PMVIS_NATIVE``, read once, says
what may carry a call:

| value | meaning |
|---|---|
| ``auto`` or unset | the best there is, and the twin in torch where there is nothing better |
| ``compiled`` | compiled kernels, or an error |
| ``jit`` | on a GPU kernels compiled when first used, or an error; as ``auto`` on the CPU |
| ``torch`` | the twins |
| ``off`` | the twins, and the twins of the mask kernels as well (`native`) |
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Literal, NamedTuple, get_args

import torch

from pmvis_core import native
from pmvis_core.errors import ResourceError, UsageError

Backend = Literal["compiled", "jit", "torch"]
"""What carries a call."""
SCHEMA_VERSION = 2
"""Of the schemas below; csrc/stable_tensor.h names the same."""
SCHEMAS = {
    "deformable_attention": (
        "(Tensor value, Tensor shapes, Tensor locations, Tensor weights) -> Tensor"
    ),
    "deformable_attention_backward": (
        "(Tensor grad, Tensor value, Tensor shapes, Tensor locations, Tensor weights, "
        "Tensor bound) -> (Tensor, Tensor, Tensor)"
    ),
    "lab_similarity": "(Tensor images, int kernel, int dilation) -> Tensor",
    "pairwise_terms": (
        "(Tensor logits, Tensor similarity, Tensor image_index, Tensor cells, Tensor valid, "
        "float threshold, int dilation, bool with_gradient) -> (Tensor, Tensor, Tensor)"
    ),
}
"""Operator -> its schema in torch's language."""
_OPERATIONS = ("deformable_attention", "lab_similarity", "pairwise_loss")
"""What `status` speaks of."""
_MEANINGS = dict.fromkeys(("", "auto", "on", "1", "true", "yes"), "auto")
_MEANINGS |= dict.fromkeys(("torch", "off", "0", "false", "no"), "torch")
_MEANINGS |= {"compiled": "compiled", "jit": "jit"}


class OpStatus(NamedTuple):
    """What carries an operation, for `pmvis doctor`."""

    name: str
    """The operation and where it runs."""
    state: str
    """``compiled (avx2)``, ``compiled (base)`` or ``torch``."""
    reason: str
    """Where the kernel lies, or why there is none."""


class Library(NamedTuple):
    """The state of a library in this process."""

    loaded: bool
    """Whether its kernels can be called."""
    kind: str
    """The instruction set they were built for."""
    reason: str
    """Where it lies, or why it is not loaded."""


def status() -> list[OpStatus]:
    """Return what carries each operation, and why."""
    found = []
    for name in _OPERATIONS:
        carried = CPU.loaded and WISH != "torch"
        state = f"compiled ({CPU.kind})" if carried else "torch"
        reason = CPU.reason if carried or not CPU.loaded else "PMVIS_NATIVE asks for torch"
        found.append(OpStatus(f"{name} on the CPU", state, reason))
    if torch.cuda.is_available():
        reason = "there is no GPU kernel in this version; torch does the work"
        found += [OpStatus(f"{name} on the GPU", "torch", reason) for name in _OPERATIONS]
    return found


def choose(name: str, backend: Backend | None, device: str, obstacle: str = "") -> Backend:
    """Decide what carries a call.

    Args:
        name: the operation, for messages.
        backend: what the caller asks for.
        device: type of the operands' device.
        obstacle: why no kernel can serve this call; empty if one can.

    Raises:
        ValueError: there is no such backend.
        ResourceError: the wish cannot be granted.
    """
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}, expected one of {get_args(Backend)} or None")
    wish = backend or WISH
    if backend is None and wish == "jit" and device == "cpu":
        wish = "auto"
    if wish == "torch":
        return "torch"
    if not obstacle and wish in {"auto", "compiled"} and device == "cpu" and CPU.loaded:
        return "compiled"
    if wish == "auto":
        return "torch"
    raise ResourceError(
        f"`{name}` cannot run as `{wish}` on `{device}`: {obstacle or _reason(wish, device)}",
        "`pmvis doctor` tells what there is; PMVIS_NATIVE=auto takes the best of it",
    )


def operator(name: str) -> Any:
    """Return the operator that a kernel carries."""
    return getattr(torch.ops.pmvis, name).default


def _reason(wish: str, device: str) -> str:
    """Say why a backend is not there."""
    if device == "cpu":
        return CPU.reason if wish == "compiled" else "kernels are compiled on use for GPUs only"
    return "there is no kernel for this device in this version"


def _wish() -> str:
    """Read PMVIS_NATIVE."""
    value = os.environ.get("PMVIS_NATIVE", "").lower()
    if value not in _MEANINGS:
        raise UsageError(
            f"PMVIS_NATIVE is `{value}`, expected `auto`, `compiled`, `jit`, `torch` or `off`"
        )
    return _MEANINGS[value]


def _define() -> Any:
    """Define the operators; they live as long as what is returned."""
    fragment = torch.library.Library("pmvis", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        fragment.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    return fragment


def _load_cpu() -> Library:
    """Load ``_C.so``."""
    path, reason = native.find_library("_C.so")
    if path is None:
        return Library(False, "", reason)
    try:
        torch.ops.load_library(str(path))
        handle = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        return Library(False, "", f"`{path}` does not load: {error}")
    version = handle.pmvis_schemas() if hasattr(handle, "pmvis_schemas") else -1
    if version == 0:
        return Library(False, "", f"torch {torch.__version__} refused the kernels of `{path}`")
    if version != SCHEMA_VERSION:
        return Library(False, "", f"`{path}` is of another version: install pmvis again")
    handle.pmvis_isa.restype = ctypes.c_char_p
    return Library(True, handle.pmvis_isa().decode(), str(path))


WISH = _wish()
"""What PMVIS_NATIVE asks for: ``auto``, ``compiled``, ``jit`` or ``torch``."""
_FRAGMENT = _define()
CPU = _load_cpu()
"""``_C.so``."""
