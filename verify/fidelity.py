"""Fidelity: every quantized weight of the output, dequantized, against the source's, one tensor at a time."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.plan import Plan
from recipes.errors import WorkflowError
from verify.checks import Check, Verdict

#: Largest relative weight error |output - source| / |source| of one module. Measured (docs/lab-notes.md): 0.094 to 0.098
#: for round to nearest on Gaussian weights, 0.064 from MXFP4, at most 0.139 for GPTQ, which trades weight error for
#: output error; hence the margin.
WORST_ERROR = 0.3


def relative_errors(directory: Path, plan: Plan, source: Formats) -> dict[str, float]:
    """Module -> `|output - source| / |source|` (Frobenius norms, float32) of every quantized weight. Memory: two
    dequantized weights."""
    output = Formats(Checkpoint.open(directory))
    errors = {}
    for module, step in plan.quantized.items():
        original = source.read(step.source, torch.float32)
        stored = next(o.name for o in step.outputs if o.name.endswith((".weight_packed", ".weight")))
        difference = output.read(stored, torch.float32).sub_(original).norm()
        errors[module] = float(difference / original.norm().clamp_min(1e-30))
    return errors


def verify_fidelity(directory: Path, plan: Plan, source: Formats) -> list[Check]:
    """Two checks: the worst module's relative weight error against WORST_ERROR, and outliers against their peers (the
    same projection of the same part in all blocks and experts), which WARN beyond twice the median. Never raises for a
    bad output."""
    what, how = "no quantized weight is far from the source's", "output and source dequantized, Frobenius norms"
    try:
        errors = relative_errors(directory, plan, source)
    except WorkflowError as problem:
        return [Check("fidelity.weights", "FAIL", what, str(problem), f"<= {WORST_ERROR}", how)]
    if not errors:
        return [Check("fidelity.weights", "UNCHECKED", what, "nothing is quantized", "", how)]
    worst = max(errors, key=errors.__getitem__)
    figure = f"worst {errors[worst]:.4f} ({worst}), median {statistics.median(errors.values()):.4f} of {len(errors)}"
    verdict: Verdict = "PASS" if errors[worst] <= WORST_ERROR else "FAIL"
    checks = [Check("fidelity.weights", verdict, what, figure, f"<= {WORST_ERROR}", how)]
    peers: dict[tuple[str, str], dict[str, float]] = {}
    for module, error in errors.items():
        # By part too: routed experts of an MXFP4 source lose less than the FP8 shared experts beside them.
        peers.setdefault((plan.family.place(module).part, module.rpartition(".")[2]), {})[module] = error
    outliers = [
        f"{module} {error:.4f}"
        for group in peers.values()
        for module, error in group.items()
        if error > 2 * statistics.median(group.values())
    ]
    shown = ", ".join(outliers[:5]) + (f" and {len(outliers) - 5} more" if len(outliers) > 5 else "")
    checks.append(
        Check("fidelity.outliers", "WARN" if outliers else "PASS", "no module is far worse than its peers",
              shown or "none", "<= 2 x the median of the same part and projection", how)
    )  # fmt: skip
    return checks
