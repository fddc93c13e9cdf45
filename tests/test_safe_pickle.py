"""Untrusted pickles: what is read equals what was written, and nothing of it ever runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from pmvis_core.errors import DataError, PmvisError, ResourceError
from pmvis_core.weights.safe_pickle import PickledArray, _DType, read_untrusted

ARRAYS = arrays_of.arrays(
    st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i8", ">i4", "|u1", "|b1"]),
    arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


def read(content: bytes, folder: Path) -> Any:
    """Read a file of these bytes."""
    (folder / "file").write_bytes(content)
    return read_untrusted(folder / "file")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pickles")


@given(ARRAYS, st.integers(0, 5), st.booleans())
@settings(max_examples=200, deadline=None)
def test_arrays_survive_every_protocol(
    folder: Path, array: np.ndarray[Any, Any], protocol: int, fortran: bool
) -> None:
    array = np.asarray(array, order="F" if fortran else "C")
    found = read(pickle.dumps({"model": OrderedDict(a=array)}, protocol), folder)
    values = found["model"]["a"].array()
    assert values.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(values, array)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes text and bytes as Python 2 wrote its one kind of string."""

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch: ClassVar[Any] = {
        **pickle._Pickler.dispatch,  # type: ignore[attr-defined]
        str: save_string,
        bytes: save_string,
    }


def test_pickles_of_python_2(folder: Path) -> None:
    stream = io.BytesIO()
    values = np.arange(-300, 300, dtype=np.float32).reshape(20, 30)
    Python2Pickler(stream, 2).dump({"blobs": {"conv1_w": values}})
    found = read(stream.getvalue(), folder)
    np.testing.assert_array_equal(found["blobs"]["conv1_w"].array(), values)


def test_scalars_of_numpy_and_plain_values(folder: Path) -> None:
    content = {"lr": np.float64(1e-4), "n": 3, "names": ["a", None, True, 2.5, (1, {"x"})]}
    found = read(pickle.dumps(content), folder)
    assert found["lr"].array() == 1e-4
    assert (found["n"], found["names"]) == (3, ["a", None, True, 2.5, (1, {"x"})])


