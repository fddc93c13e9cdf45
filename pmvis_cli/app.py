"""The door: the list of commands, the global options, and the one place where errors are shown.

A command's module is imported only when that command runs, so `pmvis --help` knows the commands by
the table below and stays under 0.3 s. Exit codes are those of `pmvis_core.errors`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from pmvis_cli.console import Console, get_console, set_console
from pmvis_core import __version__
from pmvis_core.errors import PmvisError, ResourceError, UsageError

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

PIPE = "The pipe, in its order"
LOOK = "Look, measure, convert"
TRY = "Try it"

_ParseError: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, vendored or not


@dataclass(frozen=True)
class Entry:
    """One row of the table of commands."""

    module: str
    """Module of `pmvis_cli`."""
    function: str
    """Function of that module; its docstring is the command's help."""
    help: str
    """One line for the list."""
    panel: str
    """Heading under which the list shows it."""


COMMANDS: dict[str, Entry] = {
    "map-categories": Entry(
        "map_categories",
        "map_categories",
        "Map COCO and ImageNet-bbox categories to a target vocabulary.",
        PIPE,
    ),
    "train-image": Entry("train", "train_image", "Train a model on images only.", PIPE),
    "train-propagator": Entry(
        "train_propagator", "train_propagator", "Train DeAOT to carry masks, on images only.", PIPE
    ),
    "infer": Entry("infer", "infer", "Label videos with a trained model.", PIPE),
    "refine": Entry("refine", "refine", "Mend tracks by propagating their key frames.", PIPE),
    "filter": Entry("filter", "filter_tracks", "Keep the tracks that can be trusted.", PIPE),
    "train-video": Entry("train", "train_video", "Train on the filtered pseudo labels.", PIPE),
    "self-train": Entry(
        "self_train", "self_train", "Repeat infer, refine, filter, train-video.", PIPE
    ),
    "eval": Entry("evaluate", "evaluate", "Measure AP and AR against ground truth.", PIPE),
    "view": Entry("view", "view", "Draw tracks as a video or a contact sheet.", LOOK),
    "table": Entry("table", "table", "Draw metrics over seeds, beside the paper's.", LOOK),
    "join": Entry("join", "join", "Join the shards of one run of infer.", LOOK),
    "convert": Entry("convert", "convert", "Convert between tracks and YouTube-VIS JSON.", LOOK),
    "check": Entry("check", "check", "Find every fault of a submission, and pack it.", LOOK),
    "check-data": Entry(
        "check_data", "check_data", "Find every fault of training data and its images.", LOOK
    ),
    "convert-weights": Entry(
        "convert_weights", "convert_weights", "Convert between IDOL's weights and ours.", LOOK
    ),
    "doctor": Entry("doctor", "doctor", "Tell what this machine can do, and why not.", LOOK),
    "synth": Entry("synth", "synth", "Draw the micro-benchmark in the real formats.", TRY),
    "demo": Entry("demo", "demo", "Run the whole pipeline on the micro-benchmark.", TRY),
}


def load_command(name: str) -> Any:
    """Import a command's module and return the click command made of its function."""
    entry = COMMANDS[name]
    function = getattr(importlib.import_module(f"pmvis_cli.{entry.module}"), entry.function)
    single = typer.Typer(add_completion=False)
    single.command(name, help=_help_text(function))(function)
    return get_command(single)


def _help_text(function: Any) -> str:
    """Return a docstring as help: line breaks kept, brackets literal, sections for coders cut."""
    text = inspect.cleandoc(function.__doc__ or "")
    text = re.split(r"\n\n(?:Args|Raises|Returns|Yields):\n", text)[0]
    return text.replace("[", "\\[")


class LazyCommand(TyperCommand):
    """A row of the list; it turns into the real command when it is called."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Load the real command and let it parse the arguments."""
        return load_command(str(self.name)).make_context(info_name, args, parent, **extra)


