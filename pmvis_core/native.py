"""The compiled libraries: where they lie, and what ``_masks.so`` offers.

``_masks.so`` is a Python extension that needs neither torch nor numpy; ``_C.so`` (see `ops`) needs
torch. Both are looked for in ``PMVIS_LIB_DIR`` and beside this package; ``PMVIS_NATIVE=off`` turns
them off. Either may be absent: then the twins in numpy and torch do the same work.

    library, reason = load_mask_library()
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import pmvis_core
from pmvis_core.types import RLE, Box

MASKS_VERSION = 1
"""Of the functions of ``_masks.so``; csrc/masks/module.cpp names the same."""


class MaskLibrary(Protocol):
    """The functions of ``_masks.so`` (csrc/masks/module.cpp); `masks` is their caller.

    Each takes what is usual (plain dicts with whole sizes, lists or tuples of them, uint8 or bool
    arrays) and returns None for everything else, malformed or not: the caller then asks
    `rle_numpy`, which answers or raises. None of them raises but for want of memory.
    """

    instructions: str
    """What the library uses of this processor: ``avx2`` or ``base``."""

    def encode(self, array: Any, /) -> Any:
        """Return the RLE of (H, W) pixels, a list of them for (N, H, W)."""

    def decode(
        self,
        rles: Sequence[RLE],
        out: Any,
        height: int,
        width: int,
        x1: int,
        y1: int,
        x2: int,
        y2: int,
        /,
    ) -> Literal[True] | None:
        """Write the box of N masks into (N, y2 - y1, x2 - x1) bytes."""

    def area(self, rle: RLE, /) -> int | None:
        """Return the foreground pixels."""

    def box(self, rle: RLE, /) -> Box | None:
        """Return the xyxy box."""

    def areas(self, rles: Sequence[RLE | None], /) -> list[int | None] | None:
        """Return foreground pixels, None for None."""

    def boxes(self, rles: Sequence[RLE | None], /) -> list[Box | None] | None:
        """Return xyxy boxes, None for None."""

    def faulty(self, rles: Sequence[RLE | None], first: int, /) -> int | None:
        """Return the next index that is neither None nor a usual mask, -1 if there is none."""

    def merge(self, rles: Sequence[RLE], intersect: bool, /) -> RLE | None:
        """Return union or intersection."""

    def iou(
        self, dts: Sequence[RLE], gts: Sequence[RLE], crowd: bytes | None, out: Any, /
    ) -> Literal[True] | None:
        """Write IoUs into (D, G) float64."""

    def track_overlaps(
        self,
        dts: Sequence[Sequence[RLE | None]],
        gts: Sequence[Sequence[RLE | None]],
        inter: Any,
        union: Any,
        /,
    ) -> Literal[True] | None:
        """Add common and joint pixels of tracks to two (D, G) int64 arrays."""

    def from_polygons(
        self, polygons: Sequence[Sequence[float]], height: int, width: int, /
    ) -> RLE | None:
        """Return the union of one polygon or more."""

    def from_runs(self, counts: Sequence[int], height: int, width: int, /) -> RLE | None:
        """Return the mask of plain runs."""

    def to_runs(self, rle: RLE, /) -> list[int] | None:
        """Return plain runs."""


def find_library(name: str) -> tuple[Path | None, str]:
    """Look for a compiled library.

    Args:
        name: its file name.

    Returns:
        Its path, or None, and why.
    """
    if os.environ.get("PMVIS_NATIVE", "").lower() in {"off", "0", "false", "no"}:
        return None, "turned off by PMVIS_NATIVE"
    # An editable install keeps the libraries in site-packages and the sources elsewhere; both are
    # in the package's path.
    for folder in (os.environ.get("PMVIS_LIB_DIR"), *pmvis_core.__path__):
        if folder and (path := Path(folder) / name).is_file():
            return path, str(path)
    how = "install a C++ compiler (g++ or clang++), then pmvis again"
    return None, f"`{name}` was not built: {how}"


def find_kernels() -> Path | None:
    """Return the folder below which the text of the GPU kernels (``*.cuh``) lies, or None."""
    folders = [Path(folder) / "kernels" for folder in pmvis_core.__path__]
    folders += [Path(folder).parent / "csrc" for folder in pmvis_core.__path__]
    shared = "ops/common/device.cuh"
    return next((folder for folder in folders if (folder / shared).is_file()), None)


def mask_library() -> MaskLibrary | None:
    """Return the compiled mask operations, or None where they are absent."""
    return load_mask_library()[0]


@functools.cache
def load_mask_library() -> tuple[MaskLibrary | None, str]:
    """Load ``_masks.so`` once; return it, or None, and where it lies or why not."""
    path, reason = find_library("_masks.so")
    if path is None:
        return None, reason
    try:
        library = _load(path)
    except ImportError as error:
        return None, f"`{path}` does not load: {error}"
    # One that does not tell its version is of another, too.
    if getattr(library, "version", -1) != MASKS_VERSION:
        return None, f"`{path}` is of another version: install pmvis again"
    return library, reason


def _load(path: Path) -> MaskLibrary:
    """Load an extension module from a file of any folder."""
    loader = ExtensionFileLoader("_masks", str(path))
    spec = importlib.util.spec_from_loader("_masks", loader)
    assert spec is not None  # a loader was given
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return cast(MaskLibrary, module)
