"""The operators' schemas, the libraries that carry them, and the choice between those.

Schemas are defined here, so that torch knows every operator whether or not a compiler was at hand.
When this module is imported, ``_C.so`` adds the kernels for CPUs, and where torch has CUDA
``_C_cuda.so`` those for GPUs; without the latter cupy compiles the same text on use (see `jit`).
``PMVIS_NATIVE``, read once, says what may carry a call:

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
import importlib.util
import os
from typing import Any, Literal, NamedTuple, get_args

import torch

from pmvis_core import native
from pmvis_core.errors import ResourceError, UsageError
from pmvis_core.ops import jit, jit_windows

Backend = Literal["compiled", "jit", "torch"]
"""What carries a call."""
SCHEMA_VERSION = 3
"""Of the schemas below; csrc/ops/common/stable_tensor.h names the same."""
SCHEMAS = {
    "clip_pairs": (
        "(Tensor colours, Tensor patches, Tensor video_index, Tensor cells, Tensor shifts, "
        "Tensor steps, float threshold, float patch_weight) -> Tensor"
    ),
    "clip_terms": (
        "(Tensor logits, Tensor pairs, Tensor shifts, Tensor steps, bool with_gradient) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "deformable_attention": (
        "(Tensor value, Tensor shapes, Tensor locations, Tensor weights) -> Tensor"
    ),
    "deformable_attention_backward": (
        "(Tensor grad, Tensor value, Tensor shapes, Tensor locations, Tensor weights, "
        "Tensor bound) -> (Tensor, Tensor, Tensor)"
    ),
    "lab_means": "(Tensor images, int stride, int block) -> Tensor",
    "fused_deformable_attention": (
        "(Tensor value, Tensor shapes, Tensor references, Tensor offsets, Tensor logits, "
        "Tensor padding) -> Tensor"
    ),
    "fused_deformable_attention_backward": (
        "(Tensor grad, Tensor value, Tensor shapes, Tensor references, Tensor offsets, "
        "Tensor logits, Tensor padding, Tensor bound, bool with_references) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "lab_similarity": "(Tensor images, int kernel, int dilation) -> Tensor",
    "local_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor bias, int height, int width) "
        "-> (Tensor, Tensor)"
    ),
    "local_attention_backward": (
        "(Tensor grad, Tensor grad_weights, Tensor query, Tensor key, Tensor value, "
        "Tensor weights, int height, int width) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "mask_events": (
        "(Tensor logits, Tensor rows, Tensor columns, int height, int width, float threshold, "
        "bool changes) -> (Tensor, Tensor)"
    ),
    "mask_extents": "(Tensor words) -> Tensor",
    "mask_overlaps": "(Tensor words, Tensor others) -> Tensor",
    "mask_pack": "(Tensor masks) -> Tensor",
    "mask_places": "(Tensor words, Tensor starts, int number, int height) -> Tensor",
    "pairwise_terms": (
        "(Tensor logits, Tensor similarity, Tensor image_index, Tensor cells, Tensor valid, "
        "float threshold, int dilation, bool with_gradient) -> (Tensor, Tensor, Tensor)"
    ),
}
"""Operator -> its schema in torch's language."""
_OPERATIONS = (
    "deformable_attention",
    "fused_deformable_attention",
    "local_attention",
    "lab_similarity",
    "pairwise_loss",
    "clip_pairwise_loss",
    "logits_to_rle",
)
"""What `status` speaks of."""
_GPU_OPERATIONS = (*_OPERATIONS, "mask_stack")
"""The same on a GPU; on a CPU stacks of masks are plain torch's work."""
_CUDA_FILE = "_C_cuda.so"
_HOW_TO_BUILD = (
    "`_C_cuda.so` was not built: install pmvis where nvcc is, with "
    "`-C cmake.define.PMVIS_WITH_CUDA=ON`"
)
_MEANINGS = dict.fromkeys(("", "auto", "on", "1", "true", "yes"), "auto")
_MEANINGS |= dict.fromkeys(("torch", "off", "0", "false", "no"), "torch")
_MEANINGS |= {"compiled": "compiled", "jit": "jit"}


class OpStatus(NamedTuple):
    """What carries an operation, for `pmvis doctor`."""

    name: str
    """The operation and where it runs."""
    state: str
    """``compiled (avx2)``, ``(base)`` or ``(cuda)``, ``jit (cupy)``, or ``torch``."""
    reason: str
    """Where the kernel lies, or why there is none."""


class Library(NamedTuple):
    """The state of a library in this process."""

    loaded: bool
    """Whether its kernels can be called."""
    kind: str
    """The instruction set they were built for, or what compiles them."""
    reason: str
    """Where it lies, or why it is not loaded."""


def status() -> list[OpStatus]:
    """Return what carries each operation, and why."""
    found = []
    for name in _OPERATIONS:
        library = MASKS if name == "logits_to_rle" else CPU
        found.append(_row(f"{name} on the CPU", "compiled", library))
    if torch.cuda.is_available():
        way, library = ("compiled", GPU) if GPU.loaded else ("jit", JIT)
        if not library.loaded:
            library = Library(False, "", f"{GPU.reason}; {JIT.reason}")
        found += [_row(f"{name} on the GPU", way, library) for name in _GPU_OPERATIONS]
    return found


