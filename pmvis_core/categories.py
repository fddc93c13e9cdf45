"""From the categories of COCO and ImageNet-bbox to a target vocabulary (PM-VIS+, Table I).

The vocabularies of YouTube-VIS 2019, 2021 and OVIS and the paper's maps are package data
(``category_tables.json``); own vocabularies come from a file. Several source categories may map to
one target (skis and snowboard to snowboard); a source category without a target is left out.

    target = load_target("ytvis2019")
    sources = [match_source(target, COCO, read_coco(path).categories)]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from pmvis_core.config import read_toml
from pmvis_core.errors import DataError, UsageError
from pmvis_core.files import read_json
from pmvis_core.types import Category

BUILTIN_TARGETS = ("ytvis2019", "ytvis2021", "ovis")
"""Vocabularies that need no file."""

COCO = "coco"
"""The source with masks."""
IMAGENET = "imagenet"
"""The source with boxes only; its names may be WordNet ids."""
SOURCES = (COCO, IMAGENET)

LONG_BEGINNING = 5
"""Letters that two names must share at their beginning to be suggested (motorcycle, motorbike)."""

_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "wolves": "wolf",
    "calves": "calf",
    "leaves": "leaf",
    "knives": "knife",
    "buses": "bus",
}


@dataclass(frozen=True)
class Target:
    """A vocabulary and, where they are known, the maps of sources onto it."""

    name: str
    """As written into ``categories.json``."""
    categories: tuple[Category, ...]
    """In the order of their ids."""
    maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Source (`SOURCES`) -> source category (name, WordNet id or id as text) -> target name."""

    def id_of(self, name: str) -> int:
        """Return the id of a target category by its exact name."""
        return next(category.id for category in self.categories if category.name == name)


@dataclass(frozen=True)
class Unmatched:
    """A source category that maps to nothing."""

    category: Category
    """Of the source."""
    suggestions: tuple[str, ...] = ()
    """Names of near target categories, nearest first; only where names were compared."""


@dataclass(frozen=True)
class SourceMap:
    """What became of each category of one source."""

    source: str
    """`COCO` or `IMAGENET`."""
    target_ids: Mapping[int, int]
    """Source category id -> target category id."""
    unmatched: tuple[Unmatched, ...]
    """The rest, in the source's order."""
    many_to_one: Mapping[str, tuple[str, ...]]
    """Target name -> source names, where there are several."""

    @property
    def classes(self) -> int:
        """Source categories that map to something (Table I's ``21`` of ``21 / 19``)."""
        return len(self.target_ids)

    @property
    def targets(self) -> int:
        """Target categories that are reached (the ``19``)."""
        return len(set(self.target_ids.values()))


def load_target(spec: str) -> Target:
    """Return a built-in vocabulary by name, or read one from a JSON or TOML file.

    A file holds ``name``, ``categories`` (names, or objects with ``id`` and ``name``) and, if
    wanted, ``coco`` and ``imagenet``: source category -> target name.

    Raises:
        UsageError: neither a built-in name nor a file.
        DataError: the file is malformed or its maps name no category of it.
    """
    if spec in BUILTIN_TARGETS:
        return _target_from(_tables()[spec], spec, "category_tables.json")
    path = Path(spec)
    if not path.is_file():
        near = get_close_matches(spec, BUILTIN_TARGETS, n=1)
        raise UsageError(
            f"no target vocabulary `{spec}`." + (f" Did you mean `{near[0]}`?" if near else ""),
            f"give one of {', '.join(BUILTIN_TARGETS)}, or a JSON or TOML file",
        )
    read = read_toml if path.suffix == ".toml" else read_json
    value = read(path, "target vocabulary")
    return _target_from(value, path.stem, str(path))


def match_source(
    target: Target, source: str, categories: Iterable[Category], *, by_name: bool = False
) -> SourceMap:
    """Map a source's categories to a target vocabulary.

    Args:
        target: the vocabulary.
        source: `COCO` or `IMAGENET`.
        categories: the source's own.
        by_name: compare names even if the target has a map for this source. Without such a map
            names are compared anyway.

    Names are the same if they differ only in case, spaces, underscores, hyphens or plural. A
    WordNet id is compared by the name that the built-in maps give it.
    """
    known = target.maps.get(source)
    if by_name or known is None:
        return _match_by_name(target, source, categories)
    lookup = {_key(name): wanted for name, wanted in known.items()}
    ids: dict[int, int] = {}
    unmatched = []
    seen = []
    for category in categories:
        seen.append(category)
        # an id counts as one only where the map has no name for it
        wanted = lookup.get(_key(category.name), known.get(str(category.id)))
        if wanted is None:
            unmatched.append(Unmatched(category))
        else:
            ids[category.id] = target.id_of(wanted)
    return SourceMap(source, ids, tuple(unmatched), _several(target, ids, seen))


def without_source(target: Target, reached: Iterable[int]) -> tuple[Category, ...]:
    """Return the target categories whose ids are not among ``reached``."""
    found = set(reached)
    return tuple(category for category in target.categories if category.id not in found)


