"""Which of the forms of training data a file has."""

from __future__ import annotations

from pathlib import Path

from pmvis_core.errors import DataError
from pmvis_core.formats.coco import is_coco
from pmvis_core.formats.ytvis import read_document, shown, sniff


def is_stills(path: Path) -> bool:
    """Tell COCO instances from labelled videos.

    A file that never names ``videos`` is not parsed for it, as COCO's are large.

    Raises:
        DataError: the file is missing, or is a folder or a results list.
    """
    if not path.is_file():
        what = "is a folder, expected a file" if path.is_dir() else "does not exist"
        raise DataError(
            f"training data `{path}` {what}",
            "for a folder of XML, make a file with `pmvis map-categories` first"
            if path.is_dir()
            else "check the path, or make the file first",
        )
    kind = sniff(path)
    if kind == "results":
        raise DataError(
            f"{shown(path)} is a list, which is no training data",
            "`pmvis check` is for submissions",
        )
    if kind == "tracks":
        return False
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b" and b'"videos"' not in data:
        return True
    return is_coco(read_document(path, "training data"))
