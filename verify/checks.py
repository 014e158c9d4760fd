"""The result of one check of a checkpoint, and the verdict of many checks together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from recipes.errors import collapsed

Verdict = Literal["PASS", "FAIL", "WARN", "UNCHECKED"]
LEVELS = ("structure", "fidelity", "serving")
#: The level of a proof, which is only there if it was asked for.
PROOF = "proof"
#: The verdicts, worst first.
SEVERITY: tuple[Verdict, ...] = ("FAIL", "UNCHECKED", "WARN", "PASS")


@dataclass(frozen=True)
class Check:
    """One check. `id` is `<level>.<name>` with level structure, fidelity, serving or proof; `what` says what it proves,
    `figure` and `threshold` are text for people, `how` says how the figure was obtained. UNCHECKED means that nothing
    was proven; it is never a PASS."""

    id: str
    verdict: Verdict
    what: str
    figure: str
    threshold: str
    how: str


def verdict(
    id: str, what: str, problems: Sequence[str], doubts: Sequence[str], how: str, figure: str = "no problem"
) -> Check:
    """A check: FAIL with the first problems if there are any, WARN with the first doubts if there are any, else PASS
    with `figure`."""
    found = list(problems) or list(doubts)
    alike = collapsed(found)
    shown = "; ".join(alike[:5]) + (f"; and {len(alike) - 5} more" if len(alike) > 5 else "")
    return Check(id, "FAIL" if problems else "WARN" if doubts else "PASS", what, shown or figure, "no problem", how)


def unchecked(id: str, what: str, why: str) -> Check:
    """An UNCHECKED check with the reason `why`."""
    return Check(id, "UNCHECKED", what, why, "", "not run")


def level_verdicts(checks: Sequence[Check]) -> dict[str, Verdict]:
    """Level -> its verdict: FAIL if one of its checks failed, UNCHECKED if it has no checks or one is unchecked, else
    WARN or PASS. A level is the part of a check's id before the first dot; a proof is only listed if there is one."""
    found = [(check.id.split(".")[0], check.verdict) for check in checks]
    levels = (*LEVELS, *((PROOF,) if any(level == PROOF for level, _ in found) else ()))
    return {level: _worst(verdict for named, verdict in found if named == level) for level in levels}


def overall(checks: Sequence[Check]) -> Verdict:
    """The worst verdict of all levels: a level without checks makes it UNCHECKED, unless another level has failed."""
    return _worst(level_verdicts(checks).values())


def _worst(found: Iterable[Verdict]) -> Verdict:
    have = set(found)
    return next((verdict for verdict in SEVERITY if verdict in have), "UNCHECKED")


def failed(checks: Sequence[Check]) -> list[Check]:
    """The checks whose verdict is FAIL."""
    return [check for check in checks if check.verdict == "FAIL"]


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """`{"verdict": overall, "verdicts": {level: verdict}, "checks": [...]}`."""
    return {
        "verdict": overall(checks),
        "verdicts": level_verdicts(checks),
        "checks": [asdict(check) for check in checks],
    }
