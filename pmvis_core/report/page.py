"""Pictures that people can look at: overlays on frames, contact sheets, a table of results.

    groups = [SheetGroup("clip1", source, (Strip("tracks", tracks),))]
    write_picture(Path("sheet.png"), contact_sheet(groups, names))

Every track keeps one colour through its video. Where several rows share an instance (one mask
under several categories) the best row is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pmvis_core import masks
from pmvis_core.errors import UsageError
from pmvis_core.files import atomic_write
from pmvis_core.report.drawing import (
    ACCENT,
    FADED,
    GREY,
    INK,
    NIGHT,
    PAPER,
    RULE,
    Colour,
    Frame,
    Tag,
    blank,
    enlarge,
    enlarge_mask,
    fitted,
    frame_border,
    place_tags,
    text_width,
    tint,
    track_colour,
    write,
)
from pmvis_core.types import Supervision, Track, VideoTracks
from pmvis_core.video.frames import FrameSource

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
SHEET_CELL = (184, 150)
"""Largest width and height of a frame on a contact sheet."""
_LEAST_SIDE, _MOST_SIDE = 384, 1280
"""Shortest side of small videos when enlarged, longest side of large ones, in pixels."""
_GUTTER = 4
_MARGIN = 18
_SIDE = 112
"""Width of the captions left of a contact sheet's frames."""
_MATCH = 0.3
"""Least track IoU at which a found track takes the colour of a true one."""


@dataclass(frozen=True)
class Strip:
    """One row of tracks to be drawn on a video's frames."""

    caption: str
    """What stands beside it (``truth``)."""
    tracks: tuple[Track, ...]
    """What is drawn; empty shows the bare frames."""
    colours: Mapping[int, Colour]
    """Colour of each track by its id."""
    scored: bool = True
    """Whether the labels show scores."""


@dataclass(frozen=True)
class SheetGroup:
    """One video on a contact sheet: strips of the same frames, one below the other."""

    title: str
    """The video's name."""
    source: FrameSource
    """Its frames."""
    strips: tuple[Strip, ...]
    """What is drawn on them, top first."""


@dataclass(frozen=True)
class ResultTable:
    """Figures to be drawn as a table."""

    columns: tuple[str, ...]
    """Headings; the first is that of the names."""
    rows: tuple[tuple[str, ...], ...]
    """One cell a column."""
    best: int | None = None
    """Row to be set in bold."""


def best_rows(tracks: Iterable[Track], min_score: float = 0.0) -> tuple[Track, ...]:
    """Return the best-scored row of each instance that reaches ``min_score``, best first."""
    chosen: dict[tuple[bool, int], Track] = {}
    for track in sorted(tracks, key=lambda track: (-track.score, track.id)):
        if track.score >= min_score and track.present:
            own = track.instance is None
            chosen.setdefault((own, track.id if track.instance is None else track.instance), track)
    return tuple(chosen.values())


def truth_strip(caption: str, tracks: Iterable[Track]) -> Strip:
    """Return the strip of true tracks, one colour each, without scores."""
    rows = best_rows(tracks)
    colours = {row.id: track_colour(number) for number, row in enumerate(rows)}
    return Strip(caption, rows, colours, scored=False)


def found_strip(
    caption: str, tracks: Iterable[Track], min_score: float, truth: Strip | None = None
) -> Strip:
    """Return the strip of a model's tracks.

    Args:
        caption: what stands beside it.
        tracks: rows; of those of one instance the best is drawn.
        min_score: rows below are left out.
        truth: if given, each track takes the colour of the true track that it overlaps (one to
            one, best first), and grey if there is none; else colours go by the tracks' numbers.
    """
    rows = best_rows(tracks, min_score)
    if truth is None:
        numbers = {row.id: row.id if row.instance is None else row.instance for row in rows}
        return Strip(caption, rows, {key: track_colour(number) for key, number in numbers.items()})
    overlaps = masks.track_ious([f.rles for f in rows], [t.rles for t in truth.tracks])
    pairs = [
        (float(overlaps[i, j]), f.id, t.id)
        for i, f in enumerate(rows)
        for j, t in enumerate(truth.tracks)
    ]
    colours: dict[int, Colour] = {}
    used: set[int] = set()
    for overlap, found_id, true_id in sorted(pairs, key=lambda pair: (-pair[0], pair[1:])):
        if overlap >= _MATCH and found_id not in colours and true_id not in used:
            colours[found_id] = truth.colours[true_id]
            used.add(true_id)
    return Strip(caption, rows, {row.id: colours.get(row.id, GREY) for row in rows})


