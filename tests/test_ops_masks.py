"""Masks from logits: kernels and twin against plain upsampling, and the edges of sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core import masks, ops
from pmvis_core.errors import ResourceError
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


def random_picks(high: int, wide: int) -> tuple[Tensor, Tensor]:
    """Return rows and columns, some of them twice, of a map."""
    random = torch.Generator().manual_seed(high + wide)
    rows, columns = (
        torch.randint(side, (side + 5,), generator=random).sort().values for side in (high, wide)
    )
    return rows, columns


@pytest.mark.parametrize("backend", BACKENDS)
def test_picked_rows_and_columns(backend):
    logits, size = blobs(3, 20, 30), (77, 90)
    rows, columns = random_picks(*size)
    full = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    expected = masks.encode_many((full[:, rows][:, :, columns] > 0.1).numpy())
    assert ops.logits_to_rle(logits, size, 0.1, picks=(rows, columns), backend=backend) == expected


@pytest.mark.parametrize("size", [(1, 1), (33, 5), (31, 40), (64, 9), (70, 2)])
def test_stacks_are_what_encodings_are(size):
    random = torch.Generator().manual_seed(size[0])
    dense = torch.rand(5, *size, generator=random) < torch.linspace(0, 1, 5)[:, None, None]
    dense[3, : size[0] // 2] = False
    stack = ops.mask_stack(dense)
    assert stack.words.shape == (5, size[1], (size[0] + 31) // 32)
    areas, boxes = ops.mask_extents(stack)
    rles = masks.encode_many(dense.numpy())
    assert areas.tolist() == [masks.area(rle) for rle in rles]
    assert boxes.tolist() == [list(masks.to_box(rle)) for rle in rles]
    ious = ops.mask_iou(stack, ops.mask_stack(dense[1:4]))
    np.testing.assert_allclose(ious, masks.iou(rles, rles[1:4]), rtol=1e-12)


def test_stacks_of_logits():
    logits, size = blobs(3, 20, 30), (77, 90)
    full = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    stack = ops.mask_stack(logits, size, 0.1)
    assert torch.equal(stack.words, ops.mask_stack(full > 0.1).words)
    rows, columns = random_picks(*size)
    picked = ops.mask_stack(logits, size, 0.1, picks=(rows, columns))
    assert picked.size == (82, 95)
    assert torch.equal(picked.words, ops.mask_stack(full[:, rows][:, :, columns] > 0.1).words)
    none = ops.mask_stack(logits[:0], size)
    assert ops.mask_iou(none, stack).shape == (0, 3)
    assert ops.mask_iou(stack, none).shape == (3, 0)
    assert ops.mask_extents(none)[1].shape == (0, 4)


def test_what_does_not_fit_a_stack_is_named():
    stack = ops.mask_stack(torch.ones(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"masks are torch\.float32 of shape .*expected bool"):
        ops.mask_stack(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"masks of 3x4 pixels cannot be .* of 4x3"):
        ops.mask_iou(stack, ops.mask_stack(torch.ones(2, 4, 3, dtype=torch.bool)))
    with pytest.raises(ResourceError, match="there is no such kernel for CPUs"):
        ops.mask_extents(stack, backend="compiled")


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="picks are"):
        ops.logits_to_rle(torch.zeros(1, 2, 2), (4, 4), picks=(torch.zeros(2), torch.zeros(2)))
    with pytest.raises(ValueError, match=r"logits are torch\.int64"):
        ops.logits_to_rle(torch.zeros(1, 2, 2, dtype=torch.int64), (4, 4))
    with pytest.raises(ValueError, match="expected float"):
        ops.logits_to_rle(torch.zeros(2, 2), (4, 4))
    with pytest.raises(ValueError, match="expected float"):
        ops.logits_to_rle(torch.zeros(1, 0, 2), (4, 4))
    with pytest.raises(ValueError, match="the size is 0x4"):
        ops.logits_to_rle(torch.zeros(1, 2, 2), (0, 4))
