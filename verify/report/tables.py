"""Checks and their verdicts as a table for people and as Markdown for the card."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.errors import printable
from verify.checks import Check, level_verdicts, overall

_STYLE = {"PASS": "green", "FAIL": "bold red", "UNCHECKED": "yellow", "WARN": "yellow"}


class PlainConsole(Console):
    """Prints text as it is: nothing in it is markup or an emoji's name, and no control character passes (see
    `recipes.errors.printable`). What has a style is a rich.text.Text of this project's own words."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a line, a cell or a title; rich calls it for every one."""
        return super().render_str(printable(text), **options)


class OutputConsole(PlainConsole):
    """Standard output: as wide as the terminal, or `width` columns where it is none. Raises BrokenPipeError where nobody
    reads it any more; rich's own ends the process with 1, which is a defect's code here."""

    def __init__(self, width: int = 160) -> None:
        super().__init__(width=None if sys.stdout.isatty() else width)

    def on_broken_pipe(self) -> None:
        """Called by rich inside the handler of the error."""
        self.quiet = True
        raise BrokenPipeError


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """A table, one check a line."""
    table = Table("check", "verdict", "what it proves", "figure", "threshold", title="Verification")
    for check in checks:
        verdict = Text(check.verdict, _STYLE[check.verdict])
        table.add_row(check.id, verdict, check.what, _cell(check.figure), check.threshold)
    console.print(table)
    verdicts = {"overall": overall(checks), **level_verdicts(checks)}
    line = [Text.assemble(f"{level}: ", (verdict, _STYLE[verdict])) for level, verdict in verdicts.items()]
    console.print(Text("  ").join(line))


def markdown(checks: Sequence[Check]) -> str:
    """A Markdown table of the checks, with how each figure was obtained."""
    lines = ["| check | verdict | what it proves | figure | threshold | how |", "|---|---|---|---|---|---|"]
    for check in checks:
        cells = (check.id, check.verdict, check.what, _cell(check.figure), check.threshold, check.how)
        lines.append("| " + " | ".join(map(markdown_text, cells)) + " |")
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """`text` as one line of Markdown that shows it literally: no HTML, no link, no code, no cell of its own."""
    escaped = re.sub(r"([\\`*\[\]|~])", r"\\\1", " ".join(printable(text).split("\n")))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cell(figure: str) -> str:
    return figure if len(figure) <= 400 else figure[:397] + "..."
