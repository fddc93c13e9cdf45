"""The compiled evaluator against its twin in Python: the same numbers, bits, doubts and errors."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmvis_core import masks
from pmvis_core.errors import DataError
from pmvis_core.evaluation import compiled
from pmvis_core.evaluation.average_precision import evaluate
from pmvis_core.evaluation.curves import Evaluation, accumulate
from pmvis_core.evaluation.files import evaluate_files
from pmvis_core.evaluation.matches import Matches
from pmvis_core.evaluation.protocol import AREAS, Range, groups_of
from pmvis_core.formats.predictions import read_predictions
from pmvis_core.formats.ytvis import read_dataset
from pmvis_core.types import Category
from tests.evaluation_data import random_pair
from tests.evaluation_files import SIZE, write
from tests.parity_vis_eval import compare

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "vis_eval"
CASES = sorted(GOLDEN.glob("case_*"))

pytestmark = pytest.mark.skipif(
    compiled.load_library()[0] is None,
    reason=f"no compiled evaluator: {compiled.load_library()[1]}",
)


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Collect whether each pair of files was left to Python."""
    told: list[bool] = []
    match = compiled.match_files

    def watched(*args: Any, **options: Any) -> compiled.Found | None:
        found = match(*args, **options)
        told.append(found is None)
        return found

    monkeypatch.setattr(compiled, "match_files", watched)
    yield told


def by_twin(truth: Path, predictions: Path, protocol: str = "ytvis", **options: Any) -> Evaluation:
    """Evaluate by the readers and the evaluator in Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "load_library", lambda: (None, "off"))
        return evaluate_files(truth, predictions, protocol, **options)


def same(one: Evaluation, other: Evaluation) -> None:
    """Assert that two evaluations are equal, bit for bit."""
    assert one.summary == other.summary
    assert one.per_category == other.per_category
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in Matches.__dataclass_fields__:
        first, second = getattr(one.matches, name), getattr(other.matches, name)
        if name == "groups":
            assert first == second
        else:
            assert first.dtype == second.dtype, name
            assert first.tobytes() == second.tobytes(), name
            assert first.shape == second.shape, name


@pytest.mark.skipif(not CASES, reason="the golden cases of ../shared are not here")
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_golden_cases_from_their_files(case: Path, threads: int, refusals: list[bool]) -> None:
    expected = json.loads((case / "expected.json").read_text())
    protocol = "ovis" if expected["evaluator"] == "ovis" else "ytvis"
    paths = case / "gt.json", case / "pred.json"
    found = evaluate_files(*paths, protocol, exact=True, threads=threads)
    assert refusals == [False]
    assert [line for line in compare(found, expected) if not line[1]] == []
    same(found, by_twin(*paths, protocol, exact=True))


def outcome(caplog: pytest.LogCaptureFixture, run: Any) -> tuple[Evaluation | None, list[str]]:
    """Return an evaluation and what was told, or None and the error."""
    caplog.clear()
    try:
        found = run()
    except DataError as error:
        return None, [error.message, str(error.hint)]
    return found, [record.getMessage() for record in caplog.records]


NO_RESET = [HealthCheck.function_scoped_fixture]


@given(
    seed=st.integers(0, 2**32 - 1),
    protocol=st.sampled_from(["ytvis", "ovis"]),
    exact=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
)
@settings(max_examples=120, deadline=None, suppress_health_check=NO_RESET)
def test_random_files(
    seed: int,
    protocol: str,
    exact: bool,
    threads: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths = write(tmp_path, seed)
    options = {"exact": exact, "strict": seed % 5 == 0}
    found, told = outcome(
        caplog, lambda: evaluate_files(*paths, protocol, threads=threads, **options)
    )
    wanted, expected = outcome(caplog, lambda: by_twin(*paths, protocol, **options))
    assert told == expected
    assert (found is None) == (wanted is None)
    if found is None or wanted is None:
        return
    same(found, wanted)
    truth = read_dataset(paths[0])
    rows = read_predictions(paths[1], truth)
    same(evaluate(truth, rows, protocol, exact=exact, threads=threads), wanted)


@given(seed=st.integers(0, 2**32 - 1), threads=st.sampled_from([1, 3]))
@settings(max_examples=150, deadline=None, suppress_health_check=NO_RESET)
def test_damaged_files_are_judged_alike(
    seed: int, threads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write(tmp_path, seed)
    rng = random.Random(seed)
    path = rng.choice(paths)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(max(1, len(data)))
        damage = rng.choice(
            [
                b"",
                b'"',
                b"\\",
                b"]",
                b"}",
                b",",
                b"0",
                b"-",
                b".",
                b"e",
                b"\xff",
                b"\0",
                b"\n",
                b" ",
            ]
        )
        data[place : place + rng.randint(0, 2)] = damage
    path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data) + 1)])])
    found, told = outcome(caplog, lambda: evaluate_files(*paths, threads=threads))
    wanted, expected = outcome(caplog, lambda: by_twin(*paths))
    assert told == expected
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        same(found, wanted)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=NO_RESET)
def test_weights_count_as_in_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    protocol = str(rng.choice(["ytvis", "ovis"]))
    pairs = [
        random_pair(rng, video, category, protocol)
        for video in (2, 5, 9)
        for category in (1, 3, 4, 7)
        if rng.random() < 0.7
    ]
    matches = Matches.of_pairs(pairs, groups_of(protocol))
    categories = [Category(n, str(n)) for n in (7, 1, 4, 2)]
    weights = rng.integers(0, 4, len(matches))
    for times in (None, weights):
        found = accumulate(categories, matches, times)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "load_library", lambda: (None, "off"))
            same(found, accumulate(categories, matches, times))


# --- forms of the input -------------------------------------------------------------------------


def plain_files(folder: Path) -> tuple[Path, Path]:
    """Write files without oddities; boxes in the middle of two videos."""
    pixels = np.zeros(SIZE, np.uint8)
    pixels[2:7, 3:9] = 1
    rle = dict(masks.encode(pixels))
    videos = [{"id": n, "height": SIZE[0], "width": SIZE[1], "length": 2} for n in (1, 2)]
    rows = [
        {"id": n, "video_id": n, "category_id": 1, "iscrowd": 0, "areas": [30, 30],
         "segmentations": [rle, rle]}
        for n in (1, 2)
    ]  # fmt: skip
    truth = {"videos": videos, "annotations": rows, "categories": [{"id": 1, "name": "cat"}]}
    results = [
        {"video_id": n, "category_id": 1, "score": 0.5, "segmentations": [rle, None]}
        for n in (1, 2)
    ]
    paths = folder / "truth.json", folder / "results.json"
    paths[0].write_text(json.dumps(truth))
    paths[1].write_text(json.dumps(results))
    return paths


def changed(path: Path, change: Any) -> None:
    """Rewrite a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_other_forms_go_through_the_readers(tmp_path: Path, refusals: list[bool]) -> None:
    truth, results = plain_files(tmp_path)
    plain = evaluate_files(truth, results)
    assert refusals == [False]
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(results.read_bytes()))
    same(evaluate_files(truth, packed), plain)
    assert refusals == [False]
    changed(truth, lambda value: value.update(annotations=value["annotations"][:1]))
    assert evaluate_files(truth, truth).summary["AR1"] == 1.0


