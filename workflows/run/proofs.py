"""What proves in this run that the family's grammar is right: one line a proof, for the terminal, the card and the report.

What a run cannot get past without (names, blocks, observers) holds once it has come so far; what it may do without is
UNCHECKED with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calibration.checkpoint.files import read_json_or_none
from calibration.plan.task import Task
from calibration.runs.journal import RunDirectory
from verify.checks import Check, level_verdicts

#: In the run directory: what vLLM's own class made of the plan, and the proofs of the last verification.
SERVER, PROOFS = "server.json", "proofs.json"


def proofs(task: Task, directory: RunDirectory, checks: Sequence[Check]) -> dict[str, str]:
    """Proof -> PASS, WARN, FAIL or UNCHECKED, and what it rests on."""
    plan = task.plan
    blocks, observed = "UNCHECKED: not calibrated yet", "UNCHECKED: not calibrated yet"
    if task.recipe.method != "calibrate":
        blocks = observed = f"UNCHECKED: method: {task.recipe.method} runs no block before the verification"
    elif directory.facts("calibrated"):
        blocks = f"PASS: each of {len(plan.block_numbers)} traced blocks equals the model's own forward"
        observed = f"PASS: every observer of {len(plan.quantized):,} modules saw tokens"
    server = read_json_or_none(directory.path / SERVER) or {}
    asked = server.get("plan") == plan.digest
    return {
        "names": f"PASS: {len(plan.steps):,} source tensors have one place each, and config.json promises no other",
        "blocks": blocks,
        "observers": observed,
        "server": f"{server['verdict']}: {server['figure']}"
        if asked
        else "UNCHECKED: vLLM's class was not asked in this run",
        **level_verdicts(checks),
    }


def one_line(found: Mapping[str, str]) -> str:
    """The proofs with what holds in short, and the reason of each that does not."""
    return "; ".join(
        f"{name} {text.partition(':')[0] if text.startswith('PASS') else text}" for name, text in found.items()
    )
