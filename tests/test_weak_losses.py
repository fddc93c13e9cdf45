"""BoxInst's losses against the published code's numbers and a loop over pixels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmvis_core.ops import rgb_to_lab
from pmvis_core.weak_losses import BoxInst, SpatioTemporal, box_masks, projection_loss
from tests.golden_idol import assert_equal
from tests.parity_idol_losses import EIGHT, check_boxinst


def test_published_colours_edges_losses_and_gradients(shared: Path):
    stored = np.load(shared / "golden/idol/D_boxinst_160x240.npz")
    assert_equal(check_boxinst("D", stored))


def test_lab_of_known_colours():
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0]]).float().T.reshape(3, 1, 3)
    expected = torch.tensor([[100, 0, 0], [0, 0, 0], [53.2406, 80.0923, 67.2028]])
    torch.testing.assert_close(rgb_to_lab(colours)[:, 0].T, expected, atol=6e-3, rtol=0)


def _rectangle_scene() -> tuple[Tensor, Tensor]:
    """The scene and the logits of the fact sheet's fixture (section 3.2)."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    image = torch.tensor([40.0, 120.0, 200.0])[:, None, None].repeat(1, 48, 64)
    image[:, 12:36, 16:44] = torch.tensor([200.0, 80.0, 60.0])[:, None, None]
    image[0] += (x + y) % 8
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    return image, 2 - 0.6 * torch.hypot(rows - 5.5, columns - 7.5)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_rectangle_fixture(order):
    image, logits = _rectangle_scene()
    boxinst = BoxInst(channel_order=order)
    boxes = torch.tensor([[10.3, 8.7, 50.2, 39.9]])
    inside = box_masks(boxes, 12, 16)
    assert inside.sum() == 88
    assert projection_loss(logits[None], inside).item() == pytest.approx(0.290640, abs=1e-6)
    affinity = boxinst.affinity([image], [80], 12, 16)
    assert affinity.valid[0].sum() == 16 * 10  # rows of pixels 2, 6 .. 38 of the first 42
    terms, edges = boxinst.pairwise_loss(logits[None], affinity, torch.tensor([0]), boxes)
    assert edges.item() == 421
    assert (terms / edges).item() == pytest.approx(0.544100, abs=1e-6)


def _pairwise_by_pixels(
    logits: Tensor, lab: Tensor, valid: Tensor, inside: Tensor
) -> tuple[float, int]:
    """BoxInst's equation 6 over eight neighbours, pixel by pixel."""
    p = logits.sigmoid()
    h, w = p.shape
    total, edges = 0.0, 0
    for y, x in np.ndindex(h, w):
        for dy, dx in EIGHT:
            v, u = y + dy, x + dx
            if not (0 <= v < h and 0 <= u < w and valid[v, u] and inside[y, x]):
                continue
            distance = (lab[:, y, x] - lab[:, v, u]).norm().item()
            if math.exp(-distance / 2) >= 0.3:
                same = p[y, x] * p[v, u] + (1 - p[y, x]) * (1 - p[v, u])
                total, edges = total - math.log(same), edges + 1
    return total, edges


@pytest.mark.parametrize("seed", range(3))
def test_two_padded_frames_equal_a_loop_over_pixels(seed):
    random = torch.Generator().manual_seed(seed)
    images = [  # smooth enough that many neighbours are alike
        F.interpolate(
            torch.rand(1, 3, 4, 5, generator=random) * 20 + 90, size=size, mode="bilinear"
        )[0]
        for size in ((41, 50), (30, 61))
    ]
    boxinst = BoxInst()
    affinity = boxinst.affinity(images, [82, 30], 16, 16)
    frame = torch.tensor([1, 0, 1])
    boxes = torch.tensor([[3.0, 4.2, 40.0, 28.0], [20.0, 0.0, 50.0, 41.0], [0.0, 10.0, 61.0, 30.0]])
    inside = box_masks(boxes, 16, 16)
    logits = torch.randn(3, 16, 16, dtype=torch.float64, generator=random) * 3
    terms, edges = boxinst.pairwise_loss(logits, affinity, frame, boxes)
    for i, f in enumerate(frame.tolist()):
        h, w = images[f].shape[1:]
        lab = rgb_to_lab(F.avg_pool2d(F.pad(images[f], (0, 64 - w, 0, 64 - h)), 4).floor())
        end = h - int(10 * h / (82, 30)[f])
        pixel = torch.arange(16) * 4 + 2
        valid = (pixel < end)[:, None] & (pixel < w)[None]
        total, count = _pairwise_by_pixels(logits[i], lab, valid, inside[i])
        assert count > 20
        assert edges[i].item() == count
        assert terms[i].item() == pytest.approx(total, rel=1e-10)


def _projection_by_definition(logits: Tensor, inside: Tensor) -> Tensor:
    """The projection term, one instance and one axis at a time."""
    losses = []
    for p, t in zip(logits.sigmoid(), inside.double(), strict=True):
        loss = p.new_zeros(())
        for axis in (0, 1):
            a, b = p.max(axis).values, t.max(axis).values
            loss = loss + 1 - 2 * (a * b).sum() / ((a**2).sum() + (b**2).sum() + 1e-5)
        losses.append(loss)
    return torch.stack(losses)


