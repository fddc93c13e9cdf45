"""Weights in and out: our safetensors, published IDOL files, backbones to start from.

A model file is safetensors with the resolved config and the vocabulary in its metadata, so a run
folder or the single file is all that `infer` needs. Files of others say less: their names and
shapes tell what they hold (``weights/``), and a `KeyReport`
tells what became of every tensor. No code from a file is ever executed (``weights/files.py``).

    checkpoint = load_model(Path("idol_ovis_r50.pth"))
    checkpoint.report.tell(print, print)
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from pmvis_core.config import ModelConfig, TrackerConfig, override
from pmvis_core.errors import ResourceError, UsageError
from pmvis_core.files import atomic_write, canonical_json
from pmvis_core.models.idol import IDOL, build_idol
from pmvis_core.nn.backbones import BACKBONES
from pmvis_core.types import Category
from pmvis_core.weights.backbones import backbone_kind, backbone_weights
from pmvis_core.weights.files import METADATA_KEY, read_file
from pmvis_core.weights.official import (
    Vocabulary,
    choose_vocabulary,
    fitting_vocabularies,
    from_official,
    infer_architecture,
    is_idol,
    published_thresholds,
    shown_names,
    to_official,
    to_official_name,
)

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
"""A run folder's stamp: it appears last."""
_SHOWN_KEYS = 3
_NOT_IN_CLASSIFIERS = re.compile(r"norm\d\.(weight|bias)|.*relative_position_index")
"""Of Swin: norms of the maps, which start anew, and what a network computes by itself."""


@dataclass(frozen=True)
class KeyReport:
    """What became of the tensors of a file and of a network, by their names."""

    title: str = ""
    """What the file holds; empty where it says so itself."""
    loaded: tuple[str, ...] = ()
    """In the network and taken from the file."""
    aliased: tuple[str, ...] = ()
    """In the file as a repetition of another tensor."""
    reinitialised: tuple[str, ...] = ()
    """In both, but the network keeps its initial values."""
    missing: tuple[str, ...] = ()
    """Not in the file; the network keeps its initial values."""
    unexpected: tuple[str, ...] = ()
    """Not in the network."""

    def lines(self) -> list[str]:
        """Return a line a kind, with the count and the first names."""
        kinds = ("loaded", "aliased", "reinitialised", "missing", "unexpected")
        return [f"{kind}: {_first(getattr(self, kind))}" for kind in kinds if getattr(self, kind)]

    def tell(self, say: Callable[[str], None], detail: Callable[[str], None]) -> None:
        """Say what a file holds and, in one line, what was not loaded.

        Args:
            say: takes what everybody should know.
            detail: takes all lines, for those who asked for more.
        """
        if self.title:
            say(self.title)
        left = [line for line in self.lines() if not line.startswith(("loaded", "aliased"))]
        if left:
            say(f"{len(self.loaded)} tensors loaded; " + "; ".join(left))
        for line in self.lines():
            detail(line)


Tell = Callable[[KeyReport], None]
"""Is told what became of the tensors of initial weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and what is needed to use it."""

    model: IDOL
    """In evaluation mode, on the CPU."""
    categories: tuple[Category, ...]
    """The vocabulary; label k is the k-th category."""
    tracker: TrackerConfig
    """Inference thresholds that the model was made for."""
    report: KeyReport = field(default_factory=KeyReport)
    """What became of the file's tensors."""


def save_model(
    path: Path,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    categories: tuple[Category, ...],
    tracker: TrackerConfig,
) -> None:
    """Write weights with everything needed to rebuild the model, atomically."""
    about = {
        "model": asdict(model),
        "tracker": asdict(tracker),
        "categories": [asdict(category) for category in categories],
    }
    # Clones: safetensors refuses tensors that share storage, as flat parameters do.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    with atomic_write(path, "wb") as stream:
        stream.write(save_bytes(tensors, {METADATA_KEY: canonical_json(about)}))


def save_official(path: Path, model: IDOL) -> None:
    """Write a model as IDOL's own code reads it: ``{"model": tensors}`` by the published names.

    Raises:
        DataError: IDOL's own code could not build this network.
    """
    own = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    content = {"model": to_official(own, model.config)}
    with atomic_write(path, "wb") as stream:
        torch.save(content, stream)


def load_model(path: Path, categories: str = "") -> Checkpoint:
    """Rebuild a model from a run folder, its ``model.safetensors``, or a published IDOL file.

    Args:
        path: the folder or file.
        categories: for a published file, which has no names: a built-in vocabulary or a file of
            names; empty: by the number of classes.

    Raises:
        ResourceError: there is no such file, it holds no IDOL, or its tensors do not fit.
        DataError: it asks to run code, or the categories are of another number.
        UsageError: the file has names of its own.
    """
    stored = read_model(path)
    named = _vocabulary(stored, categories)
    model = _blank_idol(stored.config, len(named.categories))
    report = load_weights(model, stored)
    if stored.categories is None:
        names = f"{named.name}: {shown_names(named.categories)}"
        title = (
            f"`{stored.file}`: IDOL on {stored.config.backbone}, {stored.config.queries} queries, "
            f"{stored.classes} categories ({names})"
        )
        report = replace(report, title=title)
    tracker = stored.tracker or published_thresholds(named.name, stored.config.backbone)
    return Checkpoint(model.eval(), named.categories, tracker, report)