def overlay(
    frame: Frame, strip: Strip, t: int, names: Mapping[int, str], size: tuple[int, int]
) -> Frame:
    """Draw the tracks of one frame over it.

    Args:
        frame: (H, W, 3) uint8 RGB at the video's size.
        strip: the tracks, worst on top so that small doubtful ones stay visible.
        t: the frame's index.
        names: category names by id.
        size: height and width of the result in pixels.

    Returns:
        A new picture (height, width, 3) uint8 RGB.
    """
    height, width = size
    canvas = enlarge(frame, height, width)
    letter = max(11.0, min(height / 20.0, 24.0))
    line = max(1, round(height / 200))
    tags: list[Tag] = []
    for track in strip.tracks:
        rle = track.rles[t]
        if rle is None:
            continue
        mask = enlarge_mask(masks.decode(rle), height, width)
        if not mask.any():
            continue
        colour = strip.colours[track.id]
        tint(canvas, mask, colour, 0.42, line)
        x, y, w, h = cv2.boundingRect(mask)
        text = names.get(track.category_id, f"category {track.category_id}")
        if strip.scored and track.supervision is Supervision.PSEUDO:
            text += f" {_frame_score(track, t):.2f}"
        tags.append(Tag(text, colour, (x, y, x + w, y + h)))
    place_tags(canvas, tags, letter)
    return canvas


def _frame_score(track: Track, t: int) -> float:
    """Return a track's score in a frame, or its mean where the frame has none."""
    score = track.frame_scores[t]
    return track.score if score is None else score


def overlay_video(groups: Iterable[SheetGroup], names: Mapping[int, str]) -> Iterator[Frame]:
    """Yield overlay frames of videos one after another, strips side by side, under a title bar.

    The first video decides the size of all frames; other shapes are centred on black.

    Args:
        groups: the videos, all with as many strips; read one at a time.
        names: category names by id.
    """
    size: tuple[int, int] | None = None
    for group in groups:
        size = size or _overlay_size(group)
        for t, frame in enumerate(group.source.frames()):
            panels = [_panel(group, strip, t, frame, names, size) for strip in group.strips]
            yield np.hstack(panels)