def test_gradients_of_projections():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 7, dtype=torch.float64, generator=random).requires_grad_()
    inside = box_masks(torch.tensor([[2.0, 2.0, 18.0, 14.0], [10.0, 5.0, 27.0, 23.0]]), 6, 7)
    assert torch.autograd.gradcheck(lambda x: projection_loss(x, inside), logits)
    torch.testing.assert_close(
        projection_loss(logits, inside), _projection_by_definition(logits, inside)
    )


def test_saturated_projections_stay_finite():
    logits = torch.full((1, 8, 8), 300.0)
    logits[:, :, 4:] = -300.0
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(projection_loss(logits, logits > 0).sum(), logits)
    assert gradient.isfinite().all()


def test_relative_boxes_keep_their_pixels():
    # A tight box of whole pixels, stored relative to a 97 x 131 frame, must not shrink.
    pixels = torch.tensor([[7.0, 3.0, 90.0, 58.0], [11.0, 19.0, 66.0, 95.0]])
    size = torch.tensor([131.0, 97.0])
    centre, sides = (
        (pixels[:, :2] + pixels[:, 2:]) / 2 / size,
        (pixels[:, 2:] - pixels[:, :2]) / size,
    )
    back = torch.cat([(centre - sides / 2) * size, (centre + sides / 2) * size], 1)
    assert (back != pixels).any()
    assert torch.equal(box_masks(back, 25, 33), box_masks(pixels, 25, 33))


def test_channel_order_swaps_red_and_blue():
    random = torch.Generator().manual_seed(1)
    image = (
        torch.rand(3, 64, 64, generator=random) * 40 + torch.tensor([180, 60, 10])[:, None, None]
    )
    published = BoxInst(channel_order="bgr").affinity([image], [64], 16, 16)
    flipped = BoxInst().affinity([image.flip(0)], [64], 16, 16)
    right = BoxInst().affinity([image], [64], 16, 16)
    assert torch.equal(published.similarity, flipped.similarity)
    assert not torch.equal(published.similarity, right.similarity)


def test_warm_up_counts_from_the_first_step():
    boxinst = BoxInst(warmup_steps=4)
    assert [boxinst.warmup(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert BoxInst(warmup_steps=0).warmup(0) == 1.0


def test_no_bottom_strip_on_request():
    image = torch.zeros(3, 32, 32)
    assert BoxInst().affinity([image], [32], 8, 8).valid.sum() == 8 * 5
    assert BoxInst(bottom_rows=0).affinity([image], [32], 8, 8).valid.all()


def _clip(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two clips of three frames with a disc of one colour that moves; its boxes; features."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side + 32), indexing="ij")
    images = torch.full((2, 3, 3, side, side + 32), 60, dtype=torch.uint8)
    images += (x + 2 * y).remainder(3).byte()
    boxes = torch.zeros(2, 3, 4)
    for clip, t in np.ndindex(2, 3):
        centre = (side // 2 + 4 * t, side // 2 + 6 * t * clip)
        disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < (side // 4) ** 2
        images[clip, t, 0, disc] = 200
        where = disc.nonzero().float()
        low, high = where.amin(0), where.amax(0)
        boxes[clip, t] = torch.stack([low[1] - 1, low[0] - 1, high[1], high[0]])
    red = images[:, :, 0, ::4, ::4].float()
    return images, boxes, torch.stack([red - 130, torch.full_like(red, 20)], 2)


@pytest.mark.parametrize("side, halved", [(64, False), (512, True)])
def test_spatio_temporal_loss_prefers_the_object(side: int, halved: bool):
    images, boxes, features = _clip(side)
    stpa, index = SpatioTemporal(), torch.tensor([0, 1])
    sizes = (side // 2, side // 2 + 16) if halved else (side, side + 32)
    for given in (None, features):
        affinity = stpa.affinity(images, boxes, index, given)
        assert affinity.size == sizes
        assert affinity.pairs.shape == (2, 3, sizes[0] // 2, sizes[1] // 2)
        disc = (images[:, :, 0] > 150).float()[..., 2::4, 2::4] * 12 - 6
        inside = box_masks(boxes.flatten(0, 1), side // 4, side // 4 + 8).view_as(disc) * 12.0 - 6
        wrong = torch.roll(disc, side // 16, -1)
        losses = [float(stpa.pairwise_loss(x, affinity)) for x in (disc, inside, wrong)]
        assert losses[0] < 0.8 * losses[1]
        assert losses[0] < 0.8 * losses[2]
    logits = torch.zeros(2, 3, side // 4, side // 4 + 8, requires_grad=True)
    loss = stpa.pairwise_loss(logits, affinity)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    nothing = stpa.pairwise_loss(logits[:0], stpa.affinity(images, boxes[:0], index[:0]))
    assert nothing == 0


def test_spatio_temporal_loss_wants_even_sides():
    with pytest.raises(ValueError, match="H and W even"):
        SpatioTemporal().affinity(
            torch.zeros(1, 2, 3, 5, 8, dtype=torch.uint8),
            torch.zeros(0, 2, 4),
            torch.zeros(0).long(),
        )