def _vocabulary(stored: StoredModel, spec: str) -> Vocabulary:
    """Return what a model's classes are called."""
    if stored.categories is None:
        named = choose_vocabulary(stored.classes, spec, stored.file)
        if named.assumed:
            others = [v.name for v in fitting_vocabularies(stored.classes) if v.name != named.name]
            logger.warning(
                "`%s` does not name its %d categories; taken for %s (give `--categories %s` if it "
                "was trained on that)",
                *(stored.file, stored.classes, named.name, " or ".join(others)),
            )
        return named
    if spec:
        raise UsageError(
            f"`--categories` is for files that name none; `{stored.file}` names "
            f"{stored.classes} ({shown_names(stored.categories)})",
            "leave it out",
        )
    return Vocabulary("its own", stored.categories)


def _blank_idol(config: ModelConfig, classes: int) -> IDOL:
    """Build a network for weights that fill all of it: initial values would take seconds."""
    with torch.device("meta"):
        model = build_idol(config, classes)
    stored = model.state_dict()
    if any(name not in stored for name, _ in model.named_buffers()):
        return build_idol(config, classes)
    return model.to_empty(device="cpu")


@dataclass(frozen=True)
class StoredModel:
    """A whole IDOL as a file holds it."""

    file: Path
    """Where it was read."""
    tensors: Mapping[str, Tensor]
    """By our names; they may not fit yet."""
    config: ModelConfig
    """The network, as stated or as inferred."""
    classes: int
    """Outputs of the class head."""
    categories: tuple[Category, ...] | None = None
    """The vocabulary, where the file states it."""
    tracker: TrackerConfig | None = None
    """Inference thresholds, where the file states them."""
    aliased: tuple[str, ...] = ()
    """Names in the file that repeat another tensor."""
    unexpected: tuple[str, ...] = ()
    """Names in the file that no IDOL has."""

    @property
    def official(self) -> bool:
        """Tell whether somebody else than pmvis wrote it."""
        return self.categories is None


