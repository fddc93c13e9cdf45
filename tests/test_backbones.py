"""Backbones: convolutions that carry the frozen norm behind them equal the two one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d

from pmvis_core.nn.backbones import MobileNetV2, convolve_normed


def shake_norms(module: nn.Module) -> None:
    """Give frozen norms numbers as training leaves them."""
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.running_var.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.1)
            norm.running_mean.normal_(std=0.1)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 2, 2, 3)])
def test_values_and_gradients(stride: int, padding: int, dilation: int, groups: int) -> None:
    conv = nn.Conv2d(6, 9, 3, stride, padding, dilation, groups, bias=False).double()
    norm = FrozenBatchNorm2d(9).double()
    shake_norms(norm)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64, requires_grad=True)
    wanted, got = norm(conv(x)), convolve_normed(x, conv, norm)
    torch.testing.assert_close(got, wanted)
    upstream, learns = torch.randn_like(wanted), [x, conv.weight]
    torch.testing.assert_close(
        torch.autograd.grad(got, learns, upstream), torch.autograd.grad(wanted, learns, upstream)
    )


def test_mobilenet_v2_is_torchvision_s() -> None:
    theirs, ours = mobilenet_v2(norm_layer=FrozenBatchNorm2d).features[:18].double(), MobileNetV2()
    shake_norms(theirs)
    ours.double().features.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    x: Tensor = image
    wanted = []
    for number, block in enumerate(theirs):
        x = block(x)
        if number in (6, 13, 17):
            wanted.append(x)
    torch.testing.assert_close(ours(image), wanted)
