"""One exception type for everything a user can mend, with the exit code the shell will see.

Exit codes: 0 done, 1 the question's answer is no, 2 usage, 3 bad input data, 4 missing resource,
70 a bug of ours, 130 interrupted, 141 broken pipe, 143 ended by SIGTERM. `pmvis_cli.app` renders
these errors; nothing else prints them.
"""

from __future__ import annotations


class PmvisError(Exception):
    """Something the user can mend: what, where, got against expected, and what to do next."""

    exit_code = 70

    def __init__(self, message: str, hint: str | None = None) -> None:
        """Keep the message (one line, literals in backticks) and the hint (the next command)."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class AnswerIsNo(PmvisError):
    """The command worked and its answer is no (`--fail-under`, `--strict`)."""

    exit_code = 1


class UsageError(PmvisError):
    """The options contradict each other or name something that cannot be."""

    exit_code = 2


class DataError(PmvisError):
    """An input file is not what it should be."""

    exit_code = 3


class ResourceError(PmvisError):
    """Weights, a GPU, a native library or a program is missing or does not fit."""

    exit_code = 4


class Terminated(PmvisError):
    """SIGTERM asked a run to end, and what it had done is saved."""

    exit_code = 143
