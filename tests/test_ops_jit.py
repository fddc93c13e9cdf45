"""Kernels compiled on use: the text passes NVRTC, and what launches them gives what C++ does."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pmvis_core import ops
from pmvis_core.errors import ResourceError
from pmvis_core.ops import deformable, fused_deformable, jit, jit_windows, library
from pmvis_core.ops.local_attention import _MAX_SIDE as MOST_WINDOW
from tests import (
    test_ops,
    test_ops_clip_pairwise,
    test_ops_fused,
    test_ops_local_emulated,
    test_ops_masks,
    test_ops_pairwise,
)
from tests.emulated import CSRC, TEXTS, Launcher, needs_compiler, operators

FORWARD = ["float, 4, 8", "float, 1, 32", "pmvis::Bfloat, 8, 4", "pmvis::Half, 8, 8"]
BACKWARD = ["float, float, 4, 8", "float, float, 1, 32", "float, long long, 4, 8"]
BACKWARD += ["pmvis::Bfloat, float, 4, 8", "pmvis::Half, float, 4, 16"]
WORDS = ["false", "true"]
ROUND = ["float, long long", "pmvis::Bfloat, float", "pmvis::Half, float"]
OTHERS = ["lab_similarity", "asked_neighbours", "pairwise_tiles<float>", "pairwise_sums<float>"]
OTHERS += ["lab_means", "clip_pairs", "clip_tiles<float>"]
OTHERS += ["mask_events", "mask_places", "mask_pack", "mask_extents", "mask_overlaps"]
KERNELS = [
    *(f"pmvis::deformable_forward<{types}, {fused}>" for types in FORWARD for fused in WORDS),
    *(f"pmvis::deformable_backward<{types}, {fused}>" for types in BACKWARD for fused in WORDS),
    *(f"pmvis::deformable_round<{types}>" for types in ROUND),
    *(f"pmvis::{name}" for name in OTHERS),
    *test_ops_local_emulated.KERNELS,
]


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Python that launches kernels run them on the CPU."""
    monkeypatch.setattr(jit, "launch", Launcher(KERNELS, tmp_path))


