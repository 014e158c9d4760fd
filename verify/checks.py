"""One check of a checkpoint: what was checked, how, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recipes.errors import collapsed

Verdict = Literal["PASS", "FAIL", "WARN", "UNCHECKED"]


@dataclass(frozen=True)
class Check:
    """`id` is `<level>.<name>`, the level being structure, fidelity or serving. `figure` and `threshold` are text for
    people; `how` says how the figure was obtained. UNCHECKED means that nothing was proven, never a PASS."""

    id: str
    verdict: Verdict
    what: str
    figure: str
    threshold: str
    how: str


def verdict(
    id: str, what: str, problems: Sequence[str], doubts: Sequence[str], how: str, figure: str = "no problem"
) -> Check:
    """FAIL with the first problems, WARN with the first doubts, else PASS with `figure`."""
    found = list(problems) or list(doubts)
    alike = collapsed(found)
    shown = "; ".join(alike[:5]) + (f"; and {len(alike) - 5} more" if len(alike) > 5 else "")
    return Check(id, "FAIL" if problems else "WARN" if doubts else "PASS", what, shown or figure, "no problem", how)


def unchecked(id: str, what: str, why: str) -> Check:
    """A check that was not made, and why."""
    return Check(id, "UNCHECKED", what, why, "", "not run")
