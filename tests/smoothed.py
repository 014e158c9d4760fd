"""Smoothed outputs without an engine: random factors at every site of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.checkpoint import nvfp4
from calibration.checkpoint.formats import Formats
from calibration.engine.export import Exporter
from calibration.engine.smoothing import Factors
from calibration.plan.task import Task
from calibration.runs.finish import finish_output
from recipes.loader import dump_recipe
from tests.exported import calibrated, recipe


def export_smoothed(source: Path, output: Path, modifiers: list[dict[str, Any]]) -> tuple[Task, Path]:
    """Exports `source` with factors of 1/4 to 4 at every site that the `modifiers` smooth, as the engine would hand them to the
    exporter. Returns the task and `output`."""
    task = Task.open(recipe(source, output, modifiers=modifiers), source)
    generator, rows, columns = torch.Generator().manual_seed(0), {}, {}
    for site in task.plan.smoothed:
        width = task.formats.of(f"{site.smooth}.weight").shape[0]
        exponents = torch.randint(-2, 3, (width,), generator=generator).float()
        rows[site.smooth] = torch.exp2(-exponents)
        for reader in site.readers:
            count = task.formats.of(f"{reader}.weight").shape[1]
            columns[reader] = torch.exp2(exponents)[site.channels(count, width)]
    factors = {name: Factors(rows.get(name), columns.get(name)) for name in {**rows, **columns}}
    exporter = Exporter(task)
    for block in task.plan.block_numbers:
        exporter.block(block, _smoothed_modules(task, block, factors), factors)
    exporter.rest({})
    finish_output(task, dump_recipe(task.recipe))
    return task, output


def _smoothed_modules(task: Task, block: int, factors: dict[str, Factors]) -> dict[str, nn.Module]:
    class Scaled(Formats):
        def read(
            self, name: str, dtype: torch.dtype | None = torch.bfloat16, out: torch.Tensor | None = None
        ) -> torch.Tensor:
            return factors.get(name.removesuffix(".weight"), Factors()).apply(super().read(name, dtype, out))

    modules: dict[str, Any] = calibrated(task.plan, Scaled(task.formats.checkpoint), block)
    for module in modules.values():  # the observers' arithmetic is that of BF16
        amax = (nvfp4.RANGE / module.weight_global_scale).to(torch.bfloat16)
        module.weight_global_scale = nvfp4.observed_global_scale(amax)
        module.weight_scale = nvfp4.observed_group_scales(module.weight, module.weight_global_scale).float()
    return modules
