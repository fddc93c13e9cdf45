"""Presets: the same code with other numbers, one literal table for each stage.

``BACKBONE-DATASET`` is PM-VIS+ with IDOL's numbers, which the paper says it kept: ``resnet50``,
``resnet101`` or ``swin_l`` with ``coco`` (IDOL's pre-training on key/reference pairs of stills),
``ytvis2019``, ``ytvis2021`` or ``ovis``. A backbone alone has the pre-training's schedule in the
image stage and YouTube-VIS's in the video stage, for a vocabulary of one's own. ``mobilenet_v2`` is
a small model that learns a little from some hundred real stills in a quarter of an hour of a CPU
core; ``tiny`` learns frames of about 100 pixels in minutes on one.

Where the paper and the authors' code disagree, the preset is the paper's and ``-code`` behind its
name is the code's. It matters in the schedule: the code's yaml files say 4 pairs a batch and up to
50000 steps, the paper IDOL's 32 pairs and 12000 steps. The paper's is the default because it is
the one that IDOL's results vouch for, shows 1.9 times the pairs, and because the overrides that
the authors gave on the command line are not known.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace

from pmvis_core.config import ModelConfig, TrackerConfig, TrainConfig
from pmvis_core.data.augment import IDOL_STILLS, IDOL_VIDEOS, SMALL_FRAMES, AugmentConfig
from pmvis_core.errors import UsageError
from pmvis_core.losses import LossWeights
from pmvis_core.systems.pmvis import RunConfig

_MOBILE_AUGMENT = AugmentConfig(
    min_sizes=(112, 128, 144, 160),
    max_size=160,
    crop_range=(88, 176),
    crop_resize=(144, 176, 208),
    brightness=0.2,
    contrast=0.2,
    gain=0.1,
)
# What has learnt from some hundred stills is unsure of everything, and no two of its embeddings are
# unlike: weak detections are candidates, and one need not be much like a track to join it.
_MOBILE_TRACKER = TrackerConfig(
    short_side=144,
    long_side=256,
    select_score=0.05,
    mask_nms=0.4,
    init_score=0.1,
    match_score=0.05,
    row_score=0.02,
)
_MOBILE = RunConfig(
    preset="mobilenet_v2",
    model=ModelConfig(
        backbone="mobilenet_v2",
        hidden_dim=96,
        heads=6,
        feedforward_dim=384,
        dropout=0.0,
        encoder_layers=2,
        decoder_layers=3,
        queries=100,
        reid_dim=96,
        mask_coordinate_unit_px=32.0,
        initial_box_logit=-1.2,
        query_grid=(10, 10),
    ),
    augment=_MOBILE_AUGMENT,
    train=TrainConfig(
        steps=2000,
        pairs_per_batch=3,
        learning_rate=1e-3,
        clip_norm=10.0,
        schedule="cosine",
        warmup_steps=100,
        ema_decay=0.998,
        supervise_reference=True,
        reid_weight_factor=0.3,
        loose_candidates=33,
        pairwise_warmup_steps=50,
        save_every=100,
    ),
    tracker=_MOBILE_TRACKER,
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

_PRETRAINING = TrainConfig()
_SWIN_PRETRAINING = TrainConfig(steps=148000, pairs_per_batch=16, milestones=(59200, 118400))
_FINE_TUNING = TrainConfig(steps=12000, learning_rate=1e-4, milestones=(8000,))
_CODE_LONG = replace(_FINE_TUNING, steps=50000, pairs_per_batch=4)
_CODE_SHORT = replace(_FINE_TUNING, pairs_per_batch=4)
_OVIS_SIZES = AugmentConfig(min_sizes=tuple(range(480, 801, 32)), max_size=1333)
_OVIS_TRACKER = TrackerConfig(short_side=720, mask_nms=0.3, new_score=0.3)


@dataclass(frozen=True)
class _Recipe:
    """What a data set asks for, whatever the backbone."""

    image: TrainConfig
    """Schedule of the image stage."""
    video: TrainConfig
    """Schedule of the video stage."""
    stills: AugmentConfig = IDOL_STILLS
    """Sizes of the image stage: those of IDOL's pre-training, whose loader the stage shares."""
    videos: AugmentConfig = IDOL_VIDEOS
    """Sizes of the video stage."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Thresholds of inference."""


def _recipes(backbone: str) -> dict[str, _Recipe]:
    """Return the recipes of a backbone by the end of their presets' names."""
    swin = backbone == "swin_l"
    pretraining = _SWIN_PRETRAINING if swin else _PRETRAINING
    ytvis = _Recipe(_FINE_TUNING, _FINE_TUNING)
    # OVIS is shown at its own sizes in both stages: its frames are tested at 720 rows.
    ovis = _Recipe(
        replace(_FINE_TUNING, pairs_per_batch=16),
        replace(_FINE_TUNING, pairs_per_batch=16),
        _OVIS_SIZES,
        _OVIS_SIZES,
        _OVIS_TRACKER,
    )
    late = replace(_CODE_LONG, milestones=(32000,)) if swin else _CODE_LONG
    ytvis_code = replace(ytvis, image=late, video=_CODE_LONG)
    return {
        "": _Recipe(pretraining, _FINE_TUNING),
        "_coco": _Recipe(
            pretraining, _FINE_TUNING, tracker=TrackerConfig(short_side=800 if swin else 640)
        ),
        "_ytvis2019": ytvis,
        "_ytvis2021": ytvis,
        "_ovis": ovis,
        "_ytvis2019_code": ytvis_code,
        "_ytvis2021_code": ytvis_code,
        "_ovis_code": replace(ovis, image=_CODE_SHORT, video=_CODE_LONG),
    }


_PUBLISHED = {
    f"{backbone}{end}": (backbone, recipe)
    for backbone in ("resnet50", "resnet101", "swin_l")
    for end, recipe in _recipes(backbone).items()
}

IMAGE_PRESETS = {
    "tiny": _TINY,
    "mobilenet_v2": _MOBILE,
    **{
        name: RunConfig(
            preset=name,
            model=ModelConfig(backbone=backbone),
            augment=recipe.stills,
            train=recipe.image,
            tracker=recipe.tracker,
        )
        for name, (backbone, recipe) in _PUBLISHED.items()
    },
}
"""Presets of `train-image`."""

_SMALL_VIDEO_STAGES = {
    "tiny": replace(_TINY.train, steps=450, learning_rate=7e-4, warmup_steps=50, image_share=0.5),
    "mobilenet_v2": replace(
        _MOBILE.train, steps=300, learning_rate=3e-4, warmup_steps=50, image_share=0.5
    ),
}

VIDEO_PRESETS = {
    **{
        name: replace(IMAGE_PRESETS[name], train=train)
        for name, train in _SMALL_VIDEO_STAGES.items()
    },
    **{
        name: replace(IMAGE_PRESETS[name], augment=recipe.videos, train=recipe.video)
        for name, (_, recipe) in _PUBLISHED.items()
    },
}
"""Presets of `train-video`, by the same names."""


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
