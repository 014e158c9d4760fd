"""An output checkpoint written by the real exporter without calibration: scales from weight statistics, input scales
from a constant. For tests of export and structure that need no llm-compressor run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.nvfp4 import GROUP, RANGE
from calibration.engine.export import Exporter
from calibration.plan.plan import Plan
from calibration.plan.task import Task
from calibration.runs.finish import finish_output
from recipes.loader import dump_recipe
from recipes.schema import Recipe

EXPERTS = [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$", r"re:^layers\.\d+\.ffn\.shared_experts\.w[123]$"]


def recipe(
    source: Path, output: Path, targets: list[str] | str = EXPERTS, scheme: str = "NVFP4", **sections: object
) -> Recipe:
    """A recipe with one config group named `experts`."""
    modifier = {
        "config_groups": {"experts": {"targets": targets, "scheme": scheme}},
        "ignore": sections.pop("ignore", []),
    }
    base = {
        "source": {"checkpoint": str(source)},
        "output": str(output),
        "modifiers": [{"QuantizationModifier": modifier}],
        "calibration": {"dataset": "bundled"},
    }
    return Recipe.model_validate(base | sections)


def task_of(made: Recipe) -> Task:
    """The task of a recipe whose source is a local directory."""
    return Task.open(made, Path(made.source.checkpoint))


def plan_of(source: Path, made: Recipe) -> tuple[Plan, Formats]:
    task = Task.open(made, source)
    return task.plan, task.formats


def calibrated(plan: Plan, formats: Formats, block: int | None) -> dict[str, nn.Module]:
    """Modules of one block as llm-compressor leaves them, scales by the NVFP4 formulas from weight maxima."""
    maxima: dict[str, float] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, step in plan.quantized.items():
        if plan.family.place(step.source).block == block:
            weights[name] = formats.read(step.source)
            maxima[name] = float(weights[name].abs().max())
    for group in plan.fused:
        together = [name for name in group if name in maxima]
        maxima.update(dict.fromkeys(together, max((maxima[name] for name in together), default=0.0)))
    modules: dict[str, nn.Module] = {}
    for number, (name, weight) in enumerate(weights.items()):
        module = nn.Module()
        module.weight = nn.Parameter(weight, requires_grad=False)
        global_scale = torch.tensor([RANGE / maxima[name]])
        largest = weight.float().reshape(weight.shape[0], -1, GROUP).abs().amax(-1)
        scale = (global_scale * (largest / 6)).to(torch.float8_e4m3fn).float()
        module.register_buffer("weight_scale", torch.where(scale == 0, 0.125, scale))
        module.register_buffer("weight_global_scale", global_scale)
        module.register_buffer("input_global_scale", torch.tensor([100.0 + number]))
        modules[name] = module
    return modules


def export(source: Path, output: Path, made: Recipe | None = None) -> tuple[Plan, Formats]:
    """Writes the whole output checkpoint and returns its plan and the source's formats."""
    task = Task.open(made or recipe(source, output), source)
    plan, formats, exporter = task.plan, task.formats, Exporter(task)
    for block in plan.block_numbers:
        exporter.block(block, calibrated(plan, formats, block))
    exporter.rest(calibrated(plan, formats, None))
    finish_output(task, dump_recipe(task.recipe))
    return plan, formats
