"""What a verdict shows beside the checks: size, time, samples, and how near the output is to its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from verify.checks import Check

Grade = Literal["high", "reduced", "low"]
#: Grade -> least share of the perplexity kept, largest KL in nats, least top-1. docs/verification.md says why.
BOUNDS: dict[Grade, tuple[float, float, float]] = {"high": (0.95, 0.1, 0.9), "reduced": (0.75, 0.3, 0.75)}


@dataclass(frozen=True)
class Facts:
    """What a verdict shows beside the checks; whatever is empty is left out. `source_bytes` and `output_bytes` are those
    of the tensors, `seconds` the wall time of each stage, `served` the content of serving.json, `samples` those of it that
    are whole, `places` what was written where, `more` how to see everything."""

    source_bytes: int | None = None
    output_bytes: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    served: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    more: str = "--details"


@dataclass(frozen=True)
class Quality:
    """How near the served output is to its served source on the same text: both perplexities, the difference of the mean
    loss (nats per token) with its standard error, KL(source || output) in nats, share of equal top-1 tokens. None is a
    figure that is not finite, or that was not measured."""

    source_perplexity: float | None
    perplexity: float | None
    difference: float | None
    error: float | None
    kl: float | None
    top1: float | None

    @property
    def kept(self) -> float | None:
        """The source's perplexity over the output's: 1 if nothing was lost, 0.67 if it is 50 % worse."""
        if self.source_perplexity is None or not self.perplexity:
            return None
        return self.source_perplexity / self.perplexity

    @property
    def grade(self) -> Grade:
        """The best grade whose bounds all three figures keep."""
        return next((grade for grade in BOUNDS if not self.beyond(grade)), "low")

    def beyond(self, grade: Grade) -> list[str]:
        """The figures that do not keep the bounds of `grade`; one that is not finite keeps none."""
        kept, kl, top1 = BOUNDS[grade]
        held = {
            "perplexity": self.kept is not None and self.kept >= kept,
            "KL": self.kl is not None and self.kl <= kl,
            "top-1": self.top1 is not None and self.top1 >= top1,
        }
        return [name for name, good in held.items() if not good]


def read_quality(served: Mapping[str, Any]) -> Quality | None:
    """The quality that a serving.json holds, which may be damaged; None if the source was not served beside the output."""
    source = served.get("source")
    agreement = source.get("agreement") if isinstance(source, dict) else None
    if not isinstance(source, dict) or not isinstance(agreement, dict):
        return None
    return Quality(
        _number(source, "perplexity"),
        _number(served, "perplexity"),
        _number(source, "nll_difference"),
        _number(source, "nll_error"),
        _number(agreement, "kl"),
        _number(agreement, "top1"),
    )


def was_served(checks: Sequence[Check]) -> bool:
    """Whether this verification served the checkpoint; serving.json stays of an earlier one otherwise."""
    return any(check.id.startswith("serving.") for check in checks)


def measured_quality(checks: Sequence[Check], facts: Facts) -> Quality | None:
    """The quality that this verification measured; None if it served nothing, or not the source."""
    return read_quality(facts.served) if was_served(checks) else None


def _number(found: Mapping[str, Any], key: str) -> float | None:
    # The worker writes what is not finite as text.
    value = found.get(key)
    return (
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None
    )
