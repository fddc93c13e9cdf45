"""The door: help, versions, typos, exit codes, error anatomy, warnings, and its own speed."""

from __future__ import annotations

import importlib
import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmvis_cli import app, console, options
from pmvis_core.errors import AnswerIsNo, DataError, PmvisError, ResourceError, UsageError

Run = Callable[..., Any]


def test_help_lists_every_command(pmvis: Run) -> None:
    done = pmvis("--help")
    assert done.code == 0
    assert all(name in done.out for name in app.COMMANDS)
    assert done.err == ""


def test_nothing_given_shows_help_and_is_a_usage_error(pmvis: Run) -> None:
    done = pmvis()
    assert done.code == 2
    assert "map-categories" in done.out


def test_version(pmvis: Run) -> None:
    done = pmvis("--version")
    assert done.code == 0
    assert done.out.startswith("pmvis 0")
    assert "torch" in done.out


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_a_whole_help(pmvis: Run, name: str) -> None:
    done = pmvis(name, "--help")
    assert done.code == 0, done.err
    text = done.out.lower()
    assert f"pmvis {name}" in text
    assert "reads" in text or "writes" in text
    assert "next:" in text or app.COMMANDS[name].panel != app.PIPE
    examples = sum(line.strip().startswith("pmvis ") for line in done.out.splitlines())
    assert examples >= 2


