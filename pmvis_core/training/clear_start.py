"""Initial weights of DeAOT with which masks pass from memory to logits before anything is learned.

With random weights a network first has to find out, by chance and for each identity apart, that a
channel of the bank and a channel of the logits mean the same object; shuffled identities make that
slow (thousands of steps). Here eleven channels carry the identities from the bank through values,
projections and decoder to the logits, depthwise convolutions begin as the identity, queries are
sharp, and whatever would disturb these channels begins at zero. So the network starts as a soft
copy by attention, which training refines; all weights stay free. The authors begin at random.

    clear_start(network)    # a DeAOT; AOT adds identities to values and keeps its random start
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmvis_core.models.deaot import IDENTITIES, DeAOT, FpnDecoder, GatedPropagation
from pmvis_core.nn.gated_propagation import GatedPropagationBlock

_CARRIED = IDENTITIES + 1
_SHARPER_QUERIES = 3.0
_FAINT = 0.1
"""Of what later blocks and a frame's propagation within itself add at first."""
_LOGIT = 2.0
"""Logit of an identity for each unit in its last channel, which is about 4 inside an object."""


@torch.no_grad()
def clear_start(network: DeAOT) -> None:
    """Set the initial weights of a DeAOT in place; an AOT stays as it is."""
    if not isinstance(network.LSTT, GatedPropagation):
        return
    bank = network.patch_wise_id_bank
    bank.weight[:_CARRIED] = 0
    for k in range(_CARRIED):
        bank.weight[k, k] = 1 / (bank.kernel_size[0] * bank.kernel_size[1])
    _clear(bank.bias)
    for number, block in enumerate(network.LSTT.layers):
        assert isinstance(block, GatedPropagationBlock)
        _clear_block(block, first=number == 0)
    _clear_decoder(network.decoder)


def _clear_block(block: GatedPropagationBlock, *, first: bool) -> None:
    """Let the first block copy identities, and later ones change little."""
    block.linear_QV.weight[: block.keys] *= _SHARPER_QUERIES
    relative = block.short_term_attn.relative_emb_k
    _clear(relative.weight)
    _clear(relative.bias)
    width, values = block.expanded // 2, block.expanded
    if first:
        _carry(block.linear_ID_V.weight, 0, 0)
        _clear(block.linear_ID_V.bias, 0)
    for part in (block.long_term_attn, block.short_term_attn):
        nn.init.dirac_(part.dw_conv.conv.weight, part.dw_conv.conv.groups)
        if first:
            _carry(part.projection.weight, width, values)
            _clear(part.projection.bias, width)
        else:
            part.projection.weight *= _FAINT
    nn.init.dirac_(block.self_attn.dw_conv.conv.weight, block.self_attn.dw_conv.conv.groups)
    block.self_attn.projection.weight *= _FAINT


def _clear_decoder(decoder: FpnDecoder) -> None:
    """Let identities pass through all steps, untouched by the encoder's maps."""
    _carry(decoder.conv_in.conv.weight, 0, decoder.conv_in.conv.in_channels // 2)
    for step in (decoder.conv_16x, decoder.conv_8x, decoder.conv_4x):
        _carry(step.conv.weight, 0, 0)
    for step in (decoder.conv_in, decoder.conv_16x, decoder.conv_8x, decoder.conv_4x):
        _clear(step.conv.bias, 0)
    for adapter in (decoder.adapter_16x, decoder.adapter_8x, decoder.adapter_4x):
        _clear(adapter.weight, 0)
        _clear(adapter.bias, 0)
    decoder.conv_out.weight *= _FAINT
    _carry(decoder.conv_out.weight, 0, 0, _LOGIT, alone=False)
    _clear(decoder.conv_out.bias)


def _carry(
    weight: Tensor, outputs: int, inputs: int, value: float = 1.0, *, alone: bool = True
) -> None:
    """Copy the identities' channels; ``alone``: nothing else flows into them.

    Args:
        weight: (out, in) or (out, in, k, k).
        outputs: first of the channels that they go to.
        inputs: first of the channels that they come from.
        value: factor.
        alone: whether to clear what else flows into them.
    """
    if alone:
        weight[outputs : outputs + _CARRIED] = 0
    centre = tuple(side // 2 for side in weight.shape[2:])
    for k in range(_CARRIED):
        weight[(outputs + k, inputs + k, *centre)] = value


def _clear(weight: Tensor | None, first: int | None = None) -> None:
    """Set a parameter to zero, or only the rows of the identities from ``first`` on."""
    assert weight is not None
    weight[slice(None) if first is None else slice(first, first + _CARRIED)] = 0
