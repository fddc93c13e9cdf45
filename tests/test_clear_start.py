"""A clear start: before anything is learned, a frame that meets itself gets its masks back."""

from __future__ import annotations

import pytest
import torch

from pmvis_core.models.deaot import IDENTITIES, DeAOT, Features, build_deaot
from pmvis_core.training.clear_start import clear_start


def found_again(network: DeAOT, labels: torch.Tensor) -> float:
    """Return the share of places whose label a frame of distinct tokens finds in itself."""
    height, width = labels.shape
    rows, columns = height // 16 + 1, width // 16 + 1
    sides = [(4 * rows - 3, 4 * columns - 3), (2 * rows - 1, 2 * columns - 1), (rows, columns)]
    maps = [torch.rand(1, c, *side) for c, side in zip((24, 32, 96), sides, strict=True)]
    tokens = torch.randn(1, rows * columns, 256)
    features = Features(network.decoder.adapt(maps), tokens, (rows, columns))
    known = torch.nn.functional.one_hot(labels, IDENTITIES + 1).permute(2, 0, 1)[None].float()
    memory = network.refer(features, known)
    logits, _ = network.track(features, memory, memory)
    found = network.upsample(logits, [int(labels.max())], (height, width)).argmax(1)[0]
    return (found == labels).float().mean().item()


@pytest.mark.parametrize("name", ["deaott", "deaotb"])
def test_masks_pass_through_a_network_that_knows_nothing(name: str) -> None:
    torch.manual_seed(0)
    # Blocks of 64 pixels, one for each identity and some background.
    labels = torch.arange(12).view(3, 4).remainder(11).repeat_interleave(64, 0)
    labels = labels.repeat_interleave(64, 1)[:177, :241]
    network = build_deaot(name).eval()
    with torch.no_grad():
        before = found_again(network, labels)
        clear_start(network)
        after = found_again(network, labels)
    assert before < 0.3
    assert after > 0.8


def test_aot_keeps_its_random_start() -> None:
    torch.manual_seed(0)
    network = build_deaot("aott")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    clear_start(network)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