def test_help_is_fast_and_loads_no_command(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pmvis_cli.app", "--help"]

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=environment, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.3
    code = (
        "import sys; from pmvis_cli.app import main; main(['--help']); "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'cv2')"
        " or m.startswith('pmvis_cli.') and m not in ('pmvis_cli.app', 'pmvis_cli.console')]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["filtr"], "error: no such command: filtr. Did you mean `filter`?"),
        (["train_image"], "Did you mean `train-image`?"),
        (["filter", "--pscroe", "0.2"], "no such option: --pscroe. Did you mean `--pscore`?"),
        (["map-categories", "--tarket", "x"], "no such option: --tarket. Did you mean `--target`?"),
        (["--quite"], "no such option: --quite. Did you mean `--quiet`?"),
        (["map-categories", "-o", "x"], "missing option `--target`"),
        (["filter", "x", "y"], "unexpected extra argument"),
        (["filter", "x", "--overlap", "1.5"], "invalid value for `--overlap`"),
        (["zzz"], "error: no such command: zzz.\n"),
    ],
)
def test_usage_errors(pmvis: Run, words: list[str], message: str) -> None:
    done = pmvis(*words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "  hint: `pmvis" in done.err


def test_global_options_after_the_command_get_a_hint(pmvis: Run) -> None:
    done = pmvis("filter", "-q", "x")
    assert done.code == 2
    assert "`pmvis -q filter …`" in done.err


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Return a function that makes `pmvis doctor` raise an exception."""

    def arrange(problem: BaseException) -> None:
        def doctor(json: options.JsonFlag = False) -> None:
            """Fail."""
            raise problem

        module = type(sys)("pmvis_cli.doctor")
        module.doctor = doctor  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pmvis_cli.doctor", module)

    return arrange


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (AnswerIsNo("no"), 1),
        (UsageError("no"), 2),
        (DataError("no"), 3),
        (ResourceError("no"), 4),
        (PmvisError("no"), 70),
        (OSError(28, "No space left on device", "x"), 4),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (ZeroDivisionError("division by zero"), 70),
    ],
)
def test_exit_codes(pmvis: Run, raising: Run, problem: BaseException, code: int) -> None:
    raising(problem)
    done = pmvis("doctor")
    assert (done.code, done.out) == (code, "")
    assert "Traceback" not in done.err


def test_anatomy_of_an_error(pmvis: Run, raising: Run) -> None:
    text = "x.jsonl:18: [bold]video[/bold] 31 `a1b2`: track 4 has 19 masks " + "long " * 60
    raising(DataError(text, "rerun `pmvis infer`"))
    done = pmvis("doctor")
    assert done.err == f"error: {text}\n  hint: rerun `pmvis infer`\n"


def test_errors_as_json(pmvis: Run, raising: Run) -> None:
    raising(DataError("what", "do"))
    done = pmvis("doctor", "--json")
    assert json.loads(done.out) == {"error": "what", "hint": "do", "code": 3}
    assert done.err == ""
    assert json.loads(pmvis("doctr", "--json").out)["code"] == 2


def test_a_bug_gives_a_line_for_an_issue(pmvis: Run, raising: Run) -> None:
    raising(ZeroDivisionError("division by zero"))
    done = pmvis("doctor")
    assert "a bug in pmvis: ZeroDivisionError: division by zero" in done.err
    assert "paste this line into an issue: `pmvis 0" in done.err
    assert "test_app.py:" in done.err


def test_debug_shows_the_traceback(pmvis: Run, raising: Run) -> None:
    raising(DataError("what"))
    done = pmvis("--debug", "doctor")
    assert done.code == 3
    assert "Traceback" in done.err


def warn_from_core(*texts: str) -> None:
    """Warn from one place in the code."""
    for text in texts:
        logging.getLogger("pmvis_core.something").warning("%s", text)


def test_warnings_are_shown_once_counted_and_summed(capsys: pytest.CaptureFixture[str]) -> None:
    voice = console.Console(quiet=True)
    voice.open()
    warn_from_core("a", "a", "b", "c", "d", "a")
    voice.close()
    err = capsys.readouterr().err
    assert [err.count(f"warning: {text}\n") for text in "abcd"] == [1, 1, 1, 0]
    assert "6 warnings in all, 3 of them not shown" in err


def test_verbose_shows_every_distinct_warning(capsys: pytest.CaptureFixture[str]) -> None:
    voice = console.Console(verbose=True)
    voice.open()
    warn_from_core(*"abcdef")
    voice.close()
    err = capsys.readouterr().err
    assert err.count("warning:") == 6
    warn_from_core("after")
    assert "after" not in capsys.readouterr().err


def test_progress_yields_everything_and_ends_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(console.Console(quiet=True).progress("abc", "work")) == list("abc")
    assert capsys.readouterr().err == ""
    assert list(console.Console().progress(iter("abc"), "work", 3)) == list("abc")
    assert capsys.readouterr().err.startswith("work: 3 of 3 in ")
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    list(console.Console().progress("ab", "work"))
    assert capsys.readouterr().err.count("work: ") == 3


def test_bars_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    voice = console.Console()
    bars = voice._with_bar(range(3), "outer", 3)
    assert [list(voice._with_bar(range(i), "inner", None)) for i in bars] == [[], [0], [0, 1]]
    assert voice._bar is None


@pytest.mark.parametrize(
    ("text", "number", "values"),
    [
        ("4", int, [4]),
        ("0,1,2", int, [0, 1, 2]),
        ("1:5", int, [1, 2, 3, 4, 5]),
        ("0:4:2,9", int, [0, 2, 4, 9]),
        ("0,.1,.25", float, [0.0, 0.1, 0.25]),
        ("0:0.3:0.1", float, [0.0, 0.1, 0.2, 0.3]),
    ],
)
def test_lists_of_numbers(text: str, number: type, values: list[Any]) -> None:
    assert options.parsed_list(text, "--topk", number) == values


@pytest.mark.parametrize("text", ["", "a", "1:", "1:2:0", "5:1", "1,,2", "1.5"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--topk is"):
        options.parsed_list(text, "--topk", int)


def test_the_table_names_functions_that_exist() -> None:
    for name, entry in app.COMMANDS.items():
        module = importlib.import_module(f"pmvis_cli.{entry.module}")
        assert callable(getattr(module, entry.function)), name
        assert len(entry.help) < 72


def test_light_commands_load_no_torch(
    tracks_file: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    gt = tmp_path / "gt.json"
    coco = {"categories": [{"id": 1, "name": "dog"}], "images": [], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    runs = [
        ["filter", str(tracks_file()), "-o", str(tmp_path / "x.tracks.jsonl")],
        ["filter", str(tracks_file()), "--sweep", "--overlap", "0.5"],
        ["convert", str(tracks_file()), "--to", "dataset", "-o", str(gt)],
        ["eval", str(tracks_file()), "--gt", str(gt), "--json"],
        ["map-categories", "--target", "ovis", "--coco", str(tmp_path / "coco.json"),
         "-o", str(tmp_path / "out")],
    ]  # fmt: skip
    code = (
        "import json, sys; from pmvis_cli.app import main\n"
        "codes = [main(words) for words in json.loads(sys.argv[1])]\n"
        "sys.exit(f'{codes} torch' if any(codes) or 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(runs)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
