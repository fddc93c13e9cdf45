"""Masks from logits: kernels and twin against plain upsampling, and the edges of sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core import masks, ops
from pmvis_core.ops import library, mask_runs

needs_masks = pytest.mark.skipif(
    not library.MASKS.loaded or library.WISH == "torch", reason="no compiled masks"
)
BACKENDS = [pytest.param("compiled", marks=needs_masks), "torch"]


def blobs(number: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return seeded smooth logits of both signs."""
    random = torch.Generator().manual_seed(height * width)
    coarse = torch.randn(number, 1, 5, 6, generator=random)
    return F.interpolate(coarse, (height, width), mode="bicubic")[:, 0].to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(90, 123), (20, 30), (7, 200), (1, 1), (33, 1)])
def test_masks_are_those_of_plain_upsampling(backend, size):
    logits = blobs(3, 20, 30)
    rles = ops.logits_to_rle(logits, size, 0.2, backend=backend)
    full = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)
    expected = masks.encode_many((full[:, 0] > 0.2).numpy())
    assert rles == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_masks_are_laid_out_in_parts(backend, monkeypatch: pytest.MonkeyPatch):
    logits = blobs(5, 12, 9)
    whole = ops.logits_to_rle(logits, (48, 36), backend=backend)
    monkeypatch.setattr(mask_runs, "_AT_ONCE", 2 * 48 * 36)
    assert ops.logits_to_rle(logits, (48, 36), backend=backend) == whole
    assert 0 < np.mean([masks.area(rle) for rle in whole]) < 48 * 36


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_full_and_no_numbers(backend):
    logits = torch.tensor([-1.0, 1.0, float("nan"), 1e9])[:, None, None].expand(4, 3, 4)
    rles = ops.logits_to_rle(logits, (6, 8), backend=backend)
    assert [masks.area(rle) for rle in rles] == [0, 48, 0, 48]
    assert masks.to_uncompressed(rles[1]) == [0, 48]
    assert ops.logits_to_rle(logits[:0], (6, 8), backend=backend) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_types_and_gradients(backend, dtype):
    logits = blobs(2, 10, 10, dtype).requires_grad_()
    wide = logits.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert ops.logits_to_rle(logits, (31, 17), backend=backend) == ops.logits_to_rle(wide, (31, 17))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"logits are torch\.int64"):
        ops.logits_to_rle(torch.zeros(1, 2, 2, dtype=torch.int64), (4, 4))
    with pytest.raises(ValueError, match="expected float"):
        ops.logits_to_rle(torch.zeros(2, 2), (4, 4))
    with pytest.raises(ValueError, match="expected float"):
        ops.logits_to_rle(torch.zeros(1, 0, 2), (4, 4))
    with pytest.raises(ValueError, match="the size is 0x4"):
        ops.logits_to_rle(torch.zeros(1, 2, 2), (0, 4))
