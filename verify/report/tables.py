"""Prints checks and their verdicts as a table for people and as Markdown for the model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.errors import printable
from recipes.streams import results
from verify.checks import Check, Verdict, level_verdicts, overall

#: Verdict -> how rich shows it.
STYLE: dict[Verdict, str] = {"PASS": "green", "FAIL": "bold red", "UNCHECKED": "yellow", "WARN": "yellow"}


class PlainConsole(Console):
    """Prints text literally: no markup, no emoji names, and no control characters (see `recipes.errors.printable`).
    Only rich.text.Text objects of this project have a style."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Called by rich for the text of every line, cell and title."""
        return super().render_str(printable(text), **options)


class OutputConsole(PlainConsole):
    """Standard output: as wide as the terminal, or `width` columns if it is not a terminal. Raises BrokenPipeError if
    stdout is closed, where rich itself would exit with 1, the code of a defect here."""

    def __init__(self, width: int = 160) -> None:
        file = results()
        super().__init__(file=file, width=None if file.isatty() else width)

    def on_broken_pipe(self) -> None:
        """Called by rich in the handler of the error."""
        self.quiet = True
        raise BrokenPipeError


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Prints a table with one check per line."""
    table = Table("check", "verdict", "what it proves", "figure", "threshold", title="Verification")
    for check in checks:
        verdict = Text(check.verdict, STYLE[check.verdict])
        table.add_row(check.id, verdict, check.what, _cell(check.figure), check.threshold)
    console.print(table)
    verdicts = {"overall": overall(checks), **level_verdicts(checks)}
    line = [Text.assemble(f"{level}: ", (verdict, STYLE[verdict])) for level, verdict in verdicts.items()]
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
