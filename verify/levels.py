"""Runs the levels of a verification in order, for both the verify stage of a run and the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes.checks import Accuracy, Fidelity, Serving
from recipes.schema import Calibration
from verify.checks import Check
from verify.fidelity.fidelity import verify_with_forward
from verify.known import Known
from verify.serving.serving import Extras, SourceToServe, source_as_stored, verify_serving
from verify.structure.structure import verify_structure

_FIDELITY = "no quantized weight is far from the source's"


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is verified: the `levels` to check, `logs` for the serving engine's files, the thresholds of
    `fidelity`, the `text` that runs through every block (None: the bundled set), the `serving` engine (None: no
    serving), the `accuracy` gate (None: no tasks), `source_to_serve`, the source in a form that the engine can load
    (None: as stored), and whether the checkpoint's own code may run."""

    levels: Collection[str]
    logs: Path
    fidelity: Fidelity | None = None
    text: Calibration | None = None
    serving: Serving | None = None
    accuracy: Accuracy | None = None
    source_to_serve: SourceToServe | None = None
    trust_remote_code: bool = False


def verify_levels(
    directory: Path,
    known: Known,
    settings: Settings,
    say: Callable[[str], None] = lambda text: None,
    on_fidelity: Callable[[dict[str, Any]], None] = lambda data: None,
) -> tuple[list[Check], dict[str, Any]]:
    """Runs the checks of the levels and returns them with the serving engine's result.

    Fidelity needs a source and an intact structure, else it is UNCHECKED; `on_fidelity` receives its data (the content
    of fidelity.json). A broken checkpoint gives verdicts, not exceptions. Raises EnvironmentProblem if there is no
    serving engine.
    """
    checks: list[Check] = []
    if "structure" in settings.levels:
        say("verify: structure")
        checks += verify_structure(directory, known)
    if "fidelity" in settings.levels:
        broken = any(check.verdict == "FAIL" for check in checks)
        if known.source is None or broken:
            why = "the structure is broken" if broken else "no source given"
            checks.append(Check("fidelity.weights", "UNCHECKED", _FIDELITY, why, "", "not run"))
        else:
            say("verify: fidelity")
            report = verify_with_forward(
                directory, known.plan, known.source, settings.fidelity, settings.text, settings.trust_remote_code
            )
            checks += report.checks
            on_fidelity(report.data)
    if "serving" not in settings.levels or settings.serving is None:
        return checks, {}
    say("verify: serving (vLLM loads the checkpoint in its own process)")
    source = settings.source_to_serve
    if source is None and known.source is not None:
        source = source_as_stored(known.source, settings.serving)
    served, result = verify_serving(
        directory,
        settings.serving,
        settings.logs,
        extras=Extras(settings.accuracy, settings.trust_remote_code),
        source=source,
    )
    return checks + served, result


def samples_of(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The samples of a serving.json, which may be damaged or foreign; empty if it has none."""
    samples = (result or {}).get("samples")
    return [
        sample
        for sample in (samples if isinstance(samples, list) else [])
        if isinstance(sample, dict) and all(isinstance(sample.get(key), str) for key in ("kind", "prompt", "text"))
    ]


def print_samples(samples: Sequence[Mapping[str, Any]], console: Console, most: int = 2) -> None:
    """Prints the first samples, one per line, with long prompts shortened."""
    for sample in samples[:most]:
        prompt = sample["prompt"] if len(sample["prompt"]) <= 80 else sample["prompt"][:77] + "..."
        console.print(f"sample ({sample['kind']}): {prompt!r} -> {sample['text']!r}", soft_wrap=True)
