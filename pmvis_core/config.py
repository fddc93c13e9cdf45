"""The numbers of a run: frozen dataclasses, their TOML form, and where each value came from.

``layer`` puts a TOML file, ``PMVIS_*`` variables and flags over a preset, later ones winning, and
remembers the origin of each value; ``to_toml`` writes what was resolved, which is also what a run
folder keeps as ``config.toml``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pmvis_core.errors import DataError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


SCORE_TYPES = ("mean", "max")
"""How a track's score comes from its frames': their mean or their largest."""
PRECISIONS = ("float32", "bfloat16")
"""What a network computes in while it is trained."""
NORMALISERS = ("batch", "process")
"""Whose matched queries a loss is divided by (`training.normalisers`)."""
ON_ERROR = ("skip", "stop")
"""What a sample that cannot be made leads to in training (`data.spares`)."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of IDOL; the defaults are the published R50 model."""

    backbone: str = "resnet50"
    """resnet50, resnet101, swin_l, mobilenet_v2 or tiny."""
    hidden_dim: int = 256
    """Channels of the transformer."""
    levels: int = 4
    """Feature levels; the first three have strides 8, 16, 32."""
    heads: int = 8
    """Attention heads."""
    points: int = 4
    """Sampling points a head and level."""
    feedforward_dim: int = 1024
    """Hidden width of feed-forward networks."""
    dropout: float = 0.1
    """In the transformer, in training."""
    encoder_layers: int = 6
    """Layers."""
    decoder_layers: int = 6
    """Layers."""
    queries: int = 300
    """Object queries."""
    reid_dim: int = 256
    """Length of an embedding."""
    mask_coordinate_unit_px: float = 1.0
    """Pixels that the mask head's relative coordinates are measured in."""
    class_prior: float = 0.01
    """Class probability at the start."""
    initial_box_logit: float = -2.0
    """Logit of a box's initial width and height, relative to the image."""
    query_grid: tuple[int, ...] = ()
    """(rows, columns) on which reference points start; empty: at random places."""

    def check(self) -> None:
        """Refuse sizes that do not fit each other.

        Raises:
            UsageError: they do not.
        """
        if self.heads < 1 or self.hidden_dim < 1 or self.hidden_dim % math.lcm(8, self.heads):
            raise UsageError(
                f"`model.hidden_dim` is {self.hidden_dim} with `model.heads` = {self.heads}, "
                "expected a multiple of 8 and of the heads"
            )
        if self.query_grid and math.prod(self.query_grid) != self.queries:
            raise UsageError(
                f"`model.query_grid` is {list(self.query_grid)} with `model.queries` = "
                f"{self.queries}, expected rows and columns whose product that is",
                "`model.query_grid=[]` begins at random places",
            )


@dataclass(frozen=True)
class TrackerConfig:
    """Thresholds of inference and of the online tracker; the defaults are YouTube-VIS's."""

    short_side: int = 480
    """Pixels that frames are resized to before the network; 0 keeps their size."""
    long_side: int = 1333
    """Cap of the longer side in pixels."""
    select_score: float = 0.1
    """Queries above it are candidates."""
    box_nms: float = 0.9
    """IoU of boxes of one class above which the weaker candidate goes."""
    mask_nms: float = 0.5
    """IoU of masks above which the weaker detection goes; OVIS: 0.3."""
    init_score: float = 0.2
    """A first detection above it starts a track."""
    new_score: float = 0.2
    """A later unmatched detection above it starts a track; OVIS: 0.3."""
    match_score: float = 0.5
    """Bi-softmax similarity above which a detection joins a track."""
    memory_frames: int = 3
    """Embeddings a track remembers."""
    long_match: bool = True
    """Match a track by the weighted mean of its memory; False: by its momentum embedding."""
    temporal_weight: bool = True
    """In that mean, newer embeddings weigh more; False: the scores alone decide."""
    frame_weight: bool = True
    """Of several tracks that fit, prefer those seen in more frames."""
    momentum: float = 0.8
    """Share of the newest appearance in the momentum embedding."""
    max_gap_frames: int = 10
    """Frames after which an unseen track is forgotten."""
    row_score: float = 0.05
    """Track score above which a (track, class) row is output."""
    score_type: str = "mean"
    """What a track's score under a class is: one of `SCORE_TYPES`, over its frames."""
    frames_per_batch: int = 10
    """Frames in one forward pass."""

    def __post_init__(self) -> None:
        """Check what is a choice.

        Raises:
            UsageError: ``score_type`` is unknown.
        """
        if self.score_type not in SCORE_TYPES:
            known = ", ".join(SCORE_TYPES)
            raise UsageError(f"`score_type` is {self.score_type!r}, expected one of {known}")


