"""Pickles and torch files read without running them: arrays, plain values and containers.

A pickle is a small program whose one dangerous step is to look up a global by name and to call it.
Here a name leads to one of a few inert builders of this module (an ordered dict, an array of numpy,
a tensor of torch); any other name ends the reading with an error that says which it was. Notable:
neither numpy nor torch is handed anything by the file. An array is a description (`PickledArray`)
that is checked when it is asked for; storages of torch files are read at that moment, so that what
nobody asks for, such as an optimiser's state, costs nothing.

    content = read_untrusted(Path("R-50.pkl"))
    weight = content["model"]["stem.conv1.weight"].array()
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pmvis_core.errors import DataError, PmvisError, ResourceError

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""First value of a file of torch before 1.6."""
_ZIP_MAGIC = b"PK\x03\x04"
_BFLOAT16 = "bf2"
"""Our name of the type that numpy does not have."""
_ELEMENTS = frozenset(["b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
"""Types of numpy that are read, without their byte order."""


class PickledArray:
    """An array as a pickle describes it; nothing is believed until `array` is called."""

    __slots__ = ("_dtype", "_offset", "_read", "_shape", "_steps")

    def __init__(
        self,
        dtype: Any = None,
        shape: Any = (),
        steps: Any = None,
        offset: Any = 0,
        read: Callable[[], Any] = bytes,
    ) -> None:
        """Describe an array.

        Args:
            dtype: a `_DType`.
            shape: its sides.
            steps: strides in elements; None: C order without gaps.
            offset: the first element's place in the bytes, in elements.
            read: returns the bytes.
        """
        self._dtype, self._shape, self._steps = dtype, shape, steps
        self._offset, self._read = offset, read

    def __setstate__(self, state: Any) -> None:
        """Take numpy's (version, shape, type, whether in Fortran order, bytes)."""
        _, self._shape, self._dtype, fortran, content = state
        self._steps = _fortran_steps(self._shape) if fortran else None
        self._read = partial(_as_bytes, content)

    def array(self) -> NDArray[Any]:
        """Return a copy with an element type of the machine's own; bfloat16 becomes float32.

        Raises:
            ValueError: the description contradicts itself or the file, or the elements are objects.
        """
        try:
            return self._checked()
        except ValueError:
            raise
        except Exception as error:  # what the file gave may be anything
            raise ValueError(f"an array that is not whole ({error!r})") from error

    def _checked(self) -> NDArray[Any]:
        """Return the copy, or fail in any way."""
        if not isinstance(self._dtype, _DType):
            raise ValueError("an array without a type")
        flat = self._dtype.decode(self._read())
        shape = _whole_numbers(self._shape)
        steps = _c_steps(shape) if self._steps is None else _whole_numbers(self._steps)
        (offset,) = _whole_numbers((self._offset,))
        count = math.prod(shape)
        last = offset + sum((side - 1) * step for side, step in zip(shape, steps, strict=True))
        if count > flat.size or (count and last >= flat.size):
            raise ValueError(f"an array of {count} elements in a store of {flat.size}")
        if count == 0:
            return np.zeros(shape, flat.dtype)
        strides = [step * flat.itemsize for step in steps]
        return np.array(as_strided(flat[offset:], shape, strides, writeable=False))


def read_untrusted(file: Path) -> Any:
    """Read a pickle (of Python 2 or 3) or a torch file (of any version since 0.4).

    Returns:
        What was pickled. Arrays, scalars of numpy and tensors are `PickledArray`; ordered dicts
        are dicts.

    Raises:
        DataError: the file asks for a global that no array needs; it is named, and none was run.
        ResourceError: it is missing, cut off, or no such file.
    """
    try:
        with file.open("rb") as stream:
            if stream.peek(4)[:4] == _ZIP_MAGIC:
                return _read_zip(file)
            content = _Reader(stream, file).load()
            if isinstance(content, int) and content == _TORCH_MAGIC:
                return _read_legacy(stream, file)
            return content
    except PmvisError:
        raise
    except FileNotFoundError as error:
        raise ResourceError(f"weights `{file}` do not exist", "check the path") from error
    except Exception as error:  # a broken pickle raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResourceError(
            f"`{file}` is no checkpoint of plain tensors: {reason}",
            "the file may be cut off; get it again, or get the weights as safetensors",
        ) from error


def _read_zip(file: Path) -> Any:
    """Read a file of torch 1.6 or later: a pickle and one member a storage, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        pickles = [n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError("a zip file that torch did not write")
        pickled = pickles[0]
        folder = pickled.removesuffix("data.pkl")
        order = "<"
        if f"{folder}byteorder" in archive.namelist():
            order = {b"little": "<", b"big": ">"}[archive.read(f"{folder}byteorder")]
        with archive.open(pickled) as stream:
            read = partial(_read_member, file, folder)
            return _Reader(stream, file, read, order).load()


def _read_member(file: Path, folder: str, key: str, size: int) -> bytes:
    """Return a storage of a zip file."""
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{folder}data/{key}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < size:
            raise ValueError(f"storage {key} has {member.file_size} bytes, expected {size}")
        return archive.read(member)[:size]


def _read_legacy(stream: IO[bytes], file: Path) -> Any:
    """Read the rest of a file of torch before 1.6: pickles, then the storages one by one."""
    _Reader(stream, file).load()  # the protocol
    _Reader(stream, file).load()  # the machine that wrote it
    places: dict[str, tuple[int, int]] = {}
    reader = _Reader(stream, file, partial(_read_place, file, places))
    content = reader.load()
    for key in _Reader(stream, file).load():
        count = int.from_bytes(stream.read(8), "little")
        size = count * reader.item_sizes[key]
        places[key] = (stream.tell(), size)
        stream.seek(size, 1)
    return content


def _read_place(file: Path, places: dict[str, tuple[int, int]], key: str, size: int) -> bytes:
    """Return a storage of a legacy file."""
    start, there = places[key]
    if there < size:
        raise ValueError(f"storage {key} has {there} bytes, expected {size}")
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(size)


class _Reader(pickle.Unpickler):
    """An unpickler that knows the globals of `_BUILDERS` and no other."""

    def __init__(
        self,
        stream: IO[bytes],
        file: Path,
        read: Callable[[str, int], bytes] | None = None,
        order: str = "<",
    ) -> None:
        """Read a pickle of ``file``; ``read`` returns the storage of a key and a size in bytes."""
        # latin1 keeps the bytes of Python 2's strings, which may be an array's content.
        super().__init__(stream, encoding="latin1")
        self.file, self.read, self.order = file, read, order
        self.item_sizes: dict[str, int] = {}
        """Bytes an element of every storage that was named."""

    def find_class(self, module: str, name: str) -> _Inert:
        """Return the builder that stands for a global.

        Raises:
            DataError: there is none.
        """
        builder = _BUILDERS.get((module, name))
        if builder is None:
            raise DataError(
                f"`{self.file}` asks for `{module}.{name}`, which no tensor needs; it was not run",
                "get the weights as safetensors, or save the state dict alone",
            )
        return builder

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the description of a storage."""
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or self.read is None or not isinstance(key, str):
            raise ValueError("a reference to something outside of the file")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a view of a storage, as torch wrote it before 0.4")
        typed = _DType(dtype().code, order=self.order)
        (count,) = _whole_numbers((count,))
        self.item_sizes[key] = typed.item_size
        return _Storage(typed, partial(self.read, key, count * typed.item_size))


@dataclass(frozen=True)
class _Storage:
    """Where a tensor's elements lie."""

    dtype: _DType
    read: Callable[[], bytes]


class _DType:
    """A type of elements: its code and its byte order."""

    __slots__ = ("code", "order", "plain")

    def __init__(self, code: Any, *_: Any, order: str = "<") -> None:
        """Take numpy's code, such as ``f4``."""
        self.code, self.order, self.plain = code, order, True

    def __setstate__(self, state: Any) -> None:
        """Take numpy's (version, byte order, parts of a compound type, ...)."""
        self.order = state[1]
        self.plain = all(part is None for part in state[2:5])

    @property
    def item_size(self) -> int:
        """Return the bytes an element takes."""
        return int(self.code[-1])

    def decode(self, content: bytes) -> NDArray[Any]:
        """Return the flat elements of bytes, in the machine's byte order."""
        bare = str(self.code).lstrip("<>|=")
        order = ">" if self.order == ">" or str(self.code)[:1] == ">" else "<"
        if bare == _BFLOAT16:
            halves = np.frombuffer(content, f"{order}u2").astype(np.uint32)
            return (halves << 16).view(np.float32)
        if not self.plain or bare not in _ELEMENTS:
            raise ValueError(f"elements of type `{self.code}`, expected numbers")
        flat = np.frombuffer(content, order + bare)
        return flat.astype(flat.dtype.newbyteorder("="), copy=False)


class _Names(dict[Any, Any]):
    """An ordered dict; attributes that a file wants to give it are left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore torch's ``_metadata``."""


class _Inert:
    """What a global turns into: the file may call it, and do nothing else with it."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        """Stand for ``build``."""
        self._build = build

    def __call__(self, *args: Any) -> Any:
        """Build."""
        return self._build(*args)

    def __setstate__(self, state: Any) -> None:
        """Refuse to be changed."""
        raise ValueError("an attempt to change a global")


def _latin1(text: str, encoding: str) -> bytes:
    """Return the bytes that protocol 2 wrote as text."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Return what protocol 2 writes for no bytes."""
    return b""


def _from_buffer(content: Any, dtype: Any, shape: Any, order: str) -> PickledArray:
    """Describe an array of protocol 5."""
    steps = _fortran_steps(shape) if order == "F" else None
    return PickledArray(dtype, shape, steps, read=partial(_as_bytes, content))


def _scalar(dtype: Any, content: Any = b"") -> PickledArray:
    """Describe a number of numpy's."""
    return PickledArray(dtype, read=partial(_as_bytes, content))


def _tensor(storage: _Storage, offset: Any, shape: Any, steps: Any, *_: Any) -> PickledArray:
    """Describe a tensor; what follows its strides (gradient, hooks) is left out."""
    return PickledArray(storage.dtype, shape, steps, offset, storage.read)


def _parameter(tensor: PickledArray, *_: Any) -> PickledArray:
    """Return a parameter's tensor."""
    return tensor


def _empty(*_: Any) -> PickledArray:
    """Return an array whose description follows."""
    return PickledArray()


_TORCH_TYPES = {
    "Double": "f8",
    "Float": "f4",
    "Half": "f2",
    "BFloat16": _BFLOAT16,
    "Long": "i8",
    "Int": "i4",
    "Short": "i2",
    "Char": "i1",
    "Byte": "u1",
    "Bool": "b1",
}

_BUILDERS = {
    ("collections", "OrderedDict"): _Inert(_Names),
    ("_codecs", "encode"): _Inert(_latin1),
    ("__builtin__", "bytes"): _Inert(_no_bytes),
    ("numpy", "ndarray"): _Inert(_empty),
    ("numpy", "dtype"): _Inert(_DType),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Inert(_empty) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Inert(_scalar) for core in ("core", "_core")},
    **{
        (f"numpy.{core}.numeric", "_frombuffer"): _Inert(_from_buffer) for core in ("core", "_core")
    },
    ("torch._utils", "_rebuild_tensor"): _Inert(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Inert(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Inert(_parameter),
    ("torch", "Size"): _Inert(tuple),
    **{
        ("torch", f"{name}Storage"): _Inert(partial(_DType, code))
        for name, code in _TORCH_TYPES.items()
    },
}
"""(module, name) -> what stands for it."""


def _as_bytes(content: Any) -> bytes:
    """Return an array's bytes; Python 2 wrote them as a string."""
    if isinstance(content, str):
        return content.encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise ValueError("an array of objects")
    return bytes(content)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    """Return sides, strides or offsets, which may not be negative."""
    numbers = tuple(values)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"sides, strides or offsets of {numbers}")
    return numbers


def _c_steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of an array in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _fortran_steps(shape: Any) -> tuple[int, ...]:
    """Return the strides, in elements, of an array in Fortran order."""
    sides = _whole_numbers(shape)
    return tuple(math.prod(sides[:axis]) for axis in range(len(sides)))
