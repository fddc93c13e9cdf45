"""The features of a frozen MobileNetV2, as `flow` compares them.

The stride 16 map of block 13, its mean over the frame taken out (what all places share tells none
of them apart), brought to a grid of stride 8 and to unit length. The network learns nothing here;
weights of an ImageNet classifier will do.

    embed = load_features(Path("mobilenet_v2.pth"))
    propagator = FlowPropagator(embed=embed)
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from pmvis_core.data.samples import PIXEL_MEAN, PIXEL_STD
from pmvis_core.errors import ResourceError
from pmvis_core.nn.backbones import MobileNetV2
from pmvis_core.propagation.bilateral import Bytes, Float
from pmvis_core.propagation.cells import Cells
from pmvis_core.weights.backbones import backbone_weights
from pmvis_core.weights.files import read_file

_STRIDE = 16
_MEAN: Float = np.array(PIXEL_MEAN, np.float32)
_STD: Float = np.array(PIXEL_STD, np.float32)


class FrozenFeatures:
    """Describes frames by the cells of a grid."""

    def __init__(self, network: MobileNetV2, short_edge: int = 480) -> None:
        """Take a network, which is put into evaluation mode.

        Args:
            network: on the CPU.
            short_edge: the size in pixels that every frame is brought to, smaller ones too.
        """
        self._network = network.eval().requires_grad_(False)
        self._short_edge = short_edge

    @torch.inference_mode()
    def __call__(self, frame: Bytes) -> Cells:
        """Return the cells of a frame: (H, W, 3) uint8 RGB."""
        scale = self._short_edge / min(frame.shape[:2])
        height, width = (
            max(1, round(side * scale / _STRIDE)) * _STRIDE for side in frame.shape[:2]
        )
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        small = cv2.resize(frame, (width, height), interpolation=method)
        image: Float = (np.asarray(small, np.float32) - _MEAN) / _STD
        found = self._network.features[:14](torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
        found = found - found.mean((2, 3), keepdim=True)
        grid = (2 * found.shape[2], 2 * found.shape[3])
        finer = F.interpolate(found, grid, mode="bilinear", align_corners=False)
        vectors = F.normalize(finer[0].flatten(1), dim=0).T.contiguous()
        return Cells(grid, vectors.numpy())


def load_features(file: Path) -> FrozenFeatures:
    """Read a MobileNetV2 from a classifier's weights, or from a file that holds one as a backbone.

    Raises:
        ResourceError: the file is not there, or holds no MobileNetV2.
        DataError: it asks to run code.
    """
    network = MobileNetV2()
    own = network.state_dict()
    found = backbone_weights(read_file(file)[0])
    lacking = [n for n in own if n not in found or found[n].shape != own[n].shape]
    if lacking:
        raise ResourceError(
            f"`{file}` lacks {len(lacking)} of the {len(own)} tensors of a MobileNetV2, the first "
            f"is `{lacking[0]}`",
            "`--features` takes ImageNet weights of MobileNetV2 1.0, as torchvision's",
        )
    network.load_state_dict({name: found[name] for name in own})
    return FrozenFeatures(network)
