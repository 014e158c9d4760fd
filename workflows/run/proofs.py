"""What proves in this run that the family's grammar is right: one line a proof, for the terminal, the card and the report.

What a run cannot get past without (names, blocks, observers) holds once it has come so far; what it may do without is
UNCHECKED with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import read_json_or_none
from calibration.plan.task import Task
from calibration.runs.journal import RunDirectory
from verify.checks import Check, level_verdicts
from verify.serving.agreement import ID

#: In the run directory: what vLLM's own class made of the plan, what the dress rehearsal proved, and the proofs of the last
#: verification.
SERVER, REHEARSAL, PROOFS = "server.json", "rehearsal.json", "proofs.json"


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
        "forward": _forward(task, directory),
        **level_verdicts(checks),
    }


def _forward(task: Task, directory: RunDirectory) -> str:
    """Whether vLLM computes the model that transformers computes, as the dress rehearsal found it."""
    if task.recipe.method != "calibrate":
        return f"UNCHECKED: method: {task.recipe.method} calibrates nothing with transformers' forward"
    found = compared_forwards(directory.path / REHEARSAL, "plan", task.plan.digest)
    if found is not None:
        return f"{found.get('verdict')}: {found.get('figure')}"
    return "UNCHECKED: no dress rehearsal compared vLLM's forward with transformers' (rehearse.serving: true does)"


def compared_forwards(path: Path, key: str, value: str) -> dict[str, Any] | None:
    """The check of both forwards in a `rehearsal.json` whose field `key` is `value`; None if there is none."""
    kept = read_json_or_none(path) or {}
    checks = kept.get("checks") if kept.get(key) == value else None
    checks = checks if isinstance(checks, list) else []
    return next((check for check in checks if isinstance(check, dict) and check.get("id") == ID), None)


def one_line(found: Mapping[str, str]) -> str:
    """The proofs with what holds in short, and the reason of each that does not."""
    return "; ".join(
        f"{name} {text.partition(':')[0] if text.startswith('PASS') else text}" for name, text in found.items()
    )
