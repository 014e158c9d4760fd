"""Conversions of tiny checkpoints and what came of them, for tests of methods convert and plain."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.index import Checkpoint
from calibration.convert.pipeline import Conversion, convert
from calibration.runs.finish import finish_output
from calibration.runs.journal import RunDirectory
from recipes.loader import dump_recipe
from recipes.schema import Recipe
from tests.exported import EXPERTS, plan_of, recipe, task_of
from verify.fidelity.fidelity import verify_fidelity
from verify.known import Known
from verify.structure.structure import verify_structure

LINEAR = [r"re:^model\.layers\.\d+\..*(proj|w[123])$"]


def converting(source: Path, output: Path, targets: Any = EXPERTS, scheme: str = "NVFP4", **sections: Any) -> Recipe:
    return recipe(source, output, targets, scheme, method="convert", calibration=None, **sections)


def undoing(source: Path, output: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {"source": {"checkpoint": str(source)}, "output": str(output), "method": "plain"} | sections
    )


def run(made: Recipe, on_progress: Any = None) -> Conversion:
    """The conversion and the export stage behind it."""
    task = task_of(made)
    directory = RunDirectory(task.output).open()
    try:
        done = convert(task, directory, on_progress)
    finally:
        directory.close()
    finish_output(task, dump_recipe(made))
    return done


def digests(output: str | Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(output).glob("*.safetensors"))}


def tensors(output: str | Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for shard in sorted(Path(output).glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }


def failing(made: Recipe) -> set[str]:
    plan, formats = plan_of(Path(made.source.checkpoint), made)
    checks = verify_structure(Path(made.output), Known(plan, formats))
    checks += verify_fidelity(Path(made.output), plan, formats)
    return {check.id for check in checks if check.verdict == "FAIL"}


def edited(source: Path, copy: Path, name: str, edit: Any) -> Path:
    """A copy of `source` in which `edit(tensor)` changed tensor `name` in place."""
    copy.mkdir()
    for path in source.iterdir():
        if path.is_file():
            os.link(path, copy / path.name)
    shard = copy / Checkpoint.open(source).tensors[name].shard
    changed = load_file(shard)
    edit(changed[name])
    shard.unlink()
    save_file(changed, shard, metadata={"format": "pt"})
    return copy
