"""The network against the reference's own numbers, and what must hold for any weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.official_weights import to_official_name
from pmvis_core.samples import ImageBatch
from pmvis_core.systems.presets import IMAGE_PRESETS
from tests.golden_idol import golden_model

# About ten times the float32 noise that the golden files state.
TOLERANCE = {"pred_logits": 4e-4, "pred_boxes": 3e-5, "pred_inst_embed": 2e-4, "mask_feats": 3e-4}


@pytest.fixture(scope="module")
def resnet50(shared: Path) -> IDOL:
    return golden_model(shared, "resnet50")


@pytest.mark.parametrize("case", ["A1_r50_96x128", "A2_r50_133x187", "A3_r50_batch2"])
def test_resnet50_gives_the_reference_numbers(case: str, resnet50: IDOL, shared: Path) -> None:
    golden = np.load(shared / f"golden/idol/{case}.npz")
    names = ["image_0", "image_1"] if "image_0" in golden else ["image"]
    images = [torch.from_numpy(golden[name]).permute(2, 0, 1).float() for name in names]
    with torch.no_grad():
        out = resnet50(ImageBatch.of(images))
        found = {
            "pred_logits": out.logits[-1],
            "pred_boxes": out.boxes[-1],
            "pred_inst_embed": out.embeddings,
            "mask_feats": out.mask_features,
        }
        for name, tensor in found.items():
            if name in golden:
                np.testing.assert_allclose(tensor, golden[name], atol=TOLERANCE[name], rtol=0)
        queries = torch.from_numpy(golden["top_queries"]).view(len(images), -1)
        expected = golden["mask_logits_up_top"].reshape(*queries.shape, *_quarter(out.sizes))
        for row, chosen in enumerate(queries):
            masks = out.mask_logits(-1, torch.full_like(chosen, row), chosen)
            np.testing.assert_allclose(masks, expected[row], atol=1.3e-3, rtol=0)


def _quarter(sizes: torch.Tensor) -> tuple[int, int]:
    height, width = (-(-int(side) // 32) * 8 for side in sizes.amax(0))
    return height, width


def test_swin_l_gives_the_reference_numbers(shared: Path) -> None:
    model = golden_model(shared, "swin_l")
    golden = np.load(shared / "golden/idol/F_swinL_96x128.npz")
    with torch.no_grad():
        image = torch.from_numpy(golden["image"]).permute(2, 0, 1).float()
        out = model(ImageBatch.of([image]))
        queries = torch.arange(0, 300, 30)
        masks = out.mask_logits(-1, torch.zeros_like(queries), queries)
    np.testing.assert_allclose(out.logits[-1], golden["pred_logits"], atol=2e-3, rtol=0)
    np.testing.assert_allclose(out.boxes[-1], golden["pred_boxes"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(masks, golden["pred_masks_sub"][0, :, 0], atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("backbone", "file"), [("resnet101", "names_shapes_r101"), ("swin_l", "names_shapes_swinL")]
)
def test_names_and_shapes_are_the_published_ones(backbone: str, file: str, shared: Path) -> None:
    from pmvis_core.config import ModelConfig

    published = {
        row["name"]: tuple(row["shape"])
        for row in json.loads((shared / f"golden/idol/{file}.json").read_text())
        if not row.get("alias_of")
    }
    with torch.device("meta"):
        model = build_idol(ModelConfig(backbone=backbone), 40)
    ours = {to_official_name(n): tuple(t.shape) for n, t in model.state_dict().items()}
    assert ours == published


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
