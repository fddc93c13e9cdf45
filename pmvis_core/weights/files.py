"""Files of weights as named tensors: safetensors, torch files of any age, and pickles of arrays.

What a file is follows from its first bytes; only the name ``.safetensors`` is taken at its word.
No code from a file is ever executed: safetensors hold tensors only, and pickles are read by torch's
tensors-only unpickler or, where that gives up on arrays of numpy, by ``safe_pickle.py``.

    tensors, about = read_file(Path("R-50.pkl"))
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pmvis_core.errors import ResourceError
from pmvis_core.weights.safe_pickle import PickledArray, read_untrusted

METADATA_KEY = "pmvis"
"""Under which a model of ours keeps its config and vocabulary in a safetensors file."""
_CONTAINERS = ("model", "state_dict", "blobs")
"""Where files keep their tensors: detectron2 and most others, torch trainers, Caffe2."""


def read_file(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return a file's named tensors and, of a model of ours, its metadata.

    What is no tensor is left out, and the prefix of torch's data parallel wrapper is taken off.
    Tensors of torch's zip files stay on disk until they are used.

    Raises:
        ResourceError: the file is missing, is no checkpoint, or holds no tensors.
        DataError: it asks for something else than arrays; `safe_pickle.read_untrusted`.
    """
    if not file.is_file():
        raise ResourceError(
            f"weights `{file}` do not exist", "train them first, or check the path of the option"
        )
    if file.suffix == ".safetensors" or _looks_like_safetensors(file):
        tensors, metadata = _read_safetensors(file)
        return _without_wrapper(tensors), metadata.get(METADATA_KEY)
    return _without_wrapper(_named_tensors(_read_pickled(file), file)), None


def _read_pickled(file: Path) -> object:
    """Return what a torch file or a pickle holds."""
    mapped = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception:  # whatever torch's reader would not take is judged by ours
        return read_untrusted(file)


def _looks_like_safetensors(file: Path) -> bool:
    """Tell a safetensors file by its first bytes: the length of a JSON object, and its brace."""
    with file.open("rb") as stream:
        head = stream.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file."""
    try:
        with safe_open(file, "pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}
            return tensors, stream.metadata() or {}
    except SafetensorError as error:
        raise ResourceError(
            f"`{file}` is not a safetensors file ({error})",
            "the file may be cut off; a pickle needs another name",
        ) from error


def _named_tensors(content: object, file: Path) -> dict[str, Tensor]:
    """Return the tensors of what a torch file or a pickle held."""
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ResourceError(f"`{file}` holds a {type(content).__name__}, expected named tensors")
    found = {}
    for name, value in content.items():
        tensor = _as_tensor(value, f"`{file}`: `{name}`")
        if isinstance(name, str) and tensor is not None:
            found[name] = tensor
    if not found:
        raise ResourceError(f"`{file}` holds no named tensors")
    return found


def _as_tensor(value: object, where: str) -> Tensor | None:
    """Return a tensor or an array as a tensor, and None for anything else."""
    if not isinstance(value, PickledArray):
        return value if isinstance(value, Tensor) else None
    try:
        return torch.from_numpy(value.array())
    except ValueError as error:
        raise ResourceError(f"{where} cannot be read: {error}") from error


def _without_wrapper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefix that torch's data parallel wrapper adds."""
    if not all(name.startswith("module.") for name in tensors):
        return tensors
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