def normalised(name: str) -> str:
    """Return the form in which names are compared: ``Tennis-Rackets`` -> ``tennis racket``."""
    words = re.sub(r"[\W_]+", " ", name.casefold()).split()
    return " ".join([*words[:-1], *map(_singular, words[-1:])])


def suggestions(name: str, target: Target) -> tuple[str, ...]:
    """Return up to three target names that are spelt like ``name``, or share a word or a start."""
    plain = {normalised(category.name): category.name for category in target.categories}
    wanted = normalised(name)
    near = get_close_matches(wanted, plain, n=3, cutoff=0.75)
    near += [key for key in plain if set(key.split()) & set(wanted.split())]
    near += [key for key in plain if key[:LONG_BEGINNING] == wanted[:LONG_BEGINNING]]
    return tuple(plain[key] for key in list(dict.fromkeys(near))[:3])


def wordnet_names() -> dict[str, str]:
    """Return the names that the built-in maps give to WordNet ids."""
    names: dict[str, str] = {}
    for table in _tables().values():
        for wordnet_id, name in table[IMAGENET].items():
            names.setdefault(wordnet_id, name)
    return names


def _match_by_name(target: Target, source: str, categories: Iterable[Category]) -> SourceMap:
    """Map by names, with suggestions for those that find none."""
    exact = {category.name: category.id for category in target.categories}
    keys = _distinct_keys(target)
    spoken = wordnet_names()
    ids: dict[int, int] = {}
    unmatched = []
    seen = []
    for category in categories:
        seen.append(category)
        name = spoken.get(category.name, category.name)
        found = exact.get(name, keys.get(_key(name)))
        if found is None:
            unmatched.append(Unmatched(category, suggestions(name, target)))
        else:
            ids[category.id] = found
    return SourceMap(source, ids, tuple(unmatched), _several(target, ids, seen))


def _several(
    target: Target, ids: Mapping[int, int], categories: Iterable[Category]
) -> dict[str, tuple[str, ...]]:
    """Return the targets that several source categories share, with those categories."""
    groups: dict[int, list[str]] = {}
    for category in categories:
        if category.id in ids:
            groups.setdefault(ids[category.id], []).append(category.name)
    names = {category.id: category.name for category in target.categories}
    return {names[key]: tuple(group) for key, group in groups.items() if len(group) > 1}


def _distinct_keys(target: Target) -> dict[str, int]:
    """Return the target's ids by comparable name.

    Raises:
        DataError: two names cannot be told apart.
    """
    keys: dict[str, int] = {}
    for category in target.categories:
        if keys.setdefault(_key(category.name), category.id) != category.id:
            raise DataError(
                f"target `{target.name}`: another category differs from `{category.name}` only in "
                "case, spaces or plural",
                "give the file a map `coco` or `imagenet` instead of matching names",
            )
    return keys


def _key(name: str) -> str:
    """Return the comparable form without its spaces."""
    return normalised(name).replace(" ", "")


def _singular(word: str) -> str:
    """Return an English noun's singular, as far as vocabularies need it."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > len("ties"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if word.endswith("s") and word != "s" and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


@cache
def _tables() -> dict[str, Any]:
    """Return the package data, read once."""
    text = package_files("pmvis_core").joinpath("category_tables.json").read_text("utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def _target_from(value: Any, name: str, where: str) -> Target:
    """Build a vocabulary from a parsed file and check it."""
    rows = value.get("categories") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where}: no target vocabulary, expected a list `categories`")
    categories = tuple(
        _category(row, number, f"{where}: categories[{number - 1}]")
        for number, row in enumerate(rows, start=1)
    )
    names = [category.name for category in categories]
    ids = {category.id for category in categories}
    if len(set(names)) != len(names) or len(ids) != len(names):
        raise DataError(f"{where}: a category occurs twice, expected distinct ids and names")
    maps = {
        source: _source_table(value[source], set(names), f"{where}: {source}")
        for source in SOURCES
        if source in value
    }
    ordered = tuple(sorted(categories, key=lambda category: category.id))
    return Target(str(value.get("name", name)), ordered, maps)


def _category(row: Any, number: int, where: str) -> Category:
    """Parse one entry: a name, numbered by its place, or an object with id and name."""
    if isinstance(row, str) and row:
        return Category(number, row)
    if (
        isinstance(row, dict)
        and type(row.get("id")) is int
        and row["id"] > 0
        and isinstance(row.get("name"), str)
    ):
        return Category(row["id"], row["name"])
    raise DataError(f"{where}: {row!r}, expected a name or an object with a positive id and a name")


def _source_table(value: Any, names: set[str], where: str) -> dict[str, str]:
    """Parse the map of one source and check that it leads into the vocabulary."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, source category -> target name")
    for key, wanted in value.items():
        if wanted not in names:
            near = get_close_matches(str(wanted), names, n=1)
            raise DataError(
                f"{where}: `{key}` maps to `{wanted}`, which is no category of this target",
                f"did you mean `{near[0]}`?" if near else None,
            )
    return dict(value)
