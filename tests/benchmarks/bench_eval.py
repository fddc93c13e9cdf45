"""Time evaluation from two files: `python tests/benchmarks/bench_eval.py FOLDER --official DIR`.

FOLDER holds `gt.json` and `pred.json` (`../shared/tools/vis_eval_data.py FOLDER ytvis19` makes the
usual set). Each contender runs in a process of its own, in turns: ours natively with one thread and
with one a processor, ours as the whole command, reading the predictions alone (`json.load`), the
official evaluator and TrackEval's TrackMAP. Times are medians from the file names to the numbers,
without imports (of the command: all of it); the last columns are times over ours.

Peers are not ours to ship: `--official` is a folder with `ytvis.py` and `ytviseval.py` (the
registry's mmdet carries them under evaluation/functional) or `ytvos.py` and `ytvoseval.py`;
`--trackeval` a folder with the registry's trackeval package. What is not given is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Work = Callable[[], float | None]


def natively(folder: Path, threads: int) -> Work:
    """Return what evaluates with our library; it gives AP."""
    from pmvis_core.evaluation import compiled
    from pmvis_core.evaluation.files import evaluate_files

    if compiled.load_library()[0] is None:
        raise SystemExit(f"no compiled evaluator: {compiled.load_library()[1]}")
    return lambda: evaluate_files(
        folder / "gt.json", folder / "pred.json", threads=threads
    ).summary["AP"]


def as_command(folder: Path) -> Work:
    """Return what runs `pmvis eval`, interpreter start included."""
    command = [sys.executable, "-m", "pmvis_cli.app", "eval", str(folder / "pred.json")]

    def run() -> float:
        done = subprocess.run(
            [*command, "--gt", str(folder / "gt.json"), "--json"], capture_output=True, check=True
        )
        return float(json.loads(done.stdout)["AP"])

    return run


def reading(folder: Path) -> Work:
    """Return what parses the predictions and nothing else."""

    def run() -> None:
        with (folder / "pred.json").open() as stream:
            json.load(stream)

    return run


def module_at(path: Path) -> Any:
    """Import a module from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def officially(folder: Path, source: Path) -> Work:
    """Return what loads, evaluates and accumulates with the official evaluator."""
    # Its sources are older than the numpy that dropped these names.
    setattr(np, "float", float)  # noqa: B010
    adapted = (source / "ytvis.py").exists()
    api = module_at(source / ("ytvis.py" if adapted else "ytvos.py"))
    evaluator = module_at(source / ("ytviseval.py" if adapted else "ytvoseval.py"))
    load, judge = (api.YTVIS, evaluator.YTVISeval) if adapted else (api.YTVOS, evaluator.YTVOSeval)

    def run() -> float:
        truth = load(str(folder / "gt.json"))
        found = judge(truth, truth.loadRes(str(folder / "pred.json")), "segm")
        found.evaluate()
        found.accumulate()
        found.summarize()
        return float(found.stats[0])

    return run


