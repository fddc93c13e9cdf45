"""AP on held-out videos while a run goes on: what tells which of its weights are the best.

The numbers are those of `infer` and `eval` on the weights that would be saved then. The processes
share the videos out and the first one evaluates; since that may take long they wait for each other
without a limit. A network of its own is built for it and thrown away, and random numbers are put
back, so that a run learns the same with it and without.

    validator = Validator.open(validation, config, categories, torch.device("cpu"))
    validator(learner.weights())["val_AP"]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmvis_core.checkpoint import Checkpoint
from pmvis_core.data.spares import SKIP
from pmvis_core.doubts import Doubts
from pmvis_core.errors import DataError
from pmvis_core.evaluation.average_precision import check_annotated, match
from pmvis_core.evaluation.curves import accumulate
from pmvis_core.evaluation.files import Work, match_files
from pmvis_core.evaluation.oddities import Oddity, note
from pmvis_core.files import significant
from pmvis_core.formats.predictions import match_categories
from pmvis_core.formats.ytvis import Dataset, read_dataset
from pmvis_core.formats.ytvis_writer import as_results
from pmvis_core.infer import InferOptions, VideoInference
from pmvis_core.inference.segmenter import FrameSegmenter
from pmvis_core.models.idol import build_idol
from pmvis_core.systems.pmvis import RunConfig
from pmvis_core.training.processes import (
    Group,
    decided_by_first,
    gathered,
    patient_group,
    rank_and_world,
)
from pmvis_core.training.run_folder import Validation
from pmvis_core.types import Category
from pmvis_core.video.frames import find_frames
from pmvis_core.video.sources import FrameSource, ImageFrames

NAMES = ("AP", "AP50", "AP75", "AR1", "AR10")
"""What is logged of an evaluation, as ``val_AP`` and so on."""


@dataclass(frozen=True)
class HeldOut:
    """Videos with ground truth, found to be fit for validation."""

    videos: tuple[FrameSource, ...]
    """All that the file lists, in its order; none is a camera."""
    ids: Mapping[int, int]
    """The category id of the ground truth by that of the model; it lacks what is not there."""


def find_held_out(validation: Validation, categories: tuple[Category, ...] | None) -> HeldOut:
    """Read the ground truth and find its frames; what is odd about it is told here, once.

    Args:
        validation: where they are.
        categories: the model's; None where they are not known yet.

    Raises:
        DataError: the file is malformed, holds nothing that counts, lacks frames, or has no
            category of the model.
    """
    truth = read_dataset(validation.truth)
    if not _holds_objects(truth):
        raise DataError(
            f"{truth.name} holds no object to find: its annotations are crowds, or of videos or "
            "categories that it does not list",
            "give a split with ground truth to `--val`",
        )
    root = validation.frames or validation.truth
    videos = tuple(find_frames(video, root) for video in truth.videos)
    for source in videos:
        _refuse_missing(source, truth.name)
    if categories is None:
        return HeldOut(videos, {})
    matched = match_categories(categories, truth.categories, "the training data")
    return HeldOut(videos, {own: there for own, there in matched.items() if there is not None})


def _holds_objects(truth: Dataset) -> bool:
    """Tell whether an evaluation has anything to count; warn of what is odd.

    Raises:
        DataError: there are no annotations at all.
    """
    check_annotated(truth)
    found, expected, odd = Doubts(), Doubts(), Doubts()
    matches = match(truth, (), "ytvis", found)
    note(expected, Oddity.NO_PREDICTION)
    for kind, examples in found.examples.items():
        for example in examples if kind not in expected.examples else ():
            odd.add(kind, example)
    odd.settle(strict=False)
    return accumulate(truth.categories, matches).summary["AP"] is not None


def _refuse_missing(source: FrameSource, name: str) -> None:
    """Refuse a video that lacks files of frames.

    Raises:
        DataError: it does.
    """
    lost = [p for p in source.paths if not p.is_file()] if isinstance(source, ImageFrames) else []
    if lost:
        info = source.info
        raise DataError(
            f"video {info.id} `{info.name}` of {name} lacks {len(lost)} of its {info.length} "
            f"frames, first `{lost[0].name}`",
            "validate on whole videos",
        )


@dataclass(frozen=True)
class Validator:
    """Measures a run's weights."""

    truth: Path
    """Ground truth; the first process reads it at every evaluation, so that none has to hold it."""
    held_out: HeldOut
    """Its videos."""
    config: RunConfig
    """Network, thresholds, and what becomes of a frame that breaks in the meantime."""
    categories: tuple[Category, ...]
    """The model's."""
    device: torch.device
    """Where the network runs."""
    group: Group
    """In which the processes wait for each other."""

    @classmethod
    def open(
        cls,
        validation: Validation,
        config: RunConfig,
        categories: tuple[Category, ...],
        device: torch.device,
    ) -> Validator:
        """Check what there is, in the first process; all processes have to come here.

        Raises:
            DataError: see `find_held_out`.
        """
        held_out = decided_by_first(partial(find_held_out, validation, categories))
        return cls(validation.truth, held_out, config, categories, device, patient_group())

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return ``val_AP`` and the other `NAMES`; all processes have to come here.

        Args:
            weights: the network's state dict, the same in every process; it is not changed.

        Raises:
            DataError: a frame cannot be read, where the run stops at broken samples.
        """
        with undisturbed(self.device):
            mine = self._find(weights)
        rows = list(chain.from_iterable(gathered(mine, self.group)))
        return decided_by_first(partial(self._judge, rows), self.group)

    def _find(self, weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Label this process's videos and return the results under the ground truth's ids."""
        model = build_idol(self.config.model, len(self.categories))
        model.load_state_dict(weights)
        checkpoint = Checkpoint(model.eval(), self.categories, self.config.tracker)
        segmenter = FrameSegmenter(checkpoint.model, self.device)
        # A run that skips broken samples must not end at a broken frame either.
        skips = self.config.train.on_error == SKIP
        options = InferOptions(on_error="blank" if skips else "stop")
        rank, world = rank_and_world()
        rows = []
        for source in self.held_out.videos[rank::world]:
            with VideoInference(segmenter, checkpoint, source, options) as run:
                for _ in run:
                    pass
                rows += as_results([run.tracks()])
        ids = self.held_out.ids
        known = (row for row in rows if row["category_id"] in ids)
        return [{**row, "category_id": ids[row["category_id"]]} for row in known]

    def _judge(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Evaluate the results of all processes."""
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            results.write_text(json.dumps(rows))
            # What is odd about the ground truth was told before.
            found = match_files(Work(self.truth, results), Doubts())
        summary = accumulate(found.categories, found.matches).summary
        values = ((name, summary[name]) for name in NAMES)
        return {f"val_{name}": significant(v) for name, v in values if v is not None}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put back random numbers, and give back to a GPU what was taken for a while."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        yield
    if on_gpu:
        torch.cuda.empty_cache()
