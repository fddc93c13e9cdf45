"""The house's stairs: imports go down only, and the light commands never load torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS: dict[int, frozenset[str]] = {
    5: frozenset(
        "train training propagator_training infer inference refine mending propagation filter "
        "evaluation submission data_check report synthetic demo doctor self_train".split()
    ),
    4: frozenset(["systems"]),
    3: frozenset("models weights checkpoint association".split()),
    2: frozenset("nn matching weak_losses losses reid_losses data devices".split()),
    1: frozenset(
        "masks ops formats tracks_io tracks_json video categories image_sets config".split()
    ),
    0: frozenset("types errors doubts files native progress rle_numpy allocator".split()),
}
"""Floor -> modules and packages of `pmvis_core` that live there; the command line is floor 6."""

FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
TOP = 6
MODULES = sorted((ROOT / "pmvis_core").rglob("*.py"))
DOORS = sorted((ROOT / "pmvis_cli").rglob("*.py"))

CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.rglob("*.*"))
FOLDERS = ["rle", "masks", "formats", "evaluation", "ops/common", "ops/deformable_attention"]
FOLDERS += ["ops/local_attention", "ops/pairwise", "ops/clip_pairwise", "ops/mask_runs", "ops"]
"""Of `csrc`; each uses what stands before it, and itself."""


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Yield the dotted names of the modules that a file imports, type checking aside."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not inside_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


def place(path: Path) -> str:
    """Return the module or package of `pmvis_core` that a file belongs to."""
    first = path.relative_to(ROOT / "pmvis_core").parts[0]
    return first.removesuffix(".py")


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_every_module_has_a_floor(path: Path) -> None:
    assert place(path) == "__init__" or place(path) in FLOOR_OF


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_go_down_the_stairs(path: Path) -> None:
    floor = FLOOR_OF.get(place(path), 0)
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] != "pmvis_cli", f"{ids(path)} imports the command line"
        if parts[0] != "pmvis_core" or parts[1:] in ([], ["__version__"]):
            continue
        assert parts[1] in FLOOR_OF, f"{ids(path)} imports {name}, which has no floor"
        assert FLOOR_OF[parts[1]] <= floor, f"{ids(path)} (floor {floor}) imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_torch_is_imported_from_the_second_floor_up(path: Path) -> None:
    allowed = FLOOR_OF.get(place(path), 0) >= 2 or place(path) == "ops"
    light = place(path) in {"filter", "evaluation", "submission"}
    for name in imports(path):
        if name.split(".")[0] in {"torch", "torchvision"}:
            assert allowed and not light, f"{ids(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_parts_of_networks_import_none_of_their_siblings(path: Path) -> None:
    if place(path) != "nn":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "pmvis_core" and FLOOR_OF.get(parts[1]) == 2:
            assert parts[1] in {"nn", "samples"}, f"{ids(path)} imports {name}"


@pytest.mark.parametrize("path", DOORS, ids=ids)
def test_the_door_loads_lazily(path: Path) -> None:
    light = {"typer", "pmvis_cli", "pmvis_core", "rich", "__future__", *sys.stdlib_module_names}
    for name in imports(path, inside_functions=False):
        parts = name.split(".")
        assert parts[0] in light, f"{ids(path)} imports {name} at its head"
        if parts[0] == "pmvis_core":
            assert parts[1] in {"errors", "__version__"}, f"{ids(path)} imports {name} at its head"


@pytest.mark.parametrize("path", [*MODULES, *DOORS], ids=ids)
def test_no_star_import_and_no_print_in_the_house(path: Path) -> None:
    tree = ast.parse(path.read_text())
    stars = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    prints = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "print"]
    assert not stars
    assert not prints


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_folders_of_csrc_use_those_before_them(path: Path) -> None:
    place = FOLDERS.index(path.parent.relative_to(CSRC).as_posix())
    for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
        if name == "emulator.h":  # tests/emulator plays the GPU
            continue
        assert (CSRC / name).is_file(), f"{ids(path)} includes {name}: not a path from csrc/ on"
        assert FOLDERS.index(Path(name).parent.as_posix()) <= place, f"{ids(path)} includes {name}"


@pytest.mark.parametrize(
    "module",
    [
        "pmvis_cli.app",
        "pmvis_cli.filter",
        "pmvis_core.filter",
        "pmvis_core.evaluation",
        "pmvis_core.submission.check",
        "pmvis_core.image_sets",
        "pmvis_core.formats.ytvis",
    ],
)
def test_light_modules_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0, f"{module} loads torch"