@pytest.mark.parametrize("modern", [True, False])
def test_torch_files_old_and_new(modern: bool, folder: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "plain": base,
        "transposed": base.t(),
        "part": base[1:, ::2],
        "parameter": torch.nn.Parameter(base[0].clone()),
        "half": torch.tensor([0.5, -2.0]).half(),
        "brain": torch.tensor([0.1, -3.0, 1e30]).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    content = {"model": OrderedDict(tensors), "numpy": np.ones(3), "lr": np.float32(0.1)}
    torch.save(content, folder / "t.pth", _use_new_zipfile_serialization=modern)
    found = read_untrusted(folder / "t.pth")["model"]
    for name, tensor in tensors.items():
        wanted = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
        np.testing.assert_array_equal(found[name].array(), wanted.numpy())


def test_what_is_not_asked_for_is_not_read(folder: Path) -> None:
    torch.save({"big": torch.zeros(1000), "small": torch.ones(2)}, folder / "t.pth")
    with zipfile.ZipFile(folder / "t.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "u.pth", "w") as archive:
        for name, content in members.items():
            if not name.endswith("data/0"):
                archive.writestr(name, content)
    found = read_untrusted(folder / "u.pth")
    assert found["small"].array().tolist() == [1, 1]
    with pytest.raises(ValueError, match="not whole"):
        found["big"].array()


class Call:
    """Pickles as a call of a global; what it stands for need not exist."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def text(module: str, name: str, *more: str) -> bytes:
    """Return a pickle by hand: a global, called with texts."""
    arguments = b"".join(b"V" + word.encode() + b"\n" for word in more)
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + arguments + b"tR."


COMMAND = "touch exploded"
ORDERED = b"ccollections\nOrderedDict\n"
ATTACKS: dict[str, bytes] = {
    "posix.system": pickle.dumps(Call(os.system, COMMAND)),
    "os.system": text("os", "system", COMMAND),
    "builtins.eval": pickle.dumps(Call(eval, "open('exploded', 'w')")),
    "__builtin__.exec": pickle.dumps({"model": {"a": Call(exec, "open('exploded', 'w')")}}, 0),
    "__builtin__.eval": text("__builtin__", "eval", "open('exploded','w')"),
    "subprocess.Popen": pickle.dumps([1, (2, Call(subprocess.Popen, COMMAND.split()))]),
    "builtins.getattr": pickle.dumps(Call(getattr, Call(getattr, "a", "b"), "c")),
    "functools.partial": text("functools", "partial", "x"),
    "operator.attrgetter": text("operator", "attrgetter", "x"),
    "torch.load": text("torch", "load", "x"),
    "numpy.load": text("numpy", "load", "x"),
    "numpy.core.multiarray._reconstruct.__globals__": text(
        "numpy.core.multiarray", "_reconstruct.__globals__"
    ),
    "collections.OrderedDict.fromkeys": text("collections", "OrderedDict.fromkeys"),
    "_codecs.lookup": text("_codecs", "lookup", "latin1"),
    "pathlib.Path.touch": b"\x80\x04\x8c\x07pathlib\x94\x8c\x0aPath.touch\x94\x93.",
    "collections.Counter": pickle.dumps(collections.Counter("ab")),
    "copyreg._reconstructor": text("copyreg", "_reconstructor", "x"),
}
"""What a pickle asks for, and the pickle."""


@pytest.mark.parametrize("asked", ATTACKS)
def test_a_global_that_no_array_needs_is_named_and_not_run(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"`{asked}`, which no tensor needs; it was not run"):
        read(ATTACKS[asked], tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("modern", [True, False])
def test_attacks_inside_torch_files(
    modern: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": OrderedDict(a=torch.zeros(2), b=Call(os.system, COMMAND))}
    torch.save(content, tmp_path / "t.pth", _use_new_zipfile_serialization=modern)
    with pytest.raises(DataError, match=r"`posix.system`"):
        read_untrusted(tmp_path / "t.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        ORDERED + b"(dVx\nVy\nsb.",  # attributes for the builder itself
        ORDERED + b"(N(dVitems\nVy\nstb.",  # the same through slots
        b"cnumpy\ndtype\n(dV__call__\nVy\nsb.",
        b"\x80\x02" + ORDERED + b")\x81.",  # __new__ of a builder
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x02Vx\nQ.",  # a reference outside of a torch file
        b"ctorch._utils\n_rebuild_tensor_v2\n(Vx\nI0\n(tR.",
        b"(i_codecs\nencode\n.",
    ],
)
def test_builders_cannot_be_changed_or_misused(pickled: bytes, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no checkpoint of plain tensors"):
        read(pickled, tmp_path)
    intact = read(pickle.dumps(OrderedDict(a=np.ones(1)), 2), tmp_path)
    assert list(intact) == ["a"]
    assert intact["a"].array() == 1


def test_a_storage_type_that_is_changed_stays_what_it_is(tmp_path: Path) -> None:
    read(b"ctorch\nFloatStorage\n(tR(I3\nV>\nNNNtb.", tmp_path)
    torch.save({"x": torch.ones(1), "y": np.ones(1)}, tmp_path / "t.pth")
    assert read_untrusted(tmp_path / "t.pth")["x"].array() == 1


def test_attributes_of_an_ordered_dict_are_left_out(tmp_path: Path) -> None:
    weights = OrderedDict(a=1)
    weights._metadata = {"version": 1}  # type: ignore[attr-defined]
    found = read(pickle.dumps(weights, 2), tmp_path)
    assert found == {"a": 1}
    assert not hasattr(found, "_metadata")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([None, "x"]), "an array of objects"),
        (np.array(["x", "y"]), "elements of type `U1`"),
        (np.zeros(2, [("a", "f4")]), "elements of type `V4`"),
        (np.array([1j]), "elements of type `c16`"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused_when_asked_for(
    array: Any, message: str, tmp_path: Path
) -> None:
    found = read(pickle.dumps({"odd": array, "fine": np.ones(1)}, 4), tmp_path)
    assert found["fine"].array() == 1
    with pytest.raises(ValueError, match=message):
        found["odd"].array()


@pytest.mark.parametrize(
    ("shape", "steps", "offset"),
    [((7,), None, 0), ((2, 3), (3, 2), 0), ((2,), (1,), 5), ((-1,), None, 0), ((9,), (0,), 0)],
)
def test_arrays_larger_than_their_store_are_refused(shape: Any, steps: Any, offset: int) -> None:
    values = np.arange(6, dtype="<f4")
    whole = PickledArray(_DType("f4"), (2, 3), None, 0, values.tobytes)
    np.testing.assert_array_equal(whole.array(), values.reshape(2, 3))
    with pytest.raises(ValueError, match=r"elements in a store of 6|sides, strides or offsets"):
        PickledArray(_DType("f4"), shape, steps, offset, values.tobytes).array()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_spoilt_pickles_end_in_one_of_our_errors(folder: Path, data: st.DataObject) -> None:
    whole = pickle.dumps({"model": OrderedDict(a=np.arange(4.0), b=np.float32(1))}, 2)
    spoilt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(spoilt[: data.draw(st.integers(0, len(spoilt)))])
    try:
        found = read(content, folder)
    except PmvisError:
        return
    model = found.get("model") if isinstance(found, dict) else None
    for value in model.values() if isinstance(model, dict) else ():
        if isinstance(value, PickledArray):
            with suppress(ValueError):
                value.array()


@pytest.mark.parametrize("size", [0, 1, 30, 200, 500])
def test_files_that_are_cut_off(size: int, tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(9), "b": np.ones(3)}}, tmp_path / "t.pth")
    content = (tmp_path / "t.pth").read_bytes()[:size]
    with pytest.raises(ResourceError, match="no checkpoint of plain tensors"):
        read(content, tmp_path)


def test_files_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="do not exist"):
        read_untrusted(tmp_path / "absent.pkl")


AUDITED = """
import sys
from pathlib import Path
from pmvis_core.errors import PmvisError
from pmvis_core.weights.safe_pickle import read_untrusted

files = sorted(Path(sys.argv[1]).iterdir())
read_untrusted(files[-1])["model"]["a"].array()  # imports what reading needs
watching = True

def watch(event, arguments):
    if watching and not event.startswith(("open", "object.", "marshal.", "os.scandir")):
        print("event", event, arguments)
    if watching and event == "open" and arguments[1] not in ("r", "rb", None):
        print("writes", arguments)

sys.addaudithook(watch)
for file in files:
    try:
        read_untrusted(file)["model"]["a"].array()
    except PmvisError as error:
        print(type(error).__name__)
watching = False
"""


def test_an_audited_process_does_nothing_but_read(tmp_path: Path) -> None:
    for number, content in enumerate(ATTACKS.values()):
        (tmp_path / f"attack{number}").write_bytes(content)
    (tmp_path / "good").write_bytes(pickle.dumps({"model": {"a": np.ones(2)}}))
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.split() == ["DataError"] * len(ATTACKS)
