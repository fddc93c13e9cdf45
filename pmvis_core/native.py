"""The compiled libraries: where they lie, and the mask kernels of ``_masks.so`` through ctypes.

``_masks.so`` is plain C ABI and loads without torch; ``_C.so`` (see `ops`) needs torch. Both are
looked for in ``PMVIS_LIB_DIR`` and beside this package; ``PMVIS_NATIVE=off`` turns them off.
Either may be absent: then the twins in numpy and torch do the same work.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import pmvis_core
from pmvis_core import rle_numpy
from pmvis_core.types import Box

Ints = NDArray[np.int64]

_NO_MEMORY = -2


class MaskKernels(Protocol):
    """What `masks` asks of its kernels; see `rle_numpy` for arguments and results."""

    def encode(self, masks: NDArray[np.uint8], /) -> list[str]:
        """Encode (N, H, W) masks."""

    def decode(self, counts: Sequence[bytes], out: NDArray[np.uint8], cleared: bool, /) -> None:
        """Decode into (N, H, W)."""

    def areas(self, counts: Sequence[bytes], height: int, width: int, /) -> Ints:
        """Return (N,) areas."""

    def boxes(self, counts: Sequence[bytes], height: int, width: int, /) -> list[Box]:
        """Return N xyxy boxes."""

    def merge(self, counts: Sequence[bytes], height: int, width: int, intersect: bool, /) -> str:
        """Return the union or intersection."""

    def intersections(
        self, first: Sequence[bytes], second: Sequence[bytes], height: int, width: int, /
    ) -> Ints:
        """Return (D, G) common areas."""

    def track_overlap(
        self, first: Sequence[bytes], second: Sequence[bytes], pixels: Sequence[int], /
    ) -> tuple[int, int]:
        """Return summed intersection and union."""


class MaskLibrary:
    """The kernels of ``_masks.so``: `rle_numpy`'s functions, compiled."""

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            OSError: it does not load.
            AttributeError: it is another version's.
        """
        library = ctypes.CDLL(str(path))
        pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        text = ctypes.c_char_p
        self._encode = _function(
            library, "encode", [pointer, number, number, number, flag, pointer, pointer]
        )
        self._decode = _function(
            library, "decode", [text, pointer, number, number, number, flag, pointer]
        )
        self._areas = _function(library, "areas", [text, pointer, number, number, pointer])
        self._boxes = _function(library, "boxes", [text, pointer, number, number, number, pointer])
        self._merge = _function(
            library, "merge", [text, pointer, number, number, flag, pointer, pointer]
        )
        self._intersections = _function(
            library,
            "intersections",
            [text, pointer, number, text, pointer, number, number, pointer],
        )
        self._track_overlap = _function(
            library, "track_overlap", [text, pointer, text, pointer, number, pointer, pointer]
        )
        self._free = library.pmvis_free
        self._free.argtypes, self._free.restype = [ctypes.c_void_p], None

    def encode(self, masks: NDArray[np.uint8]) -> list[str]:
        """Encode (N, H, W) uint8 masks, foreground where nonzero, without transposing."""
        number, height, width = masks.shape
        by_columns = not masks.flags.c_contiguous and masks.transpose(0, 2, 1).flags.c_contiguous
        if not by_columns:
            masks = np.ascontiguousarray(masks)
        lengths = np.empty(number, dtype=np.int64)
        out = ctypes.c_void_p()
        done = self._encode(
            masks.ctypes.data,
            number,
            height,
            width,
            by_columns,
            ctypes.byref(out),
            lengths.ctypes.data,
        )
        _raise_if_no_memory(done)
        text = self._take(out, int(lengths.sum()))
        ends = np.cumsum(lengths).tolist()
        return [text[end - n : end] for end, n in zip(ends, lengths.tolist(), strict=True)]

    def decode(self, counts: Sequence[bytes], out: NDArray[np.uint8], cleared: bool) -> None:
        """Write each mask into its row of ``out``, (N, H, W) uint8 in C order."""
        number, height, width = out.shape
        lengths = _lengths(counts)
        bad = self._decode(
            b"".join(counts), lengths, number, height, width, cleared, out.ctypes.data
        )
        _explain(bad, counts, height * width)

    def areas(self, counts: Sequence[bytes], height: int, width: int) -> Ints:
        """Return (N,) int64 numbers of foreground pixels."""
        areas = (ctypes.c_int64 * len(counts))()
        lengths = _lengths(counts)
        bad = self._areas(b"".join(counts), lengths, len(counts), height * width, areas)
        _explain(bad, counts, height * width)
        return np.array(areas[:], dtype=np.int64)

    def boxes(self, counts: Sequence[bytes], height: int, width: int) -> list[Box]:
        """Return xyxy boxes with an exclusive far edge; zeros where a mask is empty."""
        boxes = (ctypes.c_int64 * (4 * len(counts)))()
        lengths = _lengths(counts)
        bad = self._boxes(b"".join(counts), lengths, len(counts), height, width, boxes)
        _explain(bad, counts, height * width)
        edges = iter(map(float, boxes[:]))
        return list(zip(edges, edges, edges, edges, strict=True))

    def merge(self, counts: Sequence[bytes], height: int, width: int, intersect: bool) -> str:
        """Return the union (or intersection) of N >= 1 masks."""
        lengths = _lengths(counts)
        out, length = ctypes.c_void_p(), ctypes.c_int64()
        bad = self._merge(
            b"".join(counts),
            lengths,
            len(counts),
            height * width,
            intersect,
            ctypes.byref(out),
            ctypes.byref(length),
        )
        _explain(bad, counts, height * width)
        return self._take(out, length.value)

    def intersections(
        self, first: Sequence[bytes], second: Sequence[bytes], height: int, width: int
    ) -> Ints:
        """Return the (D, G) int64 matrix of common foreground pixels."""
        common = np.empty((len(first), len(second)), dtype=np.int64)
        first_lengths, second_lengths = _lengths(first), _lengths(second)
        bad = self._intersections(
            b"".join(first),
            first_lengths,
            len(first),
            b"".join(second),
            second_lengths,
            len(second),
            height * width,
            common.ctypes.data,
        )
        _explain(bad, [*first, *second], height * width)
        return common

    def track_overlap(
        self, first: Sequence[bytes], second: Sequence[bytes], pixels: Sequence[int]
    ) -> tuple[int, int]:
        """Return the summed intersection and union of frames that both tracks hold."""
        sizes = (ctypes.c_int64 * len(pixels))(*pixels)
        sums = (ctypes.c_int64 * 2)()
        first_lengths, second_lengths = _lengths(first), _lengths(second)
        bad = self._track_overlap(
            b"".join(first),
            first_lengths,
            b"".join(second),
            second_lengths,
            len(sizes),
            sizes,
            sums,
        )
        if bad != -1:
            _raise_if_no_memory(bad)
            frame, which = divmod(bad, 2)
            rle_numpy.text_to_runs((first, second)[which][frame], sizes[frame])
            raise RuntimeError("the compiled mask kernels and their twin disagree")
        return sums[0], sums[1]

    def _take(self, out: ctypes.c_void_p, length: int) -> str:
        """Copy a text that the library allocated, and free it."""
        try:
            return ctypes.string_at(out, length).decode("ascii")
        finally:
            self._free(out)


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
    return None, f"`{name}` was not built (no C++ compiler when pmvis was installed?)"


def mask_library() -> MaskLibrary | None:
    """Return the compiled mask kernels, or None where they are absent."""
    return load_mask_library()[0]


@functools.cache
def load_mask_library() -> tuple[MaskLibrary | None, str]:
    """Load ``_masks.so`` once; return it, or None, and where it lies or why not."""
    path, reason = find_library("_masks.so")
    if path is None:
        return None, reason
    try:
        return MaskLibrary(path), reason
    except (OSError, AttributeError) as error:
        return None, f"`{path}` does not load: {error}"


def _function(library: ctypes.CDLL, name: str, arguments: list[Any]) -> Any:
    """Return a function of the library with its types declared."""
    function = getattr(library, f"pmvis_rle_{name}")
    function.argtypes = arguments
    function.restype = ctypes.c_int64
    return function


def _lengths(counts: Sequence[bytes]) -> ctypes.Array[ctypes.c_int64]:
    """Return N lengths; for the usual one or few texts this is faster than an array of numpy's."""
    return (ctypes.c_int64 * len(counts))(*map(len, counts))


def _explain(bad: int, counts: Sequence[bytes], pixels: int) -> None:
    """Let the twin say what is wrong with the first malformed text, if there is one."""
    if bad == -1:
        return
    _raise_if_no_memory(bad)
    rle_numpy.text_to_runs(counts[bad], pixels)
    raise RuntimeError("the compiled mask kernels and their twin disagree")


def _raise_if_no_memory(code: int) -> None:
    """Raise MemoryError if the library says so."""
    if code == _NO_MEMORY:
        raise MemoryError("the mask kernels ran out of memory")