def _row(name: str, way: str, library: Library) -> OpStatus:
    """Say whether a library carries an operation."""
    if library.loaded and WISH != "torch":
        return OpStatus(name, f"{way} ({library.kind})", library.reason)
    return OpStatus(
        name, "torch", "PMVIS_NATIVE asks for torch" if library.loaded else library.reason
    )


def choose(
    name: str,
    backend: Backend | None,
    device: str,
    obstacle: str = "",
    *,
    cpu: Library | None = None,
) -> Backend:
    """Decide what carries a call.

    Args:
        name: the operation, for messages.
        backend: what the caller asks for.
        device: type of the operands' device.
        obstacle: why no kernel can serve this call; empty if one can.
        cpu: the library that carries the operation on the CPU; None for ``_C.so``.

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
    ways = _ways(device, cpu or CPU)
    for way, library in () if obstacle else ways.items():
        if library.loaded and wish in ("auto", way):
            return way
    if wish == "auto":
        return "torch"
    reason = ways[wish].reason if wish in ways else f"there are no such kernels for `{device}`"
    raise ResourceError(
        f"`{name}` cannot run as `{wish}` on `{device}`: {obstacle or reason}",
        "`pmvis doctor` tells what there is; PMVIS_NATIVE=auto takes the best of it",
    )


def operator(name: str) -> Any:
    """Return the operator that a kernel carries."""
    return getattr(torch.ops.pmvis, name).default


def _ways(device: str, cpu: Library) -> dict[Backend, Library]:
    """Return what can carry a call on a device, the best first."""
    if device == "cpu":
        return {"compiled": cpu}
    return {"compiled": GPU, "jit": JIT} if device == "cuda" else {}


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


def _load(file: str, versions: str) -> tuple[ctypes.CDLL | None, str]:
    """Load a library, which tells its schemas' version; say where it lies, or why it does not."""
    path, reason = native.find_library(file)
    if path is None:
        return None, reason
    try:
        torch.ops.load_library(str(path))
        handle = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        return None, f"`{path}` does not load: {error}"
    version = getattr(handle, versions)() if hasattr(handle, versions) else -1
    if version == 0:
        return None, f"torch {torch.__version__} refused the kernels of `{path}`"
    if version != SCHEMA_VERSION:
        return None, f"`{path}` is of another version: install pmvis again"
    return handle, str(path)


def _load_cpu() -> Library:
    """Load ``_C.so``."""
    handle, reason = _load("_C.so", "pmvis_schemas")
    if handle is None:
        return Library(False, "", reason)
    handle.pmvis_isa.restype = ctypes.c_char_p
    return Library(True, handle.pmvis_isa().decode(), reason)


def _load_gpu() -> Library:
    """Load ``_C_cuda.so``, unless other kernels are asked for: only one can carry an operator."""
    if torch.version.cuda is None:
        return Library(False, "cuda", "this torch was built without CUDA")
    if WISH in {"jit", "torch"}:
        return Library(False, "cuda", f"PMVIS_NATIVE asks for {WISH}")
    if native.find_library(_CUDA_FILE)[0] is None:
        return Library(False, "cuda", _HOW_TO_BUILD)
    handle, reason = _load(_CUDA_FILE, "pmvis_cuda_schemas")
    return Library(handle is not None, "cuda", reason)


def _find_jit() -> Library:
    """See whether cupy could compile kernels; it is not imported before it has to."""
    if torch.version.cuda is None:
        return Library(False, "cupy", "this torch was built without CUDA")
    if GPU.loaded or WISH == "torch":
        reason = "the compiled kernels are in use; PMVIS_NATIVE=jit takes these instead"
        return Library(False, "cupy", reason if GPU.loaded else "PMVIS_NATIVE asks for torch")
    if native.find_kernels() is None:
        return Library(False, "cupy", "the text of the kernels is not installed")
    if importlib.util.find_spec("cupy") is None:
        return Library(False, "cupy", "`pip install 'pmvis[cupy]'` compiles kernels on use")
    return Library(True, "cupy", "compiled on first use and kept in cupy's cache")


def _look_at_masks() -> Library:
    """Look at ``_masks.so``, which encodes masks on the CPU."""
    library, reason = native.load_mask_library()
    return Library(library is not None, library.instructions if library else "", reason)


WISH = _wish()
"""What PMVIS_NATIVE asks for: ``auto``, ``compiled``, ``jit`` or ``torch``."""
_FRAGMENT = _define()
CPU = _load_cpu()
"""``_C.so``."""
GPU = _load_gpu()
"""``_C_cuda.so``."""
JIT = _find_jit()
"""Kernels that cupy compiles."""
if JIT.loaded:
    jit.register(_FRAGMENT, jit.KERNELS | jit_windows.KERNELS)
MASKS = _look_at_masks()
"""``_masks.so``, for `logits_to_rle` on the CPU."""