def _overlay_size(group: SheetGroup) -> tuple[int, int]:
    """Return height and width at which a video's labels can be read."""
    height, width = group.source.info.height, group.source.info.width
    scale = -(-_LEAST_SIDE // min(height, width)) if min(height, width) < _LEAST_SIDE else 1.0
    scale = min(scale, _MOST_SIDE / max(height, width))
    return max(2, round(height * scale)), max(2, round(width * scale))


def _panel(
    group: SheetGroup,
    strip: Strip,
    t: int,
    frame: Frame,
    names: Mapping[int, str],
    size: tuple[int, int],
) -> Frame:
    """Draw one strip of one frame with its title bar."""
    height, width = size
    bar = max(26, height // 14)
    panel = blank(bar + height, width, NIGHT)
    fit = _fit(group.source.info.height, group.source.info.width, (width, height))
    top, left = bar + (height - fit[0]) // 2, (width - fit[1]) // 2
    panel[top : top + fit[0], left : left + fit[1]] = overlay(frame, strip, t, names, fit)
    _title_bar(panel, bar, group, strip, t)
    return panel


def _title_bar(panel: Frame, bar: int, group: SheetGroup, strip: Strip, t: int) -> None:
    """Write video, strip and frame number above a panel."""
    size, base = bar * 0.55, round(bar * 0.68)
    count = f"{t + 1}/{group.source.info.length}"
    right = panel.shape[1] - 10 - text_width(count, size)
    write(panel, count, right, base, size, FADED)
    title = fitted(f"{group.title}  {strip.caption}", size, right - 20)
    write(panel, title, 10, base, size, PAPER)


def contact_sheet(
    groups: Sequence[SheetGroup],
    names: Mapping[int, str],
    *,
    columns: int = 6,
    title: str = "",
    table: ResultTable | None = None,
) -> Frame:
    """Draw videos as rows of frames; the key frame of the best track is framed.

    Args:
        groups: the videos.
        names: category names by id.
        columns: frames of a video, spread over its length.
        title: headline, if any.
        table: figures to stand under the headline, if any.

    Raises:
        UsageError: there is no video.
    """
    if not groups:
        raise UsageError("no video to draw", "choose others with `--videos`")
    width = 2 * _MARGIN + _SIDE + columns * (SHEET_CELL[0] + _GUTTER)
    blocks: list[Frame] = [blank(_MARGIN - 6, width)]
    if title:
        head = blank(38, width)
        write(head, fitted(title, 24, width - 2 * _MARGIN), _MARGIN, 24, 24, INK, bold=True)
        blocks.append(head)
    if table is not None:
        blocks += [draw_table(table, width), blank(10, width)]
    for group in groups:
        blocks.append(_group_block(group, names, columns, width))
    blocks.append(_footer(groups, width))
    return np.vstack(blocks)


def _group_block(group: SheetGroup, names: Mapping[int, str], columns: int, width: int) -> Frame:
    """Draw one video's strips under a thin rule."""
    info = group.source.info
    key = keyframe(group.strips[-1].tracks)
    shown = spread_frames(info.length, columns, key)
    fit = _fit(info.height, info.width, SHEET_CELL)
    canvas = blank(12 + len(group.strips) * (fit[0] + _GUTTER) + 6, width)
    canvas[4, _MARGIN:-_MARGIN] = RULE
    for column, t in enumerate(shown):
        frame = group.source[t]
        left = _MARGIN + _SIDE + column * (SHEET_CELL[0] + _GUTTER)
        left += (SHEET_CELL[0] - fit[1]) // 2
        for row, strip in enumerate(group.strips):
            top = 12 + row * (fit[0] + _GUTTER)
            cell = overlay(frame, strip, t, names, fit)
            if t == key and row == len(group.strips) - 1:
                frame_border(cell, ACCENT, 3)
            if row == 0:
                _corner_number(cell, t)
            canvas[top : top + fit[0], left : left + fit[1]] = cell
    for row, strip in enumerate(group.strips):
        _caption(canvas, 12 + row * (fit[0] + _GUTTER), group.title if row == 0 else "", strip)
    return canvas


def _corner_number(cell: Frame, t: int) -> None:
    """Write a frame's number into the lower left corner, legible on light and dark."""
    corner = cell[-17:, : text_width(str(t), 12) + 10]
    corner[:] = (corner * 0.35).astype(np.uint8)
    write(cell, str(t), 5, cell.shape[0] - 5, 12, PAPER)


def _caption(canvas: Frame, top: int, title: str, strip: Strip) -> None:
    """Write video and strip left of its frames."""
    lines = [(title, INK, True)] if title else []
    lines.append((strip.caption, FADED, False))
    for number, (text, colour, bold) in enumerate(lines):
        short = fitted(text, 14, _SIDE - 10)
        write(canvas, short, _MARGIN, top + 14 + 19 * number, 14, colour, bold)


def _footer(groups: Sequence[SheetGroup], width: int) -> Frame:
    """Explain the frame around key frames and, beside a truth, the colour grey."""
    canvas = blank(34, width)
    left, top = _MARGIN + _SIDE, 6
    if any(keyframe(group.strips[-1].tracks) is not None for group in groups):
        cv2.rectangle(canvas, (left, top), (left + 14, top + 11), ACCENT, 2)
        text = "key frame: where the best track scores highest"
        write(canvas, text, left + 24, top + 11, 13, FADED)
        left += 24 + text_width(text, 13) + 30
    if any(GREY in strip.colours.values() for group in groups for strip in group.strips):
        cv2.rectangle(canvas, (left, top), (left + 14, top + 11), GREY, -1)
        write(canvas, "grey: overlaps no true object", left + 24, top + 11, 13, FADED)
    return canvas


def keyframe(tracks: Sequence[Track]) -> int | None:
    """Return the frame `refine` started from for the best track, else its best-scored frame.

    None if there is no track, or if it is a human's, whose frames have no scores to compare.
    """
    if not tracks:
        return None
    best = min(tracks, key=lambda track: (-track.score, track.id))
    if best.keyframe is not None:
        return best.keyframe
    if best.supervision is not Supervision.PSEUDO:
        return None
    return max(best.present, key=lambda t: (_frame_score(best, t), -t))


def spread_frames(length: int, columns: int, key: int | None = None) -> list[int]:
    """Return at most ``columns`` frame numbers spread over a video, ``key`` among them."""
    count = min(length, columns)
    shown = [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]
    if key is not None and key not in shown:
        nearest = min(range(count), key=lambda i: abs(shown[i] - key))
        shown[nearest] = key
    return shown


def _fit(height: int, width: int, room: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (height, width) of the same shape within ``room`` (width, height)."""
    scale = min(room[0] / width, room[1] / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def draw_table(table: ResultTable, width: int) -> Frame:
    """Draw a table of figures (H, width, 3): names to the left, figures to the right."""
    size, step = 16, 27
    canvas = blank(step * (len(table.rows) + 1) + 8, width)
    rights = _column_ends(table, size)
    for row, cells in enumerate([table.columns, *table.rows]):
        base = step * row + 19
        bold = table.best is not None and row == table.best + 1
        for column, (text, right) in enumerate(zip(cells, rights, strict=True)):
            left = _MARGIN if column == 0 else right - text_width(text, size, bold)
            write(canvas, text, left, base, size, FADED if row == 0 else INK, bold)
    canvas[step, _MARGIN : rights[-1]] = RULE
    return canvas


def _column_ends(table: ResultTable, size: float) -> list[int]:
    """Return the right edge of each column."""
    ends: list[int] = []
    at = _MARGIN
    for cells in zip(table.columns, *table.rows, strict=True):
        at += max(text_width(cell, size, bold=True) for cell in cells) + (34 if ends else 0)
        ends.append(at)
    return ends


def write_picture(path: Path, picture: Frame) -> None:
    """Write an RGB picture as PNG or JPEG by its suffix; it appears when it is complete.

    Raises:
        UsageError: another suffix.
        ResourceError: the place cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        raise UsageError(f"cannot write a picture to `{path}`", "name it `.png` or `.jpg`")
    options = (
        [cv2.IMWRITE_PNG_COMPRESSION, 9] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 92]
    )
    _, data = cv2.imencode(suffix, picture[:, :, ::-1], options)
    with atomic_write(path, "wb") as stream:
        stream.write(data.tobytes())


def demo_picture(
    videos: Sequence[tuple[FrameSource, VideoTracks, Mapping[str, VideoTracks]]],
    names: Mapping[int, str],
    table: ResultTable,
    *,
    min_score: float = 0.3,
    title: str = "pmvis: video instance segmentation without video annotation",
) -> Frame:
    """Draw the demo's result: the table of models, and under it truth and models on videos.

    Args:
        videos: frames, truth, and each model's tracks by its caption, in the order of the rows.
        names: category names by id.
        table: the results.
        min_score: tracks below it are not drawn.
        title: the headline.
    """
    groups: list[SheetGroup] = []
    for source, truth, models in videos:
        true = truth_strip("truth", truth.tracks)
        found = (found_strip(c, v.tracks, min_score, true) for c, v in models.items())
        groups.append(SheetGroup(source.info.name, source, (true, *found)))
    return contact_sheet(groups, names, title=title, table=table)