@dataclass(frozen=True)
class TrainConfig:
    """The schedule of a training run; the defaults are IDOL's COCO pre-training."""

    steps: int = 59200
    """Optimiser steps."""
    pairs_per_batch: int = 32
    """Key/reference pairs a step, over all processes and parts."""
    accumulate: int = 1
    """Parts that a step's batch is taken in, one after the other, where memory is short."""
    normaliser: str = "batch"
    """Whose matched queries a loss is divided by: ``batch``: of all processes, so that a result
    does not depend on their number; ``process``: of each alone, as the authors' code has it."""
    learning_rate: float = 2e-4
    """Of everything but the backbone."""
    backbone_rate_factor: float = 0.1
    """Times ``learning_rate`` for the backbone."""
    weight_decay: float = 1e-4
    """AdamW's, on every parameter."""
    clip_norm: float = 0.01
    """L2 norm that the whole gradient is clipped to."""
    schedule: str = "steps"
    """``steps``: times 0.1 at ``milestones``; ``cosine``: down to ``final_rate_factor``."""
    milestones: tuple[int, ...] = (22200, 44400)
    """Steps at which the rate falls."""
    final_rate_factor: float = 0.02
    """Where the cosine ends."""
    warmup_steps: int = 0
    """Linear warm-up."""
    ema_decay: float = 0.0
    """Decay of the weights' moving average, which is what is saved; 0: none."""
    supervise_reference: bool = False
    """Detection losses on the reference frame too; IDOL: on the key only."""
    reid_weight_factor: float = 1.0
    """Times IDOL's weights of the contrastive losses."""
    loose_candidates: int = 100
    """Queries a ground truth keeps out of the contrastive negatives."""
    box_only_share: float = 3 / 7
    """Share of batches' pairs drawn from box-only images where both kinds exist. The paper gives
    none; 3/7 is the authors' code (weights 1 and 0.75), without which the few box-only images
    would hardly be seen. For their share among all images set it to that number."""
    image_share: float = 0.0
    """Share of a video stage's pairs that is drawn from annotated images."""
    pairwise_warmup_steps: int = 10000
    """Steps over which BoxInst's pairwise term grows to its weight."""
    bottom_rows: int = 10
    """Rows at the bottom of an original image that BoxInst ignores."""
    pseudo_mask_factor: float = 0.5
    """Times the mask losses of pseudo masks. The paper does not tell of it; 0.5 is the authors'
    code, which made the published figures. 1: as the paper reads."""
    reference_quirks: bool = False
    """Repeat three plain mistakes of the published code in BoxInst: colours are compared with red
    and blue swapped; the i-th instance seen in the key frame has the box of the i-th of the pair,
    seen or not; and frames of a batch behind one without any instance have no boxes."""
    on_error: str = "skip"
    """What a sample that cannot be made does: ``skip``: another is drawn in its place, until more
    than a tenth of the files looked at are broken, for a run must not end at its ninth hour;
    ``stop``: training stops."""
    precision: str = "float32"
    """What the network computes in: float32, or bfloat16 where autocast thinks it safe. Matcher
    and losses always have float32."""
    channels_last: bool = False
    """The backbone's images and weights with channels last in memory, as the matrix units of GPUs
    want them."""
    checkpoint_activations: bool = False
    """Forget what lies between the layers' ends and compute it again for the gradient: up to one
    more forward pass of time, much less memory, the same result."""
    compile: bool = False
    """Compile the backbone by `torch.compile`, before the first step and for frames of any size: a
    matter of minutes. Measure with `tests/benchmarks/bench_train.py --compile` whether it pays."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    save_every: int = 1000
    """Steps between resumable states."""

    def __post_init__(self) -> None:
        """Check what is a choice.

        Raises:
            UsageError: a setting is none of its choices.
        """
        choices = {"precision": PRECISIONS, "normaliser": NORMALISERS, "on_error": ON_ERROR}
        for name, known in choices.items():
            check_choice(f"train.{name}", getattr(self, name), known)
        if self.accumulate < 1:
            raise UsageError(f"`train.accumulate` is {self.accumulate}, expected 1 or more")


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Refuse a setting that is none of its choices.

    Raises:
        UsageError: see there.
    """
    if value not in known:
        raise UsageError(f"`{name}` is {value!r}, expected one of {', '.join(known)}")


