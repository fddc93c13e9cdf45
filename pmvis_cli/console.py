"""What a person sees: words, bars and warnings on stderr; data on stdout and nothing else.

Commands call `get_console()`; `pmvis_cli.app` makes it from the global options. A bar is drawn
where stderr is a terminal and stdout is no pipe (so that of `infer | refine | filter` only the
last one draws); elsewhere a plain line appears every half minute and at the end. `NO_COLOR` is
respected by rich.
"""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress

T = TypeVar("T")

PLAIN_INTERVAL_S = 30.0
"""Seconds between two progress lines where no bar can be drawn."""

SHOWN_PER_PLACE = 3
"""Distinct warnings shown from one place in the code before the rest are only counted."""

REPORT_WIDTH = 160
"""Columns of a table that is written to something else than a terminal."""


class Console:
    """The voice of one run of a command."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False, debug: bool = False) -> None:
        """Choose how much is said: ``quiet`` leaves warnings and errors, ``verbose`` adds more."""
        self.quiet = quiet
        self.verbose = verbose
        self.debug = debug
        self._warnings = WarningCounter(self, show_all=verbose)
        self._bar: RichProgress | None = None

    def say(self, text: str) -> None:
        """Tell the user something on stderr, unless told to be quiet."""
        if not self.quiet:
            self._put(text)

    def detail(self, text: str) -> None:
        """Tell something that only `-v` asks for."""
        if self.verbose:
            self._put(text)

    def error(self, message: str, hint: str | None) -> None:
        """Render an error's anatomy: ``error:`` what and where, ``hint:`` what to do next."""
        self._put(message, label="error:", style="bold red")
        if hint:
            self._put(hint, label="  hint:", style="bold cyan")

    def warn(self, text: str) -> None:
        """Show a warning on stderr, also when quiet."""
        self._put(text, label="warning:", style="bold yellow")

    def table(self, table: RenderableType, *, stdout: bool = False) -> None:
        """Print a rich table: to stdout if it is the command's product, else to stderr."""
        if not stdout and self.quiet:
            return
        from rich.console import Console as RichConsole

        stream = sys.stdout if stdout else sys.stderr
        text = io.StringIO()
        RichConsole(
            file=text,
            force_terminal=stream.isatty() and "NO_COLOR" not in os.environ,
            width=None if stream.isatty() else REPORT_WIDTH,
        ).print(table)
        drawn = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
        if not stdout:
            _mutter(drawn)
            return
        stream.write(drawn)
        stream.flush()

    def emit_json(self, value: Any) -> None:
        """Write the command's one JSON object to stdout: sorted keys, no NaN."""
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def progress(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield every item of ``items`` and show how far it is; see `pmvis_core.progress`."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        if self.quiet:
            return iter(items)
        if sys.stderr.isatty() and not _is_pipe(sys.stdout):
            return self._with_bar(items, what, total)
        return self._with_lines(items, what, total)

    def open(self) -> None:
        """Start to listen for warnings of `pmvis_core`."""
        logger = logging.getLogger("pmvis_core")
        logger.addHandler(self._warnings)
        logger.propagate = False

    def close(self) -> None:
        """Stop listening, and sum up the warnings that were counted without being shown."""
        logger = logging.getLogger("pmvis_core")
        logger.removeHandler(self._warnings)
        logger.propagate = True
        if self._warnings.hidden:
            self.warn(
                f"{self._warnings.count} warnings in all, {self._warnings.hidden} of them not "
                "shown (`pmvis -v` shows each distinct one)"
            )

    def _put(self, text: str, label: str = "", style: str = "") -> None:
        """Print to stderr, above a bar if there is one, and never read markup in a message."""
        from rich.console import Console as RichConsole
        from rich.text import Text

        parts = [(label, style), (" ", "")] if label else []
        line = Text.assemble(*parts, (text, ""))
        if self._bar is not None:
            self._bar.console.print(line, soft_wrap=True)
            return
        # Rich itself would end the process and take stdout with it.
        rendered = io.StringIO()
        coloured = sys.stderr.isatty() or None
        RichConsole(file=rendered, force_terminal=coloured).print(line, soft_wrap=True)
        _mutter(rendered.getvalue())

    def _with_bar(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        """Draw one bar; a loop within a loop adds a line to the same display."""
        from rich import progress as parts
        from rich.console import Console as RichConsole

        outermost = self._bar is None
        if self._bar is None:
            self._bar = parts.Progress(
                parts.TextColumn("{task.description}"),
                parts.BarColumn(),
                parts.MofNCompleteColumn(),
                parts.TextColumn("{task.fields[speed]}"),
                parts.TimeElapsedColumn(),
                parts.TimeRemainingColumn(),
                console=RichConsole(stderr=True),
            )
            self._bar.start()
        bar = self._bar
        task = bar.add_task(what, total=total, speed="")
        start = time.monotonic()
        try:
            for done, item in enumerate(items, start=1):
                yield item
                speed = done / max(time.monotonic() - start, 1e-9)
                bar.update(task, advance=1, speed=f"{speed:.3g}/s")
        finally:
            if outermost:
                bar.stop()
                self._bar = None
            else:
                bar.remove_task(task)

    def _with_lines(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        """Print a plain line now and then, and one when the work is done."""
        of_total = "" if total is None else f" of {total}"
        start = shown = time.monotonic()
        done = 0
        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now - shown >= PLAIN_INTERVAL_S:
                shown = now
                self.say(f"{what}: {done}{of_total}, {_remaining(done, total, now - start)}")
        self.say(f"{what}: {done}{of_total} in {time.monotonic() - start:.1f} s")


class WarningCounter(logging.Handler):
    """Shows each distinct warning of the core once, and counts them all.

    A place in the code that warns with ever new texts (one a video) is cut short after
    `SHOWN_PER_PLACE` of them, unless ``show_all``.
    """

    def __init__(self, console: Console, *, show_all: bool = False) -> None:
        """Speak through ``console``."""
        super().__init__(logging.WARNING)
        self.console = console
        self.show_all = show_all
        self.count = 0
        """Warnings so far."""
        self.hidden = 0
        """Warnings that were not shown: repetitions and floods."""
        self._shown: dict[tuple[str, int], set[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Show or only count one record."""
        self.count += 1
        text = record.getMessage()
        shown = self._shown.setdefault((record.pathname, record.lineno), set())
        if text in shown or (len(shown) >= SHOWN_PER_PLACE and not self.show_all):
            self.hidden += 1
            return
        shown.add(text)
        self.console.warn(text)


def _mutter(text: str) -> None:
    """Write to stderr; that nobody reads it, or that a log's disk is full, ends no work."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _remaining(done: int, total: int | None, elapsed_s: float) -> str:
    """Return the speed so far and, where the total is known, the time left."""
    speed = done / elapsed_s
    if total is None:
        return f"{speed:.3g}/s"
    return f"{speed:.3g}/s, about {(total - done) / speed:.0f} s left"


def _is_pipe(stream: Any) -> bool:
    """Tell whether a stream leads into another program."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


_current: ContextVar[Console] = ContextVar("pmvis_console")


def get_console() -> Console:
    """Return the console of this run; outside `pmvis_cli.app` a plain one."""
    console = _current.get(None)
    if console is None:
        console = set_console(Console())
    return console


def set_console(console: Console) -> Console:
    """Make ``console`` the one that `get_console` returns."""
    _current.set(console)
    return console
