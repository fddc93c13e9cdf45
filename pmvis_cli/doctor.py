"""`pmvis doctor`: what this machine offers, and what carries each operation."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pmvis_cli.console import get_console
from pmvis_cli.options import JsonFlag

if TYPE_CHECKING:
    from rich.table import Table

    from pmvis_core.doctor import Finding

_MARKS = {"good": "ok", "fallback": "slower", "missing": "-"}


def doctor(json: JsonFlag = False) -> None:
    """Tell what this machine offers, and what carries each operation.

    For each native operation: compiled (and for which instruction set), or falling back to numpy or
    torch, and why. Nothing listed as missing is needed; the exit code is always 0.

    Examples:
      pmvis doctor
      pmvis doctor --json | jq '.findings[] | select(.state != "good")'
      PMVIS_NATIVE=off pmvis doctor

    Reads: nothing. Writes: a table, or with --json an object, on standard output.

    next: `pmvis demo -o demo`
    """
    from pmvis_core.doctor import examine

    findings = examine()
    console = get_console()
    if json:
        console.emit_json({"findings": [asdict(finding) for finding in findings]})
    else:
        console.table(_table(findings), stdout=True)


def _table(findings: list[Finding]) -> Table:
    """Return the findings as a table, grouped by part."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="pmvis doctor", title_justify="left")
    for name in ("part", "what", "state", "found", "why / where"):
        table.add_column(name, overflow="fold")
    part = ""
    for finding in findings:
        if part and finding.part != part:
            table.add_section()
        shown = "" if finding.part == part else finding.part
        part = finding.part
        mark = _MARKS[finding.state.value]
        table.add_row(shown, finding.name, mark, finding.value, escape(finding.reason))
    return table