def with_trackeval(folder: Path, source: Path) -> Work:
    """Return what evaluates with TrackEval's TrackMAP alone, set to YouTube-VIS's sizes.

    TrackEval wants folders of its own and plain runs in the ground truth; those are made here.
    """
    from pmvis_core import rle_numpy

    sys.path.insert(0, str(source))
    trackeval = importlib.import_module("trackeval")
    place = Path(tempfile.mkdtemp())
    (place / "gt/youtube_vis_val").mkdir(parents=True)
    (place / "dt/youtube_vis_val/ours/data").mkdir(parents=True)
    truth = json.loads((folder / "gt.json").read_text())
    for row in truth["annotations"]:
        for mask in filter(None, row["segmentations"]):
            if isinstance(mask["counts"], str):
                pixels = mask["size"][0] * mask["size"][1]
                mask["counts"] = rle_numpy.text_to_runs(mask["counts"].encode(), pixels).tolist()
    (place / "gt/youtube_vis_val/gt.json").write_text(json.dumps(truth))
    os.symlink((folder / "pred.json").resolve(), place / "dt/youtube_vis_val/ours/data/pred.json")
    settings = {
        "GT_FOLDER": f"{place}/gt/",
        "TRACKERS_FOLDER": f"{place}/dt/",
        "SPLIT_TO_EVAL": "val",
        "PRINT_CONFIG": False,
    }
    ranges = [[0, 128**2], [128**2, 256**2], [256**2, 1e10]]
    measure = {"AREA_RANGES": ranges, "MAX_DETECTIONS": 100, "USE_TIME_RANGES": False}
    quiet = {"PRINT_CONFIG": False, "PRINT_RESULTS": False, "OUTPUT_SUMMARY": False}

    def run() -> float:
        dataset = trackeval.datasets.YouTubeVIS(settings)
        metric = trackeval.metrics.TrackMAP({**measure, "PRINT_CONFIG": False})
        options = {
            **trackeval.Evaluator.get_default_eval_config(),
            **quiet,
            "OUTPUT_DETAILED": False,
            "PLOT_CURVES": False,
            "TIME_PROGRESS": False,
        }
        found, _ = trackeval.Evaluator(options).evaluate([dataset], [metric])
        combined = found["YouTubeVIS"]["ours"]["COMBINED_SEQ"]["cls_comb_cls_av"]
        return float(np.mean(combined["TrackMAP"]["AP_all"]))

    return run


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], Work]]:
    """Return who takes part, ours first."""
    folder = options.folder
    found: dict[str, Callable[[], Work]] = {
        "pmvis": lambda: natively(folder, 0),
        "pmvis, 1 thread": lambda: natively(folder, 1),
        "pmvis eval": lambda: as_command(folder),
        "json.load": lambda: reading(folder),
    }
    if options.official:
        found["official"] = lambda: officially(folder, options.official)
    if options.trackeval:
        found["TrackEval"] = lambda: with_trackeval(folder, options.trackeval)
    return found


def work(options: argparse.Namespace) -> None:
    """Run one contender in this process and print what it took."""
    run = contenders(options)[options.only]()
    whole = resource.RUSAGE_CHILDREN if options.only == "pmvis eval" else resource.RUSAGE_SELF
    before = resource.getrusage(whole)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        ap = run()
    wall = time.perf_counter() - start
    after = resource.getrusage(whole)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"ap": ap, "wall": wall, "cpu": cpu, "mb": after.ru_maxrss / 1e3}))


def measured(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return medians of each contender, run in turns; slow ones run less often."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders(options)}
    command = [sys.executable, __file__, str(options.folder)]
    for name in ("official", "trackeval"):
        if getattr(options, name):
            command += [f"--{name}", str(getattr(options, name))]
    # Without this numpy's idle threads spin while ours begin.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    for turn in range(options.runs):
        for name, rows in found.items():
            if name in {"official", "TrackEval"} and turn >= options.peer_runs:
                continue
            done = subprocess.run(
                [*command, "--only", name],
                capture_output=True,
                check=True,
                text=True,
                env=environment,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {"ap": rows[0]["ap"]}
        | {key: statistics.median(row[key] for row in rows) for key in ("wall", "cpu", "mb")}
        for name, rows in found.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--trackeval", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--peer-runs", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        work(options)
        return
    rows = measured(options)
    ours = rows["pmvis"]
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print(f"{'':<16} {'AP':>19} {'wall s':>8} {'CPU s':>8} {'MB':>6} {'wall x':>8} {'CPU x':>8}")
    for name, row in rows.items():
        ap = "" if row["ap"] is None else repr(row["ap"])
        print(
            f"{name:<16} {ap:>19} {row['wall']:>8.3f} {row['cpu']:>8.3f} {row['mb']:>6.0f} "
            f"{row['wall'] / ours['wall']:>8.1f} {row['cpu'] / ours['cpu']:>8.1f}"
        )


if __name__ == "__main__":
    main()
