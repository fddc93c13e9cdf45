"""Presets: the same code with other numbers, one literal table for each stage.

``resnet50``, ``resnet101`` and ``swin_l`` are the published settings; ``mobilenet_v2`` is a small
model for real images; ``tiny`` learns frames of about 100 pixels in minutes on a CPU.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import replace

from pmvis_core.config import ModelConfig, TrackerConfig, TrainConfig
from pmvis_core.data.augment import IDOL_STILLS, IDOL_VIDEOS, SMALL_FRAMES, AugmentConfig
from pmvis_core.errors import UsageError
from pmvis_core.losses import LossWeights
from pmvis_core.systems.pmvis import RunConfig

_IMAGE_SCHEDULE = TrainConfig()
_VIDEO_SCHEDULE = TrainConfig(steps=12000, learning_rate=1e-4, milestones=(8000,))

_PUBLISHED = RunConfig(augment=IDOL_STILLS, train=_IMAGE_SCHEDULE)

_MOBILE_AUGMENT = AugmentConfig(
    min_sizes=(192, 208, 224, 240, 256, 272, 288),
    max_size=480,
    crop_range=(160, 280),
    crop_resize=(224, 288, 352),
    brightness=0.2,
    contrast=0.2,
)
_MOBILE = RunConfig(
    preset="mobilenet_v2",
    model=ModelConfig(
        backbone="mobilenet_v2",
        hidden_dim=128,
        feedforward_dim=512,
        dropout=0.0,
        encoder_layers=3,
        decoder_layers=3,
        queries=100,
        reid_dim=128,
        mask_coordinate_unit_px=32.0,
    ),
    augment=_MOBILE_AUGMENT,
    train=TrainConfig(
        steps=20000,
        pairs_per_batch=8,
        learning_rate=4e-4,
        clip_norm=1.0,
        schedule="cosine",
        warmup_steps=200,
        ema_decay=0.999,
        supervise_reference=True,
        reid_weight_factor=0.3,
        loose_candidates=33,
        pairwise_warmup_steps=500,
    ),
    tracker=TrackerConfig(short_side=240, long_side=480),
)
_TINY = RunConfig(
    preset="tiny",
    model=ModelConfig(
        backbone="tiny",
        hidden_dim=64,
        levels=3,
        heads=4,
        feedforward_dim=128,
        dropout=0.0,
        encoder_layers=2,
        decoder_layers=3,
        queries=30,
        reid_dim=32,
        mask_coordinate_unit_px=24.0,
        class_prior=0.02,
        initial_box_logit=math.log(0.3 / 0.7),
        query_grid=(5, 6),
    ),
    augment=SMALL_FRAMES,
    train=TrainConfig(
        steps=2400,
        pairs_per_batch=6,
        learning_rate=2e-3,
        backbone_rate_factor=1.0,
        clip_norm=10.0,
        schedule="cosine",
        warmup_steps=100,
        ema_decay=0.997,
        supervise_reference=True,
        reid_weight_factor=0.3,
        loose_candidates=10,
        pairwise_warmup_steps=50,
        bottom_rows=0,
        save_every=500,
    ),
    loss=LossWeights(),
    tracker=TrackerConfig(short_side=0),
)

IMAGE_PRESETS = {
    "tiny": _TINY,
    "mobilenet_v2": _MOBILE,
    "resnet50": _PUBLISHED,
    "resnet101": replace(_PUBLISHED, preset="resnet101", model=ModelConfig(backbone="resnet101")),
    "swin_l": replace(
        _PUBLISHED,
        preset="swin_l",
        model=ModelConfig(backbone="swin_l"),
        train=replace(
            _IMAGE_SCHEDULE, steps=148000, pairs_per_batch=16, milestones=(59200, 118400)
        ),
    ),
}
"""Presets of `train-image`."""

_VIDEO_CHANGES = {
    "tiny": replace(_TINY.train, steps=450, learning_rate=7e-4, warmup_steps=50, image_share=0.5),
    "mobilenet_v2": replace(_MOBILE.train, steps=6000, learning_rate=2e-4),
}

VIDEO_PRESETS = {
    name: replace(
        preset,
        augment=preset.augment if name in _VIDEO_CHANGES else IDOL_VIDEOS,
        train=_VIDEO_CHANGES.get(name, _VIDEO_SCHEDULE),
    )
    for name, preset in IMAGE_PRESETS.items()
}
"""Presets of `train-video`."""


def find_preset(presets: dict[str, RunConfig], name: str) -> RunConfig:
    """Return a preset by name; ``swin-l`` and ``swin_l`` are the same.

    Raises:
        UsageError: there is none of that name.
    """
    plain = name.lower().replace("-", "_")
    if plain in presets:
        return presets[plain]
    near = difflib.get_close_matches(plain, presets, 1)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(presets)}"
    raise UsageError(f"no preset `{name}`", hint)
