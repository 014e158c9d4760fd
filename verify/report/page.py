"""Renders the report as one self-contained HTML page: the verdict first, then checks, plots, samples, facts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from recipes.errors import printable
from verify.checks import SEVERITY, Check, level_verdicts, overall
from verify.report.plots import Figure

#: Seconds after which the page of a running run reloads itself.
REFRESH = 60
#: Maximum number of samples and modules that a page shows.
MOST = 20


@dataclass
class Report:
    """The content of a report; empty fields are not shown.

    `state` are lines about the progress of a run; `running` makes the page reload itself; `error` marks a state that
    needs attention. `fidelity` is the table of `verify.fidelity` (fidelity.json).
    """

    title: str
    checks: Sequence[Check] = ()
    state: Sequence[str] = ()
    running: bool = False
    error: bool = False
    figures: Sequence[Figure] = ()
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
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
            checks=sorted(self.checks, key=lambda check: SEVERITY.index(check.verdict)),
            figures=self.figures,
            worst=_worst(self.fidelity),
            samples=self.samples[:MOST],
            compared=any(sample.get("source_text") is not None for sample in self.samples),
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
