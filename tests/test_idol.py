"""The network against the reference's own numbers, and what must hold for any weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pmvis_core.data.samples import ImageBatch
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.systems.presets import IMAGE_PRESETS
from tests.golden_idol import assert_equal
from tests.parity_idol import check

CASES = [
    "A1_r50_96x128",
    "A2_r50_133x187",
    "A3_r50_batch2",
    "F_swinL_96x128",
    "names_shapes_r101",
    "names_shapes_swinL",
    "names_shapes_coco",
]


@pytest.mark.parametrize("case", CASES)
def test_every_stage_and_name_is_the_reference_one(case: str, shared: Path) -> None:
    assert_equal(check(shared / "golden/idol", [case]))


def tiny() -> IDOL:
    torch.manual_seed(0)
    return build_idol(IMAGE_PRESETS["tiny"].model, 7).eval()


def test_frames_of_a_batch_do_not_influence_each_other() -> None:
    model = tiny()
    images = [torch.rand(3, 96, 128) * 255, torch.rand(3, 64, 96) * 255]
    with torch.no_grad():
        both = model(ImageBatch.of(images))
        padded = [ImageBatch.of([image, torch.zeros(3, 96, 128)]) for image in images]
        alone = [model(batch) for batch in padded]
    for row, single in enumerate(alone):
        torch.testing.assert_close(both.logits[:, row], single.logits[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both.boxes[:, row], single.boxes[:, 0], atol=1e-5, rtol=1e-5)


def test_the_query_grid_starts_references_on_the_grid() -> None:
    with torch.no_grad():
        out = tiny()(ImageBatch.of([torch.zeros(3, 96, 128)]))
    first = out.decoded.references[0, 0]
    assert first[0].tolist() == pytest.approx([1 / 12, 1 / 10], abs=1e-6)
    assert first[-1].tolist() == pytest.approx([11 / 12, 9 / 10], abs=1e-6)


def test_rows_of_predictions_keep_their_masks() -> None:
    images = [torch.rand(3, 96, 128) * 255 for _ in range(3)]
    query = torch.tensor([3, 7])
    with torch.no_grad():
        out = tiny()(ImageBatch.of(images))
        whole = out.mask_logits(-1, torch.tensor([2, 2]), query)
        part = out.rows(1, 3).mask_logits(-1, torch.tensor([1, 1]), query)
    torch.testing.assert_close(whole, part)


def test_mask_features_of_the_first_frames_alone() -> None:
    images = ImageBatch.of([torch.rand(3, 96, 128) * 255 for _ in range(3)])
    query = torch.tensor([3, 7])
    with torch.no_grad():
        whole, part = tiny()(images), tiny()(images, 1)
        wanted, got = (out.rows(0, 1).mask_logits(-1, 0 * query, query) for out in (whole, part))
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(part.logits, whole.logits)
        with pytest.raises(IndexError):
            part.mask_logits(-1, torch.tensor([0, 2]), query)
