"""Converts global scales to the other dialect: 1 / x in float32, one scale for all projections that a serving engine
fuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from calibration.checkpoint.dialect import DIALECTS, inverse, returns
from calibration.checkpoint.formats import Formats
from calibration.plan.plan import Plan
from recipes.errors import SourceError, collapsed


@dataclass(frozen=True)
class Inverted:
    """`values` maps a source scale's name to its float32 reciprocal. `inexact` counts the reciprocals that float32
    rounds, `worst` is the largest relative change of a scale by rounding; `one_way` names the source scales that are
    not the reciprocal of their reciprocal, bit for bit; `widened` counts input scales that were replaced by the larger
    one of their group."""

    values: dict[str, np.float32] = field(default_factory=dict)
    inexact: int = 0
    worst: float = 0.0
    widened: int = 0
    one_way: tuple[str, ...] = ()


def invert_scales(plan: Plan, formats: Formats) -> Inverted:
    """The reciprocals of every scale that `plan` inverts. Raises SourceError, all at once, for scales that are not
    finite and positive in both dialects, and for fused weights with different scales."""
    problems: list[str] = []
    weights: dict[str, tuple[str, float]] = {}
    inputs: dict[str, tuple[str, float]] = {}
    for step in (step for step in plan.steps.values() if step.action == "invert"):
        value = float(formats.checkpoint.read(step.source))
        if not (value > 0 and np.isfinite(value) and np.isfinite(inverse(value))):
            problems.append(
                f"{formats.checkpoint.path(step.source)}: {step.source}: {value} is not a finite positive scale"
            )
        module, _, leaf = step.outputs[0].name.rpartition(".")
        of_inputs = leaf in {dialect.input_scale for dialect in DIALECTS.values()}
        (inputs if of_inputs else weights)[module] = (step.source, value)
    for group in plan.fused:
        scales = {weights[module][0]: weights[module][1] for module in group if module in weights}
        if len(set(scales.values())) > 1:
            problems.append(
                f"{formats.checkpoint.directory}: projections that are served as one matrix have different global scales "
                f"({', '.join(f'{name}: {value:g}' for name, value in scales.items())}): a serving engine would use one for "
                "all; write BF16 with method: plain and quantize that"
            )
    if problems:
        raise SourceError(collapsed(problems))
    widened = 0
    for group in plan.shared_input_scales():
        sharing = [module for module in group if module in inputs]
        largest = max((inputs[module][1] for module in sharing), default=0.0)
        widened += sum(inputs[module][1] != largest for module in sharing)
        inputs |= {module: (inputs[module][0], largest) for module in sharing}
    values, inexact, worst, one_way = dict[str, np.float32](), 0, 0.0, list[str]()
    for source, value in (*weights.values(), *inputs.values()):
        values[source] = inverse(value)
        # The product of two float32 is exact in float64.
        change = abs(1 / (float(values[source]) * value) - 1)
        inexact, worst = inexact + (change > 0), max(worst, change)
        one_way += [] if returns(value) else [source]
    return Inverted(values, inexact, worst, widened, tuple(one_way))
