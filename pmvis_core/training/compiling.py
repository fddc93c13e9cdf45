"""Compiling a backbone for training by `torch.compile`, once, for frames of any size.

Sizes differ from step to step. Compiled with sizes as variables there is one code for all of them;
with those of the first step as constants there would be another for every size, until torch gives
up. What the compiler writes depends a little on the size that it sees. So it is shown one that is
always the same, before the first step: a run that goes on has the code of an unbroken one.

The rest of the network is not compiled: its shapes are known to Python and are constants there.

    compile_backbone(model.backbone, 2 * pairs, device, half=False, channels_last=False)
    learner.start()  # the gradient holds something
"""

from __future__ import annotations

import torch

from pmvis_core.errors import ResourceError
from pmvis_core.nn.base import Backbone

FIRST_SIZE = (192, 256)
"""Height and width of the frames that the compiler is shown; two numbers, so that it takes neither
for the other."""


def compile_backbone(
    backbone: Backbone, frames: int, device: torch.device, *, half: bool, channels_last: bool
) -> None:
    """Compile a backbone in place, forward and backward; parameters keep their names.

    What is in its parameters' gradients afterwards has no meaning.

    Args:
        backbone: in training mode, on its device.
        frames: of a batch.
        device: where batches are.
        half: whether batches come under autocast to bfloat16.
        channels_last: whether they have channels last in memory.

    Raises:
        ResourceError: no compiler is found, or it fails.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    backbone.compile(dynamic=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.zeros(frames, 3, *FIRST_SIZE, device=device).to(memory_format=layout)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            maps = backbone(images)
        total = torch.stack([m.float().square().mean() for m in maps]).sum()
        if total.requires_grad:
            total.backward()
    except (BackendCompilerFailed, CppCompileError, InvalidCxxCompiler) as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(
            f"`torch.compile` cannot compile the backbone on `{device.type}`: {reason}",
            "leave `--compile` out, or install a C++ compiler; on a GPU torch brings Triton",
        ) from error
