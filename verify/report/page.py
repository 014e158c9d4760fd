"""Renders the report as one self-contained HTML page: the verdict and the figures first, then samples, plots, checks."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from recipes.errors import printable
from verify.checks import LEVELS, SEVERITY, Check, level_verdicts, overall
from verify.report.facts import Facts
from verify.report.plots import Figure
from verify.report.remedies import remedy
from verify.report.tiles import sentence, tiles

#: Seconds after which the page of a running run reloads itself.
REFRESH = 60
#: Maximum number of samples and modules that a page shows.
MOST = 20
#: Maximum number of words of a sample whose differences are marked: comparing takes the square of it.
_MOST_WORDS = 2000


@dataclass
class Report:
    """The content of a report; empty fields are not shown.

    `state` are lines about the progress of a run; `running` makes the page reload itself; `error` marks a state that
    needs attention. `measured` is what the first screen shows beside the verdicts, and the samples; `fidelity` is the
    table of `verify.fidelity` (fidelity.json); `facts` are rows about how the checkpoint was made.
    """

    title: str
    checks: Sequence[Check] = ()
    state: Sequence[str] = ()
    running: bool = False
    error: bool = False
    figures: Sequence[Figure] = ()
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    measured: Facts = field(default_factory=Facts)
    facts: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""

    def html(self) -> str:
        """The page, which contains everything it shows and needs no network."""
        return render(
            "report.html.j2",
            title=self.title,
            refresh=REFRESH if self.running else None,
            verdict=overall(self.checks),
            verdicts=level_verdicts(self.checks),
            state=self.state,
            error=self.error,
            sentence=None if self.running else sentence(self.checks, self.measured),
            tiles=tiles(self.checks, self.measured),
            levels=_levels(self.checks),
            remedy=remedy,
            figures=self.figures,
            worst=_worst(self.fidelity),
            samples=[_compared(sample) for sample in self.measured.samples[:MOST]],
            compared=any(sample.get("source_text") is not None for sample in self.measured.samples),
            facts=self.facts,
            recipe=self.recipe,
        )


def render(template: str, /, **values: Any) -> str:
    """Renders a template of `verify/report/pages` with `values`; text is escaped, a missing value is an error."""
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return _environment().get_template(template).render(written=written, **values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("verify.report", "pages"), autoescape=True, undefined=StrictUndefined, finalize=_finalize
    )


def _finalize(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _levels(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Level -> its checks; levels and checks worst first."""
    by_severity = sorted(checks, key=lambda check: SEVERITY.index(check.verdict))
    levels = {level: [check for check in by_severity if check.id.split(".")[0] == level] for level in LEVELS}
    found = [(level, made) for level, made in levels.items() if made]
    return dict(sorted(found, key=lambda item: SEVERITY.index(item[1][0].verdict)))


def _compared(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample whose two texts have their differences marked."""
    text, source = marked(sample["text"], sample.get("source_text"))
    return {**sample, "text": text, "source_text": source}


def marked(text: str, other: str | None) -> tuple[Markup, Markup]:
    """Both texts as markup, in which the words that the other one does not have stand in `<mark>`."""
    words, others = (re.findall(r"\w+|\s+|.", printable(part or ""), re.DOTALL) for part in (text, other))
    if other is None or len(words) > _MOST_WORDS or len(others) > _MOST_WORDS:
        return escape("".join(words)), escape("".join(others))
    left, right = Markup(), Markup()
    for kind, a, b, c, d in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        mine, its = escape("".join(words[a:b])), escape("".join(others[c:d]))
        same = kind == "equal"
        left += mine if same or not mine else Markup("<mark>{}</mark>").format(mine)
        right += its if same or not its else Markup("<mark>{}</mark>").format(its)
    return left, right


def _worst(fidelity: Mapping[str, Any]) -> list[dict[str, str]]:
    columns, rows = list(fidelity.get("columns", ())), fidelity.get("rows", ())
    if "relative_error" not in columns:
        return []
    error = columns.index("relative_error")
    known = sorted((row for row in rows if row[error] is not None), key=lambda row: -row[error])
    shown = [n for n, name in enumerate(columns) if name == "module" or n >= error]
    return [{columns[n].replace("_", " "): _figure(row[n]) for n in shown} for row in known[:MOST]]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
