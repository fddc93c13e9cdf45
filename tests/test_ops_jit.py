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
from pmvis_core.ops import deformable, jit, library
from tests import test_ops, test_ops_masks, test_ops_pairwise
from tests.emulated import ROOT, Launcher, needs_compiler, operators

FORWARD = ["float, 4, 8", "float, 1, 32", "pmvis::Bfloat, 8, 4", "pmvis::Half, 8, 8"]
BACKWARD = ["float, float, 4, 8", "float, float, 1, 32", "float, long long, 4, 8"]
BACKWARD += ["pmvis::Bfloat, float, 4, 8", "pmvis::Half, float, 4, 16"]
ROUND = ["float, long long", "pmvis::Bfloat, float", "pmvis::Half, float"]
OTHERS = ["lab_similarity", "asked_neighbours", "pairwise_tiles<float>", "pairwise_sums<float>"]
OTHERS += ["mask_events", "mask_places"]
KERNELS = [
    *(f"pmvis::deformable_forward<{types}>" for types in FORWARD),
    *(f"pmvis::deformable_backward<{types}>" for types in BACKWARD),
    *(f"pmvis::deformable_round<{types}>" for types in ROUND),
    *(f"pmvis::{name}" for name in OTHERS),
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
def test_masks_are_those_of_the_launchers_in_cpp(emulated):
    logits = test_ops_masks.blobs(2, 20, 30)
    words, counts = jit.mask_events(logits, 77, 90, 0.1)
    for mine, theirs in zip(
        (words, counts), operators().mask_events(logits, 77, 90, 0.1), strict=True
    ):
        assert torch.equal(mine, theirs)
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    number = int(counts.sum())
    assert torch.equal(
        jit.mask_places(words, starts, number, 77),
        operators().mask_places(words, starts, number, 77),
    )


@needs_compiler
def test_nothing_to_do_launches_nothing(emulated, monkeypatch: pytest.MonkeyPatch):
    value, shapes, locations, weights = attention_call(32, torch.float32)
    empty = (value[:0], shapes, locations[:0], weights[:0])
    assert jit.deformable_attention(*empty).shape == (0, 6, 96)
    grads = jit.deformable_attention_backward(torch.empty(0, 6, 96), *empty, torch.empty(0))
    assert [grad.shape[0] for grad in grads] == [0, 0, 0]
    assert jit.mask_events(torch.zeros(0, 3, 4), 6, 8, 0.0)[0].shape == (0, 8, 1)


@pytest.mark.parametrize("architecture", ["compute_75", "sm_90"])
def test_the_text_passes_nvrtc(architecture: str):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    lines = [f'#include "{path.name}"' for path in sorted((ROOT / "csrc").glob("*.cuh"))]
    try:
        error, program = nvrtc.nvrtcCreateProgram("\n".join(lines).encode(), b"all.cu", 0, [], [])
    except RuntimeError as problem:
        pytest.skip(f"NVRTC does not load: {problem}")
    for kernel in KERNELS:
        nvrtc.nvrtcAddNameExpression(program, kernel.encode())
    options = [
        b"-std=c++17",
        f"-I{ROOT / 'csrc'}".encode(),
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
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*.cuh")))
    numbers = {
        "kThreads": jit._THREADS,
        "kQueries": jit._QUERIES,
        "kMaxLevels": jit._LEVELS,
        "kTileWidth": jit._TILE[0],
        "kColourRows": jit._COLOUR_ROWS,
        "kStripsOfBlock": jit._STRIPS,
        "kMaxSide": deformable._MAX_SIDE,
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