@pytest.mark.parametrize(
    "counts",
    [
        [29, 4, 5, 4, 66], [29, 4, 5, 4, 65], [29, 4, 5, 4, 66, 0], [29, 4, 0, 5, 70], [108],
        [0, 108], [], [29, -4, 83], [29, 4.0, 75], [29, True, 78], [29, "4", 75], [29, [4], 75],
        [29, None, 79], [10**11], [4294967296 + 108], "", "0", "l3", "m3", "l3\u00e9", 3, None,
    ],
)  # fmt: skip
def test_runs_of_every_kind(counts: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = plain_files(tmp_path)
    for path in paths:
        rows = "annotations" if path == paths[0] else None
        changed(
            path,
            lambda value, rows=rows: (value[rows] if rows else value)[0][
                "segmentations"
            ].__setitem__(0, {"counts": counts, "size": list(SIZE)}),
        )
        found, told = outcome(caplog, lambda: evaluate_files(*paths, exact=True))
        wanted, expected = outcome(caplog, lambda: by_twin(*paths, exact=True))
        assert told == expected
        if found is not None and wanted is not None:
            same(found, wanted)


@pytest.mark.parametrize(
    "spelling",
    [
        "29,4,5,4,66", " 29 , 4 ,\n5,\t4,\r66 ", "029,4,5,4,66", "29,4,5,4,66,", ",29,4,5,4,66",
        "29 4,5,4,66", "29,,4,5,4,66", "2 9,4,5,4,66", "29,4,5,4,6 6", "29,4,5,4,0066", "-0,108",
        "0" + ",0" * 40 + ",29,4,5,4,66", "29,4,5,4,66" + " " * 100, " " * 63 + "29,4,5,4,66",
        " " * 62 + "29,4,5,4,66", "29,4,5,4,0000000000000066", "1e1,98", "108]", "",
        "4294967404", "00,108", "0" + ", 0" * 20 + ",108",
    ],
)  # fmt: skip
def test_spellings_of_plain_runs(
    spelling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth, results = plain_files(tmp_path)
    text = truth.read_text()
    first = text.index('"counts": ') + len('"counts": ')
    last = text.index('"', first + 1) + 1
    truth.write_text(f"{text[:first]}[{spelling}]{text[last:]}")
    found, told = outcome(caplog, lambda: evaluate_files(truth, results, exact=True))
    wanted, expected = outcome(caplog, lambda: by_twin(truth, results, exact=True))
    assert told == expected
    if found is not None and wanted is not None:
        same(found, wanted)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"video_id": 1', '"video_id": "1"'), ('"video_id": 1', '"video_id": 1.5'),
        ('"video_id": 1', '"video_id": true'), ('"video_id": 1', '"video_id": 1e0'),
        ('"video_id": 1', '"video_id": 9'), ('"video_id": 1', '"vide\\u006f_id": 1'),
        ('"category_id": 1', '"category_id": 10000000000000000000000'),
        ('"category_id": 1', '"category_id": 01'), ('"segmentations"', '"segmentation"'),
        ('"score": 0.5', '"score": NaN'), ('"score": 0.5', '"score": 1e999'),
        ('"score": 0.5', '"score": null'), ('"score": 0.5', '"score": "0.5"'),
        ('"score": 0.5', '"score": .5'), ('"score": 0.5', '"score": 5.'),
        ('"score": 0.5', '"score": 0.5, "score": 0.25'), ('"score": 0.5', '"score": 1' + "0" * 400),
        ('"score": 0.5', '"score": -1e-400'), ('"score": 0.5', '"score": 0.5, "areas": [true]'),
        ('"score": 0.5', '"score": 0.5, "pmvis": 3'), ('"score": 0.5', '"score": 0.5, "x": NaN'),
        ('"areas": [30, 30]', '"areas": [30, "30"]'), ('"areas": [30, 30]', '"areas": null'),
        ('"iscrowd": 0', '"iscrowd": "no"'), ('"iscrowd": 0', '"iscrowd": []'),
        ('"iscrowd": 0', '"iscrowd": 0, "pmvis": {"supervision": "mask", "instance": null}'),
        ('"size": [9, 12]', '"size": [9]'), ('"size": [9, 12]', '"size": [9, 12.0]'),
        ('"size": [9, 12]', '"size": [-9, -12]'), ('"size": [9, 12]', '"size": [12, 9]'),
        ('"size": [9, 12]', '"size": [99999999999, 99999999999]'), ('"size": [9, 12], ', ""),
        ('"size": [9, 12]', '"size": [0, 12]'), ('"counts"', '"count"'),
        ('{"size"', '[[1, 2, 3, 4, 5]], {"size"'), ('{"size"', '[[1, 2, 3, 4, 5, 6]], {"size"'),
        ('{"size"', '[[1, 2, 3, 4, 5, 1e7]], {"size"'), ('{"size"', '[[]], {"size"'),
        ('{"size"', '[[1, 2, 3, 4, 5, null]], {"size"'), ('{"size"', '3, {"size"'),
        ('"height": 9', '"height": 0'), ('"length": 2', '"length": null'), 
        ('"length": 2', '"x": 2'),
        ('"length": 2', '"file_names": ["a", "b"]'), ('"length": 2', '"file_names": [1, 2]'),
        ('"length": 2', '"length": 2, "name": {"a": [1]}'), ('"cat"', '"c\ud83d"'),
        ('"cat"', "null"),
        ('"cat"', '"\\ud83d\\u0041"'), ('"cat"', '"\\x"'), ('"cat"', '"c\tt"'),
        ('"id": 1, "name"', '"id": 1}, {"id": 1, "name"'), ('"videos"', '"videos": [], "videos"'),
        ('"annotations"', '"annotation"'), ('"videos": [', '"videos": [' + "[" * 300 + "]" * 300),
    ],
)  # fmt: skip
def test_malformed_entries_are_told_alike(
    which: int, old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = plain_files(tmp_path)
    text = paths[which].read_text()
    if old not in text:
        return
    paths[which].write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogatepass"))
    found, told = outcome(caplog, lambda: evaluate_files(*paths, exact=True))
    wanted, expected = outcome(caplog, lambda: by_twin(*paths, exact=True))
    assert told == expected
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        same(found, wanted)


def test_large_files_are_split_where_entries_begin(tmp_path: Path, refusals: list[bool]) -> None:
    truth, results = plain_files(tmp_path)
    rows = json.loads(results.read_text()) * 400
    decoy = [{"video_id": 1, "category_id": 1, "score": 0.5, "segmentations": []}] * 3
    for n, row in enumerate(rows):
        row["score"] = (n * 7 % 100) / 100
        if n % 5 == 0:
            row["extra"] = decoy  # looks like the begin of an entry
        if n % 7 == 0:
            rows[n] = dict(reversed(row.items()))
    results.write_text(json.dumps(rows))
    wanted = by_twin(truth, results)
    for threads in (1, 2, 3, 8):
        same(evaluate_files(truth, results, threads=threads), wanted)
    assert refusals == [False] * 4


def test_means_of_areas_are_numpys(tmp_path: Path) -> None:
    truth, results = plain_files(tmp_path)
    rng = np.random.default_rng(0)
    for number in (1, 2, 7, 8, 9, 127, 128, 129, 300, 1000, 5000):
        values = (rng.random(number) * 10.0 ** rng.integers(-3, 6, number)).tolist()
        mean = float(np.array(values).mean())
        for low, inside in ((mean, True), (np.nextafter(mean, np.inf), False)):
            edge = Range("small", low, 1e10)
            groups = groups_of("ytvis")._replace(areas=(AREAS[0], edge))
            changed(truth, lambda v, values=values: v["annotations"][0].update(areas=values))
            found = compiled.match_files(
                np.fromfile(truth, np.uint8), np.fromfile(results, np.uint8), groups
            )
            assert found is not None
            assert found.matches.truth_ignored[0].tolist() == [False, not inside], number
