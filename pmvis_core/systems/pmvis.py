"""PM-VIS+ (Yang et al., 2024): the image stage and the video stage, as recipes.

A stage says which samples it learns from, which losses they get and what stays frozen. The image
stage learns from stills with masks and stills with boxes only; the video stage learns from pseudo
labels with mask losses and BoxInst losses together (Table IV: 44.7 AP against 43.3 and 40.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pmvis_core.config import ModelConfig, TrackerConfig, TrainConfig
from pmvis_core.data.augment import AugmentConfig
from pmvis_core.data.datasets import CocoImages, Mixture, PseudoVideos, image_mixture
from pmvis_core.data.samples import KeyReferencePair
from pmvis_core.data.spares import PLAN, OnError, on_error_of
from pmvis_core.losses import BoxLoss, LossWeights, SetCriterion
from pmvis_core.matching import OptimalTransportMatcher
from pmvis_core.types import Category
from pmvis_core.weak_losses import BoxInst

CACHE_BYTES = 512 << 20
"""Decoded training images kept in memory by each process."""


@dataclass(frozen=True)
class RunConfig:
    """Every number of a run; a run folder keeps it as ``config.toml``."""

    preset: str = "resnet50"
    """What the values started from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training frames vary."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The schedule."""
    loss: LossWeights = field(default_factory=LossWeights)
    """Weights of the terms."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Thresholds of inference, stored with the model."""


@dataclass(frozen=True)
class Samples:
    """What a stage learns from."""

    source: Mixture[KeyReferencePair]
    """Key/reference pairs."""
    categories: tuple[Category, ...]
    """The vocabulary; label k is the k-th category."""


@dataclass(frozen=True)
class ImageStage:
    """PM-VIS+(Image): stills as key/reference pairs; each annotation gets the losses it can."""

    data: Path
    """``train_image.json`` of `map-categories`."""
    images: Path | None = None
    """Folder of the images; None: that of ``data``."""
    box_loss: bool = False
    """BoxInst for box-only instances (Table II, row 3; the paper is better without)."""
    freeze_mask_head: bool = False
    """Keep the mask branch as it was initialised (Table II, row 4)."""
    mask_loss: bool = True
    """Mask losses where there are masks; without them and with BoxInst for all: row 5."""
    box_loss_all: bool = False
    """BoxInst for instances with masks as well (Table II, row 2)."""

    name = "image"

    def samples(self, config: RunConfig, *, planning: bool = False) -> Samples:
        """Open the stills; mixed by kind as `train.box_only_share` says.

        Args:
            config: of the run.
            planning: nothing is going to be read, so that missing files are only told of.
        """
        stills = _open_stills(self.data, self.images, config, _on_error(config, planning))
        return Samples(image_mixture(stills, config.train.box_only_share), stills.categories)

    def criterion(self, config: RunConfig, seed: int) -> SetCriterion:
        """Build the losses."""
        weak: BoxLoss = "all" if self.box_loss_all else "box" if self.box_loss else "none"
        return _criterion(config, seed, box_loss=weak, mask_loss=self.mask_loss)

    def frozen(self) -> tuple[str, ...]:
        """Return the parts of parameter names that do not learn."""
        return ("mask_head",) if self.freeze_mask_head else ()


@dataclass(frozen=True)
class VideoStage:
    """PM-VIS+(Video): pseudo labels of unlabelled videos, mask and BoxInst losses together."""

    pseudo: Path
    """Tracks file or YouTube-VIS JSON."""
    frames: Path | None
    """Where the frames lie."""
    mask_loss: bool = True
    """Mask losses, at half weight as the authors have it."""
    box_loss: bool = True
    """BoxInst's losses."""
    data: Path | None = None
    """``train_image.json`` to mix in by ``train.image_share``."""
    images: Path | None = None
    """Folder of its images."""
    dropped: str | None = None
    """What tracks that `filter` set aside become: ``ignore`` or ``background``; None: as the file
    has it."""

    name = "video"

    def samples(self, config: RunConfig, *, planning: bool = False) -> Samples:
        """Open the videos, mixed with stills where asked.

        Args:
            config: of the run.
            planning: nothing is going to be read, so that missing files are only told of.
        """
        on_error = _on_error(config, planning)
        videos = PseudoVideos(
            self.pseudo,
            self.frames,
            config.augment,
            cache_bytes=CACHE_BYTES,
            keep_unseen=config.train.reference_quirks,
            on_error=on_error,
            dropped=self.dropped,
        )
        share = config.train.image_share if self.data else 0.0
        if not share or self.data is None:
            return Samples(Mixture([videos], [1.0]), videos.categories)
        stills = _open_stills(self.data, self.images, config, on_error)
        masked, box_only = stills.split()
        parts: list[tuple[CocoImages | PseudoVideos, float]] = [
            (videos, 1 - share),
            (masked, share * (1 - config.train.box_only_share)),
            (box_only, share * config.train.box_only_share),
        ]
        filled = [(source, weight) for source, weight in parts if len(source)]
        return Samples(Mixture([s for s, _ in filled], [w for _, w in filled]), videos.categories)

    def criterion(self, config: RunConfig, seed: int) -> SetCriterion:
        """Build the losses."""
        weak: BoxLoss = "box" if self.box_loss else "none"
        return _criterion(config, seed, box_loss=weak, mask_loss=self.mask_loss)

    def frozen(self) -> tuple[str, ...]:
        """Return the parts of parameter names that do not learn: none."""
        return ()


Stage = ImageStage | VideoStage


def _on_error(config: RunConfig, planning: bool) -> OnError:
    """Return what missing files lead to."""
    return PLAN if planning else on_error_of(config.train.on_error)


def _open_stills(
    data: Path, images: Path | None, config: RunConfig, on_error: OnError
) -> CocoImages:
    """Open annotated stills as a run wants them."""
    return CocoImages(
        data,
        images,
        config.augment,
        cache_bytes=CACHE_BYTES,
        keep_unseen=config.train.reference_quirks,
        on_error=on_error,
    )


def _criterion(config: RunConfig, seed: int, *, box_loss: BoxLoss, mask_loss: bool) -> SetCriterion:
    """Build IDOL's criterion with the preset's numbers."""
    return SetCriterion(
        weights=config.loss,
        matcher=OptimalTransportMatcher(loose_candidates=config.train.loose_candidates),
        supervise_reference=config.train.supervise_reference,
        mask_loss=mask_loss,
        box_loss=box_loss,
        mask_weight_pseudo=config.train.pseudo_mask_factor,
        misplaced_boxes=config.train.reference_quirks,
        boxinst=BoxInst(
            warmup_steps=config.train.pairwise_warmup_steps,
            bottom_rows=config.train.bottom_rows,
            channel_order="bgr" if config.train.reference_quirks else "rgb",
        ),
        seed=seed,
    )