def scaled_schedule(
    preset: TrainConfig, chosen: TrainConfig, given: Collection[str]
) -> TrainConfig:
    """Return a schedule that fits another batch than the preset's, by the linear rule.

    With ``k = chosen.pairs_per_batch / preset.pairs_per_batch``, counted over all processes and
    parts: the learning rate is multiplied by k (Goyal et al., 2017); ``steps``, ``milestones``,
    ``warmup_steps`` and ``pairwise_warmup_steps`` are divided by k and rounded, so that as many
    pairs are seen and everything happens at the same pair; ``ema_decay`` is raised to the k-th
    power, so that the average reaches back over as many pairs.

    Args:
        preset: whose numbers suit its own batch.
        chosen: the preset with settings over it.
        given: names of the settings that a person gave; they stay.
    """
    k = chosen.pairs_per_batch / preset.pairs_per_batch
    shorter = ("steps", "warmup_steps", "pairwise_warmup_steps")
    scaled: dict[str, Any] = {name: round(getattr(chosen, name) / k) for name in shorter}
    scaled["steps"] = max(1, scaled["steps"])
    scaled["milestones"] = tuple(round(milestone / k) for milestone in chosen.milestones)
    scaled["learning_rate"] = chosen.learning_rate * k
    scaled["ema_decay"] = chosen.ema_decay**k if chosen.ema_decay else 0.0
    kept = {name: value for name, value in scaled.items() if name not in given}
    return dataclasses.replace(chosen, **kept)


Config = TypeVar("Config")


def layer(
    base: Config, layers: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[Config, dict[str, str]]:
    """Put settings over a base, later layers winning.

    Args:
        base: a nested frozen dataclass.
        layers: (origin, settings) pairs; settings as `override` takes them.

    Returns:
        The resolved config, and the origin of every setting that a layer gave, by dotted name.

    Raises:
        UsageError: see `override`.
    """
    origins: dict[str, str] = {}
    for origin, settings in layers:
        base = override(base, settings, origin)
        origins.update(dict.fromkeys(_dotted(settings), origin))
    return base, origins


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse ``section.name=value`` strings; values are TOML, and bare words are strings.

    Raises:
        UsageError: a string has no ``=``.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(
                f"`--set {assignment}` has no `=`", "write it as `--set train.steps=100`"
            )
        settings[name.strip()] = _parse_value(text.strip())
    return settings


def environment_settings(config: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that ``PMVIS_SECTION_NAME`` variables give, for every known setting."""
    settings: dict[str, Any] = {}
    for section in dataclasses.fields(config):
        inner = getattr(config, section.name)
        if not dataclasses.is_dataclass(inner):
            continue
        for field in dataclasses.fields(inner):
            variable = f"PMVIS_{section.name}_{field.name}".upper()
            if variable in environment:
                name = f"{section.name}.{field.name}"
                settings[name] = _parse_value(environment[variable])
    return settings


def _parse_value(text: str) -> Any:
    """Parse a TOML value, or take the text as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _dotted(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the dotted names of settings that may be nested."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _dotted(value))
        else:
            yield name


def override(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """Return the dataclass with some fields replaced, nested ones by dotted names.

    Args:
        config: a (nested) frozen dataclass.
        values: field name, or ``section.name``, or a mapping a section, to its value.
        where: what to call the source of the values in messages.

    Raises:
        UsageError: a name is unknown (with the nearest one) or a value has the wrong type.
    """
    for name, value in values.items():
        head, _, rest = name.partition(".")
        fields = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
        if head not in fields:
            near = difflib.get_close_matches(head, fields, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(fields))}"
            raise UsageError(f"{where}: no setting `{name}`", hint)
        current = getattr(config, head)
        if dataclasses.is_dataclass(current):
            inner = value if isinstance(value, Mapping) else {rest: value}
            new = override(current, inner, f"{where} [{head}]")
        else:
            new = _typed(value, current, f"{where}: `{name}`")
        config = dataclasses.replace(config, **{head: new})  # type: ignore[type-var]
    return config


def _typed(value: Any, current: Any, where: str) -> Any:
    """Return the value as the type of the current one."""
    if isinstance(current, tuple) and isinstance(value, list | tuple):
        return tuple(value)
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(current):
        raise UsageError(
            f"{where} is {value!r}, expected {type(current).__name__} such as {current!r}"
        )
    return value


def read_toml(path: Path, what: str = "config") -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: how a message calls it.

    Raises:
        DataError: it is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{what} `{path}` does not exist", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{what} `{path}` is not valid TOML: {error}") from error


def to_toml(config: Any, origins: Mapping[str, str] | None = None, section: str = "") -> str:
    """Return a (nested) dataclass as TOML, a table a section, fields in their order.

    Args:
        config: the dataclass.
        origins: where settings came from, by dotted name; written as comments.
        section: dotted prefix of this table's names.
    """
    plain, tables = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{section}{field.name}"
        if dataclasses.is_dataclass(value):
            tables.append(f"\n[{field.name}]\n{to_toml(value, origins, f'{name}.')}")
        else:
            comment = f"  # {origins[name]}" if origins and name in origins else ""
            plain.append(f"{field.name} = {_toml_value(value)}{comment}\n")
    return "".join(plain + tables)


def _toml_value(value: Any) -> str:
    """Return one value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