class LazyGroup(TyperGroup):
    """The group whose commands are the rows of `COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the row's stand-in, without importing the command's module."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        return LazyCommand(cmd_name, help=entry.help, rich_help_panel=entry.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; a typo gets a suggestion.

        Raises:
            UsageError: there is no such command.
        """
        if args and args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise UsageError(
                f"no such command: {args[0]}." + _did_you_mean(args[0], COMMANDS),
                "`pmvis --help` lists the commands",
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interrupt or a closed pipe becomes its exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            get_console().say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except BrokenPipeError as error:
            raise typer.Exit(EXIT_BROKEN_PIPE) from error


app = typer.Typer(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    """Print versions and leave, without importing torch."""
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "absent"
    typer.echo(f"pmvis {__version__} (python {platform.python_version()}, torch {torch})")
    raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Say nothing but warnings and errors.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say more, and every distinct warning.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback with every error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print versions and leave."
        ),
    ] = False,
) -> None:
    r"""Video instance segmentation without a single video annotation (PM-VIS+).

    Train on images, label videos, mend and filter the labels, train again:

    pmvis train-image --data train_image.json -o runs/image
    set -o pipefail
    pmvis infer --weights runs/image --frames videos/ \
      | pmvis refine --frames videos/ \
      | pmvis filter --topk 4 --pscore 0.2 > pseudo.tracks.jsonl
    pmvis train-video --pseudo pseudo.tracks.jsonl --frames videos/ --init runs/image -o runs/video

    next: `pmvis demo` shows it all on pictures it draws itself.
    """
    set_console(Console(quiet=quiet, verbose=verbose, debug=debug)).open()
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(UsageError.exit_code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `pmvis` and return the exit code.

    Args:
        arguments: the words after `pmvis`; by default those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    set_console(Console(debug="--debug" in words))
    try:
        code = _guarded(words)
    finally:
        get_console().close()
    return _flushed(code)


def _guarded(words: list[str]) -> int:
    """Run the command and turn whatever it raises into words and an exit code."""
    problem: PmvisError
    cause: Exception
    try:
        result = get_command(app).main(list(words), prog_name="pmvis", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except PmvisError as error:
        problem, cause = error, error
    except (BrokenPipeError, SystemExit) as error:
        return _silent_code(error)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except _ParseError as error:
        problem, cause = _from_parser(error), error
    except OSError as error:
        problem, cause = _from_system(error), error
    except Exception as error:
        problem, cause = _from_bug(error), error
    if get_console().debug:
        traceback.print_exception(cause)
    _report(problem, as_json="--json" in words)
    return problem.exit_code


def _silent_code(error: BaseException) -> int:
    """Return the exit code of an end that needs no words."""
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    code = getattr(error, "code", 0)
    return code if isinstance(code, int) else int(code is not None)


def _report(problem: PmvisError, *, as_json: bool) -> None:
    """Show an error: as words on stderr, or as an object on stdout for programs."""
    if as_json:
        value = {"error": problem.message, "hint": problem.hint, "code": problem.exit_code}
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    else:
        get_console().error(problem.message, problem.hint)


def _from_parser(error: Any) -> PmvisError:
    """Word an error of the option parser in our manner, with suggestions for typos."""
    command = error.ctx.command_path if error.ctx is not None else "pmvis"
    hint = f"`{command} --help` shows the options"
    typo = getattr(error, "option_name", None)
    if typo is None or not hasattr(error, "possibilities"):
        text = re.sub(r"'([^']*)'", r"`\1`", error.format_message())
        return UsageError(text[:1].lower() + text[1:], hint)
    known = [name for param in error.ctx.command.params for name in param.opts]
    message = f"no such option: {typo}." + _did_you_mean(typo, known)
    if error.ctx.parent is not None and typo in {"-q", "-v", "--quiet", "--verbose", "--debug"}:
        hint = f"it stands before the command: `pmvis {typo} {error.ctx.info_name} …`"
    return UsageError(message, hint)


def _did_you_mean(typo: str, known: Any) -> str:
    """Return the end of a message that names the nearest of the known words, if any is near."""
    matches = get_close_matches(typo, list(known), n=1)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def _from_system(error: OSError) -> PmvisError:
    """Word an error of the operating system (disk full, no permission)."""
    place = f" `{error.filename}`" if error.filename else ""
    return ResourceError(f"the system refused{place}: {error.strerror or error}")


def _from_bug(error: Exception) -> PmvisError:
    """Word an exception that nobody foresaw, with a line to paste into an issue."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
    where = f"pmvis {__version__}, python {platform.python_version()}, {platform.platform()}"
    return PmvisError(
        f"a bug in pmvis: {type(error).__name__}: {error}",
        f"paste this line into an issue: `{where}: {type(error).__name__} at {place}`; "
        "`pmvis --debug` shows the traceback",
    )


def _flushed(code: int) -> int:
    """Flush stdout; if nobody reads it any more, leave quietly with the pipe's exit code."""
    try:
        sys.stderr.flush()
    except OSError:  # that nobody reads what was said is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _report(_from_system(error), as_json=False)
        return ResourceError.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
