"""Turns an output's shards into a checkpoint: writes side files, recipe and config, and the index last."""

from __future__ import annotations

import functools
import shutil

from calibration.checkpoint.files import write_json, write_safely, write_text
from calibration.checkpoint.side_files import side_files
from calibration.plan.output_files import planned_files
from calibration.plan.task import Task

#: The model card; the output has one of its own.
CARD_NAME = "README.md"


def finish_output(task: Task, recipe_text: str | None) -> list[str]:
    """Writes the source's side files, recipe.yaml (if `recipe_text` is given), config.json, in NVIDIA's dialect
    hf_quant_config.json, and the index last: only then does the output load. Returns the names of the files it wrote,
    relative to the output."""
    plan, source, output = task.plan, task.source, task.output
    copied = [(path, str(path.relative_to(source.directory))) for path in side_files(source.directory).copied]
    for path, name in copied:
        write_safely(output / name, functools.partial(shutil.copyfile, path), path.stat().st_size)
    written = [name for _, name in copied]
    if recipe_text is not None:
        write_text(output / "recipe.yaml", recipe_text)
        written.append("recipe.yaml")
    planned = planned_files(plan, source.config)
    for name, content in planned.items():
        write_json(output / name, content)
    return [*written, *planned]
