"""One check of a checkpoint: what was checked, how, and what came out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
