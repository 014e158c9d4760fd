"""The figures of finished runs of one source, as their files have them, and the paired differences between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import inner, is_directory, is_file, read_json_object
from calibration.runs.journal import RunDirectory
from recipes.errors import RecipeError, SourceError, collapsed
from recipes.units import size
from verify.accuracy.recovery import NOISE, Recovery, recoveries, standard_error
from verify.checks import SEVERITY
from verify.levels import samples_of
from verify.report.facts import Quality, read_quality
from workflows.batch.state import BatchDirectory
from workflows.run.report import verdict_facts


@dataclass(frozen=True)
class Compared:
    """One run as its files have it. `losses`: mean loss of each window of text, nats per token; `scored`: what text that
    was (digest of its tokens); `source`: model type, parameters, bytes and tensors of what it was made from,
    and `source_digest` of samples of its shards, which a conversion does not take; None and empty is what was not
    measured."""

    name: str
    output: Path
    verdict: str
    source: tuple[Any, ...]
    source_digest: str | None
    output_bytes: int | None
    bits: float | None
    quality: Quality | None
    perplexity: float | None
    losses: tuple[float, ...]
    scored: str | None
    seconds: float | None
    samples: Mapping[str, tuple[str, str | None]]
    accuracy: tuple[Recovery, ...]


@dataclass(frozen=True)
class Difference:
    """Mean loss of `left` minus that of `right` over the same windows, nats per token, with its standard error."""

    left: str
    right: str
    mean: float
    error: float

    @property
    def noise(self) -> bool:
        return abs(self.mean) < NOISE * self.error


def read_runs(places: Sequence[Path]) -> list[Compared]:
    """The runs of all places, each once. Raises SourceError for a place that holds no run, RecipeError for runs that
    cannot be compared with each other: fewer than two, other sources, other text."""
    outputs = {path.absolute(): path for place in places for path in _outputs(place)}
    names = _names(list(outputs))
    runs = [_read(path, names[path]) for path in outputs]
    problems = []
    if len(runs) < 2:
        problems.append(f"{', '.join(map(str, places))}: {len(runs)} run; name at least two to compare")
    for other in runs[1:]:
        digests = {other.source_digest, runs[0].source_digest} - {None}
        if other.source != runs[0].source or len(digests) > 1:
            apart = "with other bytes in its shards; " if other.source == runs[0].source else ""
            problems.append(
                f"{other.name}: made from {described(other)}, {runs[0].name} from {described(runs[0])}, {apart}compare "
                "outputs of one source"
            )
    measured = [run for run in runs if run.perplexity is not None]
    for other in measured[1:]:
        if other.scored is None or other.scored != measured[0].scored:
            problems.append(
                f"{other.name}: measured on other text than {measured[0].name}; verify both with the same "
                "verify.serving.text, windows and window_tokens (`python -m workflows.run RECIPE --stages verify`)"
            )
    if problems:
        raise RecipeError(collapsed(problems))
    return runs


def differences(runs: Sequence[Compared]) -> list[Difference]:
    """The paired difference of every two runs that were measured on two windows or more."""
    found = []
    for left, right in combinations([run for run in runs if len(run.losses) > 1], 2):
        if len(left.losses) != len(right.losses):  # a damaged file
            continue
        apart = [a - b for a, b in zip(left.losses, right.losses, strict=True)]
        mean = sum(apart) / len(apart)
        found.append(Difference(left.name, right.name, mean, standard_error(apart)))
    return found


def _outputs(place: Path) -> list[Path]:
    if is_file(place / "batch.json"):
        return [Path(entry.output) for entry in BatchDirectory(place).load()[0] if entry.output]
    output = place.with_name(place.name.removesuffix(".run")) if place.name.endswith(".run") else place
    run = RunDirectory(output).path
    if not is_directory(run):
        raise SourceError(
            f"{place}: no run: {run} is no directory; name an output that lies beside its own, or a batch's"
        )
    return [output]


def _names(outputs: Sequence[Path]) -> dict[Path, str]:
    """The last parts of each path that tell it from the others."""
    for depth in range(1, max((len(path.parts) for path in outputs), default=0) + 1):
        names = {path: "/".join(path.parts[-depth:]) for path in outputs}
        if len(set(names.values())) == len(names):
            return names
    return {path: str(path) for path in outputs}


def _read(output: Path, name: str) -> Compared:
    directory = RunDirectory(output)
    described = read_json_object(directory.path / "plan.json")
    checkpoint, plan = (inner(described, part) for part in ("checkpoint", "plan"))
    recorded = directory.facts()
    verified: dict[str, Any] = next((f for f in reversed(recorded) if f.get("fact") == "verified"), {})
    verdicts = [v for level, v in verified.items() if level not in ("fact", "time")]
    served = _served(directory) if verified else {}
    windows = served.get("windows") or served.get("prompts")
    losses = [w.get("nll") for w in windows if isinstance(w, dict)] if isinstance(windows, list) else []
    losses = [loss for loss in losses if loss is not None]  # a prompt of one token has none
    finite = tuple(float(loss) for loss in losses if isinstance(loss, int | float) and math.isfinite(loss))
    facts = verdict_facts(output)
    bits = plan.get("bits_per_parameter")
    return Compared(
        name,
        output,
        next((v for v in SEVERITY if v in verdicts), "UNCHECKED"),
        # Not the path: the same source may have been read from two places.
        tuple(checkpoint.get(key) for key in ("model_type", "parameters", "bytes", "tensors")),
        next(
            (inner(f, "parts").get("source files") for f in reversed(recorded) if f.get("fact") == "fingerprint"),
            None,
        ),
        facts.output_bytes,
        float(bits) if isinstance(bits, int | float) else None,
        read_quality(served),
        served["perplexity"] if isinstance(served.get("perplexity"), float) else None,
        finite if len(finite) == len(losses) else (),
        inner(served, "scored").get("digest"),
        sum(s for stage, s in facts.seconds.items() if stage != "verify") or None,
        {s["prompt"]: (s["text"], s.get("source_text")) for s in samples_of(served)},
        tuple(recoveries(served)),
    )


def _served(directory: RunDirectory) -> dict[str, Any]:
    """What vLLM did with the output; nothing if it was not served. Raises SourceError for a damaged file."""
    path = directory.path / "serving.json"
    if not path.exists():
        return {}
    try:
        return read_json_object(path, constants=True)
    except SourceError as error:
        raise SourceError(f"{error}; verify again (`python -m workflows.run RECIPE --stages verify`)") from None


def described(run: Compared) -> str:
    model_type, parameters, held, tensors = run.source
    return (
        f"{model_type}, {parameters:,} parameters, {size(held)}, {tensors} tensors"
        if _counts(run.source)
        else "unknown"
    )


def _counts(source: tuple[Any, ...]) -> bool:
    return all(isinstance(count, int) for count in source[1:])