def attention_call(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the operator's operands."""
    call = test_ops.make_call(channels, torch.float32)
    value, levels, locations, weights = (t if isinstance(t, list) else t.detach() for t in call)
    return value.to(dtype), torch.tensor(levels), locations, weights


@needs_compiler
@pytest.mark.parametrize(
    "channels, dtype",
    [(32, torch.float32), (5, torch.float32), (32, torch.bfloat16), (64, torch.float16)],
)
def test_attention_is_that_of_the_launchers_in_cpp(emulated, channels, dtype):
    call = attention_call(channels, dtype)
    output = jit.deformable_attention(*call)
    assert torch.equal(output, operators().deformable_attention(*call))
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    bounds = [torch.empty(0)]
    if (channels, dtype) == (32, torch.float32):
        bounds.append(deformable.largest_sum(grad, call[3]))
    for bound in bounds:
        mine = jit.deformable_attention_backward(grad, *call, bound)
        theirs = operators().deformable_attention_backward(grad, *call, bound)
        for one, other in zip(mine, theirs, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@needs_compiler
@pytest.mark.parametrize(
    "channels, dtype", [(32, torch.float32), (5, torch.float32), (32, torch.bfloat16)]
)
@pytest.mark.parametrize("size", [2, 4])
def test_fused_attention_is_that_of_the_launchers_in_cpp(emulated, channels, dtype, size):
    for padded in (False, True):
        call = test_ops_fused.make_call(channels, size, padded=padded)
        operands = call.to(torch.float32, value=dtype).operands
        output = jit.fused_deformable_attention(*operands)
        assert torch.equal(output, operators().fused_deformable_attention(*operands))
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        bounds = [torch.empty(0)]
        if (channels, dtype) == (32, torch.float32):
            bounds.append(fused_deformable.largest_fused_sum(grad, operands[4]))
        for bound in bounds:
            mine = jit.fused_deformable_attention_backward(grad, *operands, bound, padded)
            theirs = operators().fused_deformable_attention_backward(grad, *operands, bound, padded)
            for one, other in zip(mine, theirs, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


@needs_compiler
def test_similarity_and_loss_are_those_of_the_launchers_in_cpp(emulated):
    images = test_ops_pairwise.photo(2, 35, 47)
    assert torch.equal(jit.lab_similarity(images, 3, 2), operators().lab_similarity(images, 3, 2))
    call = test_ops_pairwise.make_call(20, 45, torch.float32)
    cells = ops.box_cells(call.boxes, 20, 45)
    for valid in (call.valid, torch.empty(0, dtype=torch.bool)):
        for with_gradient in (True, False):
            operands = (*call[:3], cells, valid, call.threshold, 2, with_gradient)
            mine, theirs = jit.pairwise_terms(*operands), operators().pairwise_terms(*operands)
            assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


@needs_compiler
@pytest.mark.parametrize("patches", [False, True])
def test_clips_are_those_of_the_launchers_in_cpp(emulated, patches):
    images = test_ops_pairwise.photo(2, 35, 47)
    assert torch.equal(jit.lab_means(images, 4, 2), operators().lab_means(images, 4, 2))
    clips = test_ops_clip_pairwise.make_clips(9, 37, patches=patches)
    operands = test_ops_clip_pairwise.operands(clips)
    pairs = jit.clip_pairs(*operands)
    assert torch.equal(pairs, operators().clip_pairs(*operands))
    for with_gradient in (True, False):
        call = (clips.logits.float(), pairs, clips.shifts, operands[5], with_gradient)
        mine, theirs = jit.clip_terms(*call), operators().clip_terms(*call)
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


@needs_compiler
def test_masks_are_those_of_the_launchers_in_cpp(emulated):
    logits = test_ops_masks.blobs(2, 20, 30)
    nothing = torch.empty(0, dtype=torch.int32)
    picks = [torch.arange(3, 76, 2, dtype=torch.int32), torch.arange(90, dtype=torch.int32)]
    for rows, columns, changes in ((*picks, True), (nothing, nothing, False)):
        call = (logits, rows, columns, 77, 90, 0.1, changes)
        for mine, theirs in zip(
            jit.mask_events(*call), operators().mask_events(*call), strict=True
        ):
            assert torch.equal(mine, theirs)
    words, counts = jit.mask_events(logits, nothing, nothing, 77, 90, 0.1, True)
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    number = int(counts.sum())
    assert torch.equal(
        jit.mask_places(words, starts, number, 77),
        operators().mask_places(words, starts, number, 77),
    )
    dense = logits > 0.1
    stack = jit.mask_pack(dense)
    assert torch.equal(stack, operators().mask_pack(dense))
    assert torch.equal(jit.mask_extents(stack), operators().mask_extents(stack))
    pair = (stack, stack[:1].contiguous())
    assert torch.equal(jit.mask_overlaps(*pair), operators().mask_overlaps(*pair))


@needs_compiler
def test_nothing_to_do_launches_nothing(emulated, monkeypatch: pytest.MonkeyPatch):
    value, shapes, locations, weights = attention_call(32, torch.float32)
    empty = (value[:0], shapes, locations[:0], weights[:0])
    assert jit.deformable_attention(*empty).shape == (0, 6, 96)
    grads = jit.deformable_attention_backward(torch.empty(0, 6, 96), *empty, torch.empty(0))
    assert [grad.shape[0] for grad in grads] == [0, 0, 0]
    nothing = torch.empty(0, dtype=torch.int32)
    events = jit.mask_events(torch.zeros(0, 3, 4), nothing, nothing, 6, 8, 0.0, True)
    assert events[0].shape == (0, 8, 1)
    assert jit.mask_extents(events[0]).shape == (0, 5)
    assert jit.mask_overlaps(events[0], events[0]).shape == (0, 0)


@pytest.mark.parametrize("architecture", ["compute_75", "sm_90"])
def test_the_text_passes_nvrtc(architecture: str):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    lines = [f'#include "{text}"' for text in TEXTS]
    try:
        error, program = nvrtc.nvrtcCreateProgram("\n".join(lines).encode(), b"all.cu", 0, [], [])
    except RuntimeError as problem:
        pytest.skip(f"NVRTC does not load: {problem}")
    for kernel in KERNELS:
        nvrtc.nvrtcAddNameExpression(program, kernel.encode())
    options = [
        b"-std=c++17",
        f"-I{CSRC}".encode(),
        f"--gpu-architecture={architecture}".encode(),
    ]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * (size + 1)  # NVRTC writes into it, and Python shares bytes of length 1
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    for kernel in KERNELS:
        assert nvrtc.nvrtcGetLoweredName(program, kernel.encode())[0] == 0


def test_the_limits_of_the_text_are_those_of_python():
    text = "".join((CSRC / text).read_text() for text in TEXTS)
    numbers = {
        "kThreads": jit._THREADS,
        "kQueries": jit._QUERIES,
        "kMaxLevels": jit._LEVELS,
        "kTileWidth": jit._TILE[0],
        "kColourRows": jit._COLOUR_ROWS,
        "kStripsOfBlock": jit._STRIPS,
        "kFold": jit._FOLD,
        "kCells": jit_windows._CELLS,
        "kScorers": jit_windows._SCORERS,
        "kMaxWindow": MOST_WINDOW,
        "kMaxSide": deformable._MAX_SIDE,
        "kMaxSteps": jit._STEPS,
        "kMaxColourReach": ops.pairwise._MAX_REACH["cuda"],
        "kMaxPairDilation": ops.pairwise._MAX_DILATION["cuda"],
    }
    for name, number in numbers.items():
        assert f"{name} = {number};" in text or f"{name} = {number}," in text, name
    assert deformable._MAX_LEVELS == jit._LEVELS


def test_what_cupy_cannot_compile_is_named(monkeypatch: pytest.MonkeyPatch):
    class Broken:
        """Stands in for cupy."""

        @staticmethod
        def RawModule(**_: object) -> None:
            raise RuntimeError("no nvrtc")

    monkeypatch.setitem(__import__("sys").modules, "cupy", Broken)
    with pytest.raises(ResourceError, match=r"cupy cannot compile `pmvis::x`.*no nvrtc"):
        jit._function.__wrapped__("a.cuh", "pmvis::x", 0)


def test_arguments_are_as_kernels_declare_them():
    tensor = torch.zeros(2)
    assert jit._number(tensor) == tensor.data_ptr()
    assert jit._number(None) == 0
    assert ctypes.sizeof(ctypes.c_void_p) == jit._number(None).itemsize
    assert isinstance(jit._number(np.float32(1)), np.float32)


def test_jit_gives_way_to_compiled_kernels_and_wishes():
    assert not (library.GPU.loaded and library.JIT.loaded)
    assert library.JIT.reason
    assert library.GPU.reason
