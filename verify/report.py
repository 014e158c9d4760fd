"""Verdicts of many checks: per level, overall, as a table for people, JSON for machines and Markdown for the card."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from verify.checks import Check, Verdict

LEVELS = ("structure", "fidelity", "serving")
#: The verdicts, worst first.
SEVERITY: tuple[Verdict, ...] = ("FAIL", "UNCHECKED", "WARN", "PASS")
_STYLE = {"PASS": "green", "FAIL": "bold red", "UNCHECKED": "yellow", "WARN": "yellow"}


class OutputConsole(Console):
    """Standard output: as wide as the terminal, or `width` columns where it is none. Raises BrokenPipeError where nobody
    reads it any more; rich's own ends the process with 1, which is a defect's code here."""

    def __init__(self, width: int = 160) -> None:
        super().__init__(width=None if sys.stdout.isatty() else width)

    def on_broken_pipe(self) -> None:
        """Called by rich inside the handler of the error."""
        self.quiet = True
        raise BrokenPipeError


def level_verdicts(checks: Sequence[Check]) -> dict[str, Verdict]:
    """Level -> FAIL if a check of it failed, UNCHECKED if none was made or a check of it stayed unchecked, WARN, PASS.
    A level is the part of a check's id before the first dot."""
    return {level: _worst(c.verdict for c in checks if c.id.split(".")[0] == level) for level in LEVELS}


def overall(checks: Sequence[Check]) -> Verdict:
    """The worst verdict of all levels: a level without a check makes it UNCHECKED, unless another says FAIL."""
    return _worst(level_verdicts(checks).values())


def _worst(found: Iterable[Verdict]) -> Verdict:
    have = set(found)
    return next((verdict for verdict in SEVERITY if verdict in have), "UNCHECKED")


def failed(checks: Sequence[Check]) -> list[Check]:
    """The checks that say FAIL."""
    return [check for check in checks if check.verdict == "FAIL"]


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """`{"verdict": overall, "verdicts": {level: verdict}, "checks": [...]}`."""
    return {
        "verdict": overall(checks),
        "verdicts": level_verdicts(checks),
        "checks": [asdict(check) for check in checks],
    }


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """A table, one check a line."""
    table = Table("check", "verdict", "what it proves", "figure", "threshold", title="Verification")
    for check in checks:
        table.add_row(
            check.id, f"[{_STYLE[check.verdict]}]{check.verdict}[/]", check.what, _cell(check.figure), check.threshold
        )
    console.print(table)
    verdicts = {"overall": overall(checks), **level_verdicts(checks)}
    console.print("  ".join(f"{level}: [{_STYLE[v]}]{v}[/]" for level, v in verdicts.items()))


def markdown(checks: Sequence[Check]) -> str:
    """A Markdown table of the checks, with how each figure was obtained."""
    lines = ["| check | verdict | what it proves | figure | threshold | how |", "|---|---|---|---|---|---|"]
    for check in checks:
        cells = (check.id, check.verdict, check.what, _cell(check.figure), check.threshold, check.how)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _cell(figure: str) -> str:
    text = figure.replace("[", "(").replace("]", ")")
    return text if len(text) <= 400 else text[:397] + "..."
