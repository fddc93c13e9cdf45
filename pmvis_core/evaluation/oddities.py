"""What may be odd about an evaluation's input, worded once for the evaluators here and in C++.

The official evaluators count such input in ways that few expect, so each kind is told once, with
examples. ``csrc/evaluation/match.h`` numbers the kinds in the order of `Oddity`.

    note(doubts, Oddity.ANNOTATION_TWICE, 7)
"""

from __future__ import annotations

from enum import IntEnum

from pmvis_core.doubts import UNKNOWN_CATEGORY, Doubts

_LENGTH = (
    "{0} are longer or shorter than their video; frames beyond the shorter of two tracks do not "
    "count"
)
_SIZE = (
    "masks of {0} have another size than their video and overlap nothing; resize them to the "
    "original frames"
)


class Oddity(IntEnum):
    """Kinds of oddities; behind each the numbers of a case."""

    UNLISTED_VIDEO = 0
    """Annotation id, video id."""
    UNLISTED_CATEGORY = 1
    """Annotation id, video id."""
    NO_ANNOTATION = 2
    """None."""
    VIDEO_TWICE = 3
    """Video id."""
    ANNOTATION_TWICE = 4
    """Annotation id."""
    ID_ZERO = 5
    """None."""
    NO_AREAS = 6
    """Annotation id, video id."""
    UNKNOWN_CATEGORY = 7
    """Category id."""
    CONVERTED = 8
    """None."""
    NO_PREDICTION = 9
    """None."""
    NO_COMMON_CATEGORY = 10
    """None."""
    TRUTH_LENGTH = 11
    """Video id, frames of the track, frames of the video."""
    PREDICTION_LENGTH = 12
    """The same."""
    TRUTH_SIZE = 13
    """Video id, height and width of the mask, height and width of the video."""
    PREDICTION_SIZE = 14
    """The same."""
    NOT_COMPARABLE = 15
    """Video id, category id."""


_ANNOTATION = "annotation {0} of video {1}"
_FRAMES = "video {0}: {1} against {2} frames"
_PIXELS = "video {0}: {1}x{2} against {3}x{4}"
_WORDS: dict[Oddity, tuple[str, str]] = {
    Oddity.UNLISTED_VIDEO: (
        "annotations of videos that are not listed count for nothing",
        _ANNOTATION,
    ),
    Oddity.UNLISTED_CATEGORY: ("annotations of unlisted categories count for nothing", _ANNOTATION),
    Oddity.NO_ANNOTATION: (
        "the ground truth holds not one annotation, so no number can be given",
        "",
    ),
    Oddity.VIDEO_TWICE: ("video ids occur more than once, the last entry counts", "id {0}"),
    Oddity.ANNOTATION_TWICE: (
        "annotation ids occur more than once, the last is evaluated in place of each",
        "id {0}",
    ),
    Oddity.ID_ZERO: (
        "an annotation has id 0, to which the official evaluator counts every match as a "
        "false positive; number annotations from 1",
        "",
    ),
    Oddity.NO_AREAS: ("annotations without `areas` get those of their masks", _ANNOTATION),
    Oddity.UNKNOWN_CATEGORY: (UNKNOWN_CATEGORY, "category id {0}"),
    Oddity.CONVERTED: (
        "predictions hold polygons or plain runs, which challenge servers refuse",
        "",
    ),
    Oddity.NO_PREDICTION: ("there is not one prediction", ""),
    Oddity.NO_COMMON_CATEGORY: (
        "no prediction is of an annotated category, so every AP is 0; the category ids may "
        "be those of another vocabulary",
        "",
    ),
    Oddity.TRUTH_LENGTH: (_LENGTH.format("annotations"), _FRAMES),
    Oddity.PREDICTION_LENGTH: (_LENGTH.format("predictions"), _FRAMES),
    Oddity.TRUTH_SIZE: (_SIZE.format("annotations"), _PIXELS),
    Oddity.PREDICTION_SIZE: (_SIZE.format("predictions"), _PIXELS),
    Oddity.NOT_COMPARABLE: (
        "a prediction and a ground truth have no mask in common that could be compared: both "
        "empty, or sizes differ in every frame",
        "video {0}, category {1}",
    ),
}


def note(doubts: Doubts, kind: Oddity, *numbers: int) -> None:
    """Note one case.

    Args:
        doubts: where to.
        kind: what is odd.
        numbers: the details, as `Oddity` states them.
    """
    text, example = _WORDS[kind]
    doubts.add(text, example.format(*numbers))
