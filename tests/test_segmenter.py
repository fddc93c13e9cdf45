"""The network arranged for inference says what the network says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from pmvis_core.config import ModelConfig
from pmvis_core.data.samples import ImageBatch
from pmvis_core.errors import ResourceError
from pmvis_core.inference.segmenter import CPU_BATCH_PX, FrameSegmenter
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.nn.backbones import build_backbone, fold_frozen_norms
from pmvis_core.systems.presets import IMAGE_PRESETS

CPU = torch.device("cpu")


def spread(module: nn.Module) -> nn.Module:
    """Give frozen norms values that matter."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "tiny"])
def test_folded_norms_change_rounding_only(name: str) -> None:
    torch.manual_seed(0)
    backbone = spread(build_backbone(name).eval()).double()
    folded = copy.deepcopy(backbone)
    fold_frozen_norms(folded)
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in folded.modules())
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(folded(image), backbone(image), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-9 * float(theirs.abs().max()), rtol=0)


def tiny() -> IDOL:
    torch.manual_seed(0)
    return build_idol(IMAGE_PRESETS["tiny"].model, 7).eval()


def test_bytes_in_predictions_out() -> None:
    model = tiny()
    frames = [torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8) for _ in range(2)]
    with torch.no_grad():
        plain = model(ImageBatch.of([frame.float() for frame in frames]))
    arranged = FrameSegmenter(copy.deepcopy(model), CPU)(frames)
    torch.testing.assert_close(arranged.logits, plain.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(arranged.boxes, plain.boxes, atol=1e-5, rtol=1e-4)
    query = torch.arange(5)
    both = [p.mask_logits(-1, torch.ones_like(query), query) for p in (arranged, plain)]
    torch.testing.assert_close(*both, atol=1e-3, rtol=1e-3)


def test_bfloat16_stays_near_and_gives_full_precision_out() -> None:
    frame = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    full = FrameSegmenter(tiny(), CPU)([frame])
    half = FrameSegmenter(tiny(), CPU, "bf16")([frame])
    assert {half.logits.dtype, half.boxes.dtype, half.mask_features.dtype} == {torch.float32}
    torch.testing.assert_close(half.logits.sigmoid(), full.logits.sigmoid(), atol=0.02, rtol=0)
    torch.testing.assert_close(half.boxes, full.boxes, atol=0.02, rtol=0)
    assert not torch.equal(half.mask_features, full.mask_features)


def test_a_cpu_takes_many_small_frames_and_few_large_ones() -> None:
    segmenter = FrameSegmenter(tiny(), CPU)
    assert segmenter.frames_at_once((96, 128), 10) == min(10, CPU_BATCH_PX // (96 * 128))
    assert segmenter.frames_at_once((720, 1280), 10) == 1
    assert segmenter.frames_at_once((8, 8), 10) == 10


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_the_device_lacks_is_refused(precision: str) -> None:
    with pytest.raises(ResourceError, match=precision):
        FrameSegmenter(build_idol(ModelConfig(backbone="tiny"), 2).eval(), CPU, precision)
