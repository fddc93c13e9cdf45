"""States that a run resumes from: the last two, so that one which is damaged costs little.

``state.pt`` is the newest and ``state.previous.pt`` the one before it. A state appears whole or not
at all; what the disk does to it later shows in the checksums of its archive, which are compared
before anything is read. No code of the file is ever run.
"""

from __future__ import annotations

import logging
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pmvis_core.errors import ResourceError
from pmvis_core.files import atomic_write, part_path

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
PREVIOUS_FILE = "state.previous.pt"
_DAMAGED = (
    *(OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What reading an archive raises whose bytes were changed, `NotImplementedError` among them."""


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the newest state; the newest so far becomes the previous one.

    Args:
        folder: the run folder.
        state: tensors and plain values.

    Raises:
        ResourceError: there is no room for it; the states so far are as they were.
    """
    newest = folder / STATE_FILE
    with room_for(newest), atomic_write(newest, "wb") as stream:
        torch.save(dict(state), stream)
        stream.flush()
        os.fsync(stream.fileno())
        # Killed from here on, the previous state is there at least.
        if newest.exists():
            os.replace(newest, folder / PREVIOUS_FILE)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Give back what half a file of a run takes up where the system refuses the rest.

    Raises:
        ResourceError: it does (a full disk, a quota); what to do is said there.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch's writer hides the system's words
        if cause is None:
            raise
        part_path(path).unlink(missing_ok=True)
        raise ResourceError(
            f"cannot write `{path}`: {cause.strerror or cause}",
            "make room; the same command goes on from the last state that was saved",
        ) from error


def find_state(folder: Path) -> Path | None:
    """Return the newest state that is whole, None in a folder without any.

    A damaged one is removed, with a warning.

    Raises:
        ResourceError: there are states, and all are damaged; or one cannot be opened, which says
            nothing about what it holds.
    """
    written = [path for name in (STATE_FILE, PREVIOUS_FILE) if (path := folder / name).exists()]
    for path in written:
        if _is_whole(path):
            return path
        if path != written[-1]:
            logger.warning("`%s` is damaged; going on from `%s`", path, written[-1])
            path.unlink()
    if written:
        raise ResourceError(
            f"`{written[-1]}` is no state that pmvis wrote, or it is damaged",
            "remove it to begin the run anew",
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read a state, its tensors to the CPU.

    Raises:
        ResourceError: the file is something else.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        message = f"`{path}` is no state that pmvis wrote"
        raise ResourceError(message, "remove it to begin the run anew") from error
    return state


def remove_states(folder: Path) -> None:
    """Remove all states, and what a killed run left of one."""
    for name in (STATE_FILE, PREVIOUS_FILE, f"{STATE_FILE}.part"):
        (folder / name).unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Compare the checksums of all parts of a state, and see that torch finds its way in it."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ResourceError(f"cannot read `{path}`: {error.strerror}") from error
    with stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                if archive.testzip() is not None:
                    return False
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads no tensor
            return True
        except _DAMAGED:
            return False
