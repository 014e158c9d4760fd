"""What the runs of the matrix came to (docs/families.json), and the table that docs/families.md shows of them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from verify.checks import LEVELS

_DOCS = Path(__file__).parents[1] / "docs"
KEPT, PAGE = _DOCS / "families.json", _DOCS / "families.md"
BEGIN, END = "<!-- begin: written by python -m tests.families -->", "<!-- end -->"
_HEAD = (
    "| family | stored as | calibrate | convert | worst block cosine | what warned or was not checked | run |",
    "|---|---|---|---|---|---|---|",
)
#: Characters of a note that the table shows; docs/families.json has all of it.
_NOTE = 150


class Row(BaseModel):
    """One run: its case, exit code, verdicts by level, notes by check, worst block cosine as printed, seconds, and when it was
    run: `key` of `tests.families.key`, date and commit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    form: str | None
    method: str
    exit_code: int
    verdicts: dict[str, str]
    notes: dict[str, str]
    cosine: str
    seconds: int
    key: str
    date: str
    commit: str


def rows() -> list[Row]:
    """Every run that is kept."""
    return [Row.model_validate(row) for row in json.loads(KEPT.read_text())] if KEPT.is_file() else []


def keep(row: Row) -> None:
    """Puts a run in place of the one of the same case and writes the table; processes take turns."""
    from tests.families import cases

    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        others = [
            other for other in rows() if (other.family, other.form, other.method) != (row.family, row.form, row.method)
        ]
        ordered = sorted([*others, row], key=lambda found: (found.family, found.form or "", found.method))
        KEPT.write_text(json.dumps([found.model_dump(mode="json") for found in ordered], indent=1) + "\n")
        write(cases())


def write(cases: Sequence[tuple[str, str | None]]) -> None:
    """Writes the table between the marks of docs/families.md."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows(), cases)}\n{END}{rest.partition(END)[2]}")


def table(rows: Iterable[Row], cases: Sequence[tuple[str, str | None]]) -> str:
    """The table in Markdown, one line a case."""
    by_case = {(row.family, row.form, row.method): row for row in rows}
    lines = [*_HEAD]
    for family, form in cases:
        found = {method: row for method in ("calibrate", "convert") if (row := by_case.get((family, form, method)))}
        verdicts = [_verdicts(found.get(method)) for method in ("calibrate", "convert")]
        notes = {note: None for row in found.values() for note in _notes(row)}
        when = {f"{row.date} {row.commit}".strip(): None for row in found.values()}
        cosine = next((row.cosine for row in found.values() if row.cosine), "")
        cells = (
            family,
            form or "BF16",
            *verdicts,
            cosine,
            "; ".join(notes).replace("|", "\\|"),
            ", ".join(when) or "never",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdicts(row: Row | None) -> str:
    if row is None:
        return "not run"
    if not row.verdicts:
        return f"exit {row.exit_code}"
    return " ".join(row.verdicts.get(level, "-") for level in LEVELS)


def _notes(row: Row) -> list[str]:
    found = [note if check == "note" else f"{check} {note}" for check, note in row.notes.items()]
    return [note if len(note) <= _NOTE else note[: _NOTE - 3] + "..." for note in found]