def read_model(path: Path) -> StoredModel:
    """Read a run folder, its ``model.safetensors``, or a published IDOL file.

    Raises:
        ResourceError: there is no such file, or it holds no IDOL.
        DataError: it asks to run code.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    tensors, about = read_file(file)
    if about is None and not is_idol(tensors):
        raise ResourceError(
            f"`{file}` holds tensors but no pmvis model and no IDOL",
            "give a run folder, or a checkpoint of IDOL or PM-VIS; a backbone's weights go to "
            "`train-image --init`",
        )
    return _understood(file, tensors, about)


def _understood(file: Path, tensors: Mapping[str, Tensor], about: str | None) -> StoredModel:
    """Return the model that a file's tensors and metadata make."""
    if about is None:
        sorted_out = from_official(tensors)
        shapes = {name: tensor.shape for name, tensor in sorted_out.tensors.items()}
        config, classes = infer_architecture(shapes, f"`{file}`")
        return StoredModel(
            file,
            sorted_out.tensors,
            config,
            classes,
            aliased=sorted_out.aliased,
            unexpected=sorted_out.unexpected,
        )
    try:
        facts = json.loads(about)
        categories = tuple(Category(**category) for category in facts["categories"])
        config = override(ModelConfig(), facts["model"], str(file))
        tracker = override(TrackerConfig(), facts["tracker"], str(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResourceError(f"the metadata of `{file}` are not pmvis's: {error}") from error
    if config.backbone not in BACKBONES:
        raise ResourceError(
            f"`{file}` has the backbone {config.backbone}, which this version does not know",
            f"known are {', '.join(BACKBONES)}",
        )
    return StoredModel(file, tensors, config, len(categories), categories, tracker)


def load_weights(
    model: IDOL, stored: StoredModel, fresh: Collection[str] = frozenset()
) -> KeyReport:
    """Load tensors that must fit exactly; a published file may hold more than the network has.

    Args:
        model: the network.
        stored: the tensors.
        fresh: names that keep their initial values.

    Raises:
        ResourceError: naming how many keys do not fit and the first few.
    """
    own, given = model.state_dict(), stored.tensors
    in_file = to_official_name if stored.official else str
    extra = [name for name in given if name not in own]
    wrong = [
        f"`{in_file(name)}` ({_shape(given.get(name))} there, {_shape(own.get(name))} here)"
        for name in sorted({*own, *([] if stored.official else extra)} - {*fresh})
        if name not in own or name not in given or own[name].shape != given[name].shape
    ]
    if wrong:
        listed = ", ".join(wrong[:_SHOWN_KEYS]) + (", …" if len(wrong) > _SHOWN_KEYS else "")
        raise ResourceError(
            f"{len(wrong)} of {len(own)} keys of `{stored.file}` do not fit: {listed}"
        )
    model.load_state_dict({name: own[name] if name in fresh else given[name] for name in own})
    return KeyReport(
        loaded=tuple(name for name in own if name not in fresh),
        aliased=stored.aliased,
        reinitialised=tuple(name for name in own if name in fresh),
        unexpected=(*stored.unexpected, *map(in_file, extra)),
    )


def initialise(model: IDOL, path: Path, categories: tuple[Category, ...]) -> KeyReport:
    """Start a model from any weights: a whole model, or classification weights of the backbone.

    Class heads are kept only where the vocabularies agree. A published file does not name its
    categories: the number of classes and the file's name speak for it (`choose_vocabulary`).

    Args:
        model: the network to train.
        path: what `load_model` or `initialise_backbone` reads.
        categories: what the network is to learn.

    Raises:
        ResourceError: the file is missing or does not fit the network.
        DataError: it asks to run code.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    tensors, about = read_file(file)
    if about is None and not is_idol(tensors):
        return _fill_backbone(model, tensors, file)
    stored = _understood(file, tensors, about)
    if stored.config.backbone != model.config.backbone:
        raise ResourceError(
            f"`{file}` has the backbone {stored.config.backbone}, this run {model.config.backbone}",
            f"give `--preset {stored.config.backbone}`, or other weights",
        )
    fresh: frozenset[str] = frozenset()
    if not _same_vocabulary(stored, categories):
        logger.warning(
            "the vocabulary differs from the initial model's (%d categories, here %d: %s): class "
            "heads start anew",
            *(stored.classes, len(categories), shown_names(categories)),
        )
        fresh = frozenset(n for n in model.state_dict() if n.startswith("class_embed."))
    return load_weights(model, stored, fresh)


def _same_vocabulary(stored: StoredModel, categories: tuple[Category, ...]) -> bool:
    """Tell whether a class head speaks of these categories, as far as its file says."""
    if stored.categories is not None:
        return stored.categories == categories
    if stored.classes != len(categories):
        return False
    if not fitting_vocabularies(stored.classes):
        logger.warning(
            "`%s` does not name its %d categories; taken for those to learn",
            *(stored.file, stored.classes),
        )
        return True
    return choose_vocabulary(stored.classes, "", stored.file, categories).categories == categories


def initialise_backbone(model: IDOL, file: Path) -> KeyReport:
    """Load a backbone, of a classifier or inside a detector, into the model's.

    Accepts what `weights.backbones` knows. Norms that Swin's classifiers do not have keep their
    initial values.

    Raises:
        ResourceError: the file does not cover the backbone.
        DataError: it asks to run code.
    """
    return _fill_backbone(model, read_file(file)[0], file)


def _fill_backbone(model: IDOL, tensors: Mapping[str, Tensor], file: Path) -> KeyReport:
    """Load the backbone among a file's tensors."""
    own = model.backbone.state_dict()
    found = backbone_weights(tensors)
    given = {n: found[n] for n, t in own.items() if n in found and found[n].shape == t.shape}
    absent = [n for n in own if n not in found]
    lacking = [n for n in own if n not in given]
    if not all(n in absent and _NOT_IN_CLASSIFIERS.fullmatch(n) for n in lacking):
        name = model.config.backbone
        kind = backbone_kind({n: tensor.shape for n, tensor in found.items()})
        other = f"it looks like {kind}: give `--preset {kind}`" if kind not in (None, name) else ""
        shown = [f"{n} ({_shape(found.get(n))} there, {_shape(own[n])} here)" for n in lacking]
        raise ResourceError(
            f"`{file}` lacks {len(lacking)} of the {len(own)} tensors of backbone `{name}`: "
            f"{', '.join(shown[:_SHOWN_KEYS])}",
            other or "give classification weights of the same architecture",
        )
    for name, tensor in given.items():
        if name.endswith("relative_position_index") and not torch.equal(tensor, own[name]):
            raise ResourceError(f"`{file}` counts positions in a window in another order: {name}")
    model.backbone.load_state_dict({**own, **given})
    return KeyReport(
        loaded=tuple(given),
        missing=tuple(absent),
        unexpected=tuple(n for n in found if n not in own),
    )


def preset_for(path: Path) -> str | None:
    """Return the preset whose network a file of weights belongs to; None where it does not tell.

    Raises:
        ResourceError: there is no such file, or it holds no tensors.
        DataError: it asks to run code.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    tensors, about = read_file(file)
    if about is None and not is_idol(tensors):
        found = backbone_weights(tensors)
        return backbone_kind({name: tensor.shape for name, tensor in found.items()})
    return _understood(file, tensors, about).config.backbone


def _first(names: tuple[str, ...]) -> str:
    """Return how many names there are, and the first few."""
    shown = ", ".join(names[:_SHOWN_KEYS]) + (", …" if len(names) > _SHOWN_KEYS else "")
    return f"{len(names)} ({shown})"


def _shape(tensor: Tensor | None) -> str:
    """Return a tensor's shape for a message."""
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"
