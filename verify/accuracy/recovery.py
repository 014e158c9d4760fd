"""How much of the source's score the output keeps, task by task, and the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.checks import Accuracy
from verify.checks import Verdict

#: Standard errors within which two figures are not told apart.
NOISE = 2.0


@dataclass(frozen=True)
class Recovery:
    """One task: mean scores of the output and of the source on the same samples, the output's share of the source's with
    its standard error (paired by sample), how many samples, and why it decides nothing, or empty."""

    task: str
    metric: str
    output: float
    source: float | None = None
    recovered: float | None = None
    error: float | None = None
    samples: int = 0
    open: str = ""

    def __str__(self) -> str:
        if self.recovered is None or self.source is None:
            return f"{self.task} {self.metric} {self.output:.3f} ({self.open})"
        error = f" +- {self.error:.1%}" if self.error is not None else ""
        said = (
            f"{self.task} {self.metric} {self.source:.3f} -> {self.output:.3f}, {self.recovered:.1%}{error} recovered"
        )
        return f"{said} over {self.samples} samples" + (f" ({self.open})" if self.open else "")


def recoveries(result: Mapping[str, Any]) -> list[Recovery]:
    """The tasks of a serving result, which may be damaged: the output's scores beside those of its source."""
    ours, source = _tasks(result), _tasks(result.get("source") or {})
    return [_recovery(name, mine, source.get(name)) for name, mine in ours.items()]


def judge_accuracy(result: Mapping[str, Any], options: Accuracy) -> tuple[Verdict, str]:
    """FAIL if a task is below `min_recovery` by more than noise; UNCHECKED if one was not scored on both, if the source
    itself does not score above chance, or if a task below the bound has too few samples to tell; else PASS."""
    said = (result.get("accuracy") or {}).get("error")
    if said:
        return "UNCHECKED", f"lm-eval: {said}"
    found = recoveries(result)
    if not found:
        return "UNCHECKED", "no task was scored"
    source = (result.get("source") or {}).get("accuracy") or {}
    verdicts: list[Verdict] = []
    shown = []
    for task in found:
        if task.recovered is None or task.open or task.error is None:
            verdicts.append("UNCHECKED")
            shown.append(f"{task}; lm-eval on the source: {source['error']}" if source.get("error") else str(task))
        elif task.recovered >= options.min_recovery:
            verdicts.append("PASS")
            shown.append(str(task))
        else:
            below = task.recovered + NOISE * task.error < options.min_recovery
            verdicts.append("FAIL" if below else "UNCHECKED")
            shown.append(str(task) + ("" if below else "; below the bound, but within noise: score more samples"))
    worst: Verdict = next((v for v in ("FAIL", "UNCHECKED") if v in verdicts), "PASS")
    return worst, "; ".join(shown)


def _recovery(name: str, mine: Mapping[str, Any], source: Mapping[str, Any] | None) -> Recovery:
    scores, metric = _scores(mine), str(mine.get("metric"))
    output = sum(scores) / len(scores) if scores else math.nan
    if source is None:
        return Recovery(name, metric, output, samples=len(scores), open="the source was not scored")
    theirs = _scores(source)
    if not scores or len(theirs) != len(scores) or source.get("samples") != mine.get("samples"):
        return Recovery(name, metric, output, samples=len(scores), open="the source was scored on other samples")
    before = sum(theirs) / len(theirs)
    chance = source.get("chance")
    chance = float(chance) if isinstance(chance, int | float) else 0.0
    if before - chance <= NOISE * standard_error(theirs):
        why = f"the source scores {before:.3f}, by chance it is {chance:.3f}: the task says nothing"
        return Recovery(name, metric, output, before, samples=len(scores), open=why)
    share = output / before
    error = standard_error([a - share * b for a, b in zip(scores, theirs, strict=True)]) / before
    return Recovery(name, metric, output, before, share, error, len(scores))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _tasks(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    accuracy = result.get("accuracy")
    tasks = accuracy.get("tasks") if isinstance(accuracy, dict) else None
    return {str(n): t for n, t in tasks.items() if isinstance(t, dict)} if isinstance(tasks, dict) else {}


def _scores(task: Mapping[str, Any]) -> list[float]:
    found = task.get("scores")
    return [float(s) for s in found if isinstance(s, int | float)] if isinstance(found, list) else []
