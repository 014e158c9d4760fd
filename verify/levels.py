"""The levels of a verification in their order, as the stage of a run and the command line both want them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from calibration.checkpoint.formats import Formats
from calibration.plan.plan import Plan
from recipes.schema import Calibration, Fidelity, Serving
from verify.checks import Check
from verify.fidelity.fidelity import verify_with_forward
from verify.serving.serving import SourceToServe, source_as_stored, verify_serving
from verify.structure.structure import verify_structure

_FIDELITY = "no quantized weight is far from the source's"


def verify_levels(
    directory: Path,
    levels: Collection[str],
    log_dir: Path,
    *,
    plan: Plan | None = None,
    source: Formats | None = None,
    fidelity: Fidelity | None = None,
    text: Calibration | None = None,
    serving: Serving | None = None,
    source_to_serve: SourceToServe | None = None,
    trust_remote_code: bool = False,
    digests: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_fidelity: Callable[[dict[str, Any]], None] = lambda data: None,
) -> tuple[list[Check], dict[str, Any]]:
    """Makes the checks of `levels` (structure, fidelity, serving) and returns them with the serving engine's result.

    source_to_serve: the source as the engine can load it; the source as stored when left out.
    `digests` are the shards' as the run wrote them (see `verify_structure`). Fidelity needs a source and a whole
    structure, else it is UNCHECKED; it runs `text` (the bundled set where there is none) through every block, and
    `on_fidelity` gets its data (the content of fidelity.json). A broken checkpoint gives verdicts, not exceptions;
    EnvironmentProblem is raised where there is no engine to ask.
    """
    checks: list[Check] = []
    if "structure" in levels:
        say("verify: structure")
        checks += verify_structure(directory, plan, source.checkpoint if source else None, digests=digests)
    if "fidelity" in levels:
        broken = any(check.verdict == "FAIL" for check in checks)
        if source is None or broken:
            why = "the structure is broken" if broken else "no source given"
            checks.append(Check("fidelity.weights", "UNCHECKED", _FIDELITY, why, "", "not run"))
        else:
            say("verify: fidelity")
            report = verify_with_forward(directory, plan, source, fidelity, text, trust_remote_code)
            checks += report.checks
            on_fidelity(report.data)
    if "serving" not in levels or serving is None:
        return checks, {}
    say("verify: serving (vLLM loads the checkpoint in its own process)")
    if source_to_serve is None and source is not None:
        source_to_serve = source_as_stored(source, serving)
    served, result = verify_serving(
        directory, serving, log_dir, trust_remote_code=trust_remote_code, source=source_to_serve
    )
    return checks + served, result


def samples_of(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The samples of a serving.json, which may be damaged or another's; none where it holds none."""
    samples = (result or {}).get("samples")
    return [
        sample
        for sample in (samples if isinstance(samples, list) else [])
        if isinstance(sample, dict) and all(isinstance(sample.get(key), str) for key in ("kind", "prompt", "text"))
    ]


def print_samples(samples: list[dict[str, Any]], console: Console, most: int = 2) -> None:
    """The first samples, a line each, long prompts cut."""
    for sample in samples[:most]:
        prompt = sample["prompt"] if len(sample["prompt"]) <= 80 else sample["prompt"][:77] + "..."
        console.print(f"sample ({sample['kind']}): {prompt!r} -> {sample['text']!r}", soft_wrap=True)
