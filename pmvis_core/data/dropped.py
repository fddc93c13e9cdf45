"""What tracks that a filter dropped become in training: ignored regions, or background.

A missed object trained as background teaches the model to miss; a false one trained as an ignored
region teaches nothing. The paper trains them as background, for its filter leaves no trace of them.
"""

from __future__ import annotations

from pathlib import Path

from pmvis_core.errors import DataError
from pmvis_core.tracks_json import TracksHeader


def check_set_aside(header: TracksHeader, tracks: Path) -> None:
    """Refuse a file, which holds no ignored track, from which a stage dropped tracks for good.

    Raises:
        DataError: naming the stage.
    """
    for entry in header.lineage:
        filtered = entry.get("stage") == "filter" and not entry.get("keep_ignored")
        if filtered or "keep" in entry:
            raise DataError(
                f"`{tracks}` was written without the tracks that `{entry['stage']}` dropped, so "
                "they cannot be ignored regions",
                "filter with `--keep-ignored` (and `refine` without `--topk` and `--pscore`), or "
                "leave out `--dropped ignore`",
            )
