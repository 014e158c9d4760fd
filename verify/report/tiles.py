"""The first screen of a page: one sentence that says whether the checkpoint can be used, and the figures as tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipes.units import duration, size
from verify.accuracy.recovery import recoveries
from verify.checks import Check, overall
from verify.report.facts import Facts, Grade, Quality, measured_quality, was_served

#: Grade -> what it means to somebody who has to decide.
_MEANS: dict[Grade, str] = {
    "high": "it predicts text nearly as its source does",
    "reduced": "it predicts text somewhat worse than its source",
    "low": "it predicts text clearly worse than its source",
}
_TONE: dict[Grade, str] = {"high": "PASS", "reduced": "WARN", "low": "FAIL"}


@dataclass(frozen=True)
class Tile:
    """One figure: `note` says what it was before or how sure it is, `tone` is a verdict that colors it, or empty."""

    name: str
    figure: str
    note: str = ""
    tone: str = ""


def sentence(checks: Sequence[Check], facts: Facts) -> str:
    """What to think of the checkpoint, for somebody who reads nothing else."""
    total, quality = overall(checks), measured_quality(checks, facts)
    if not checks:
        return "Not verified yet: nothing is proven."
    kept = _kept(quality)
    if total == "FAIL":
        bad = [check for check in checks if check.verdict == "FAIL"]
        return f"Do not serve this checkpoint: {len(bad)} of {len(checks)} checks failed, the first is {bad[0].id}."
    if total == "UNCHECKED":
        open_ones = [check for check in checks if check.verdict == "UNCHECKED"]
        why = f"{len(open_ones)} checks were not made" if open_ones else "a level was not verified"
        return f"Nothing failed, but not everything is proven: {why}.{kept}"
    warned = sum(check.verdict == "WARN" for check in checks)
    start = "Every check passed" if total == "PASS" else f"Nothing failed; {warned} of {len(checks)} checks warn"
    if quality is None:
        return f"{start}. How much of the source's quality is kept was not measured."
    return f"{start}{', but ' if quality.grade == 'low' else ', and '}{_MEANS[quality.grade]}.{kept}"


def tiles(checks: Sequence[Check], facts: Facts) -> list[Tile]:
    """The figures that are known, the most asked for first."""
    quality, found = measured_quality(checks, facts), []
    if quality is not None:
        kept = "not finite" if quality.kept is None else f"{quality.kept:.1%}"
        found.append(
            Tile("quality kept", kept, f"{quality.grade}: source's perplexity / output's", _TONE[quality.grade])
        )
        error = "" if quality.error is None else f" +- {quality.error:.3f}"
        loss = "" if quality.difference is None else f", {quality.difference:+.3f}{error} nats"
        found.append(
            Tile("perplexity", _figure(quality.perplexity), f"source {_figure(quality.source_perplexity)}{loss}")
        )
        found.append(Tile("KL", _figure(quality.kl), "nats per token, source against output"))
        found.append(Tile("top-1", "not finite" if quality.top1 is None else f"{quality.top1:.1%}", "same next token"))
    for task in recoveries(facts.served) if was_served(checks) else []:
        share = "" if task.recovered is None else f"{task.recovered:.1%}"
        error = "" if task.error is None else f" +- {task.error:.1%}"
        before = "" if task.source is None else f"{task.source:.3f} -> "
        found.append(Tile(task.task, share or task.open, f"{before}{task.output:.3f} {task.metric}, recovered{error}"))
    if facts.output_bytes is not None:
        whole = facts.source_bytes
        note = f"source {size(whole)} ({facts.output_bytes / whole:.0%})" if whole else ""
        found.append(Tile("size", size(facts.output_bytes), note))
    found += [
        Tile("bits per parameter", check.figure)
        for check in checks
        if check.id == "structure.bits" and check.verdict == "PASS"
    ]
    if facts.seconds:
        longest = sorted(facts.seconds.items(), key=lambda stage: -stage[1])
        found.append(
            Tile("time", duration(sum(facts.seconds.values())), ", ".join(f"{n} {duration(s)}" for n, s in longest[:3]))
        )
    return found


def _kept(quality: Quality | None) -> str:
    if quality is None or quality.kept is None:
        return ""
    return f" It keeps {quality.kept:.1%} of the source's perplexity on the test text."


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
