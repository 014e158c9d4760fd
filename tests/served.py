"""Asks the installed vLLM what its classes make of tiny checkpoints, and keeps the answers (calibration/families/served.json).

python -m tests.served --directory DIR [FAMILY ...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from calibration.families import derived, served
from calibration.families.family import NOT_LINEAR, ROUTED
from calibration.plan.quantization_config import output_config
from calibration.plan.task import Task
from recipes.checks import Serving
from recipes.errors import without_numbers
from tests.exported import recipe, task_of
from tests.models import any_family
from tests.reference.engine import FORKED_PYTHON
from verify.serving.wants import Wants, ask_server


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Families are derived as if no answer were kept: what one says is unquantized would be no target."""
    uncached = derived._derived.__wrapped__
    with mock.patch.object(derived, "rows", dict), mock.patch.object(derived, "_derived", uncached):
        yield


def planned(family: str, directory: Path) -> Task:
    """Every linear layer but the head of a tiny checkpoint in NVFP4."""
    source = directory / family
    if not source.is_dir():
        any_family.write(source, family)
    return task_of(recipe(source, directory / f"{family}-output", ["Linear"], ignore=["lm_head"]))


def ask(task: Task, logs: Path) -> Wants:
    """What vLLM's class makes of the planned tensors if its names play no part: every linear layer is a target that the
    plan does not leave out."""
    config = output_config(task.plan, task.source.config)
    quantization = config["quantization_config"]
    for group in quantization["config_groups"].values():
        group["targets"] = ["Linear"]
    kept = [step.module for step in task.plan.steps.values() if step.source.endswith(".weight") and not step.group]
    return ask_server(
        task,
        Serving(python=FORKED_PYTHON),
        logs,
        config=config | {"quantization_config": quantization | {"ignore": kept}},
    )


def row(task: Task, wants: Wants) -> dict[str, Any]:
    """The row of served.json that an answer makes."""
    family, packed = task.family, [o.name for step in task.plan.quantized.values() for o in step.outputs]
    fused = wants.fused(packed, lambda tensor: family.place(tensor).expert)
    parents, unquantized = set(), set()
    for module, step in task.plan.quantized.items():
        if (block := re.search(family.block, module)) and not all(wants.written.get(o.name) for o in step.outputs):
            unquantized.add(without_numbers(module[block.end() :]))
    # One layer under a name of its own, of which its class does not say what it is made of: no target names it.
    for module in {module for group in fused for module in group if task.family.place(module).part != ROUTED}:
        block, step = re.search(family.block, module), task.plan.quantized[module]
        layers = {layer.looked_up.rpartition(".")[2] for o in step.outputs for layer in wants.layers_of(o.name)}
        if block and not layers & {module.rpartition(".")[2], *wants.packed}:
            unquantized.add(without_numbers(module[block.end() :]))
    for tensor, output in task.plan.outputs.items():
        module, place = tensor.rpartition(".")[0], family.place(tensor)
        block = re.search(family.block, module)
        for layer in wants.layers_of(tensor) if block else []:
            assert block is not None
            if not layer.looked_up:
                if layer.kind == "linear" and len(output.shape) == 2 and place.part not in NOT_LINEAR:
                    unquantized.add(without_numbers(module[block.end() :]))
                continue
            if len(output.shape) != 2:  # a correction bias lies in the layer of the experts and names no parent
                continue
            inside = re.search(rf"\b{family.blocks}\.\d+\.", layer.looked_up)
            if inside is None:  # looked up outside the blocks: no target names it
                unquantized.add(without_numbers(module[block.end() :]))
                continue
            hub = (
                module[block.end() :].partition(".experts.")[0]
                if place.part == ROUTED
                else module[block.end() :].rpartition(".")[0]
            )
            named = layer.looked_up[inside.end() :].rpartition(".")[0]
            if hub and hub != named and not hub.startswith("experts."):  # nor have experts of the block itself (gemma4)
                parents.add((hub, named))
    return served.Served(
        vllm=wants.version,
        config=hashlib.sha256((task.source.directory / "config.json").read_bytes()).hexdigest(),
        architecture=wants.architecture,
        fused=tuple(sorted({tuple(sorted(module.rpartition(".")[2] for module in group)) for group in fused})),
        parents=tuple(sorted(parents)),
        unquantized=tuple(sorted(unquantized)),
    ).model_dump(mode="json")


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="of tests.models.any_family; all of them without")
    parser.add_argument("--directory", type=Path, required=True, help="where checkpoints and logs go")
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    for family in options.families or any_family.FAMILIES:
        with nothing_kept():
            task = planned(family, options.directory)
            wants = ask(task, options.directory / f"{family}-logs")
        kept = json.loads(served.FILE.read_text())
        if wants.unproven:
            print(f"{family}: {wants.described}", flush=True)
            kept.pop(family, None)
        else:
            kept[family] = row(task, wants)
            print(f"{family}: {json.dumps(kept[family])}", flush=True)
        served.FILE.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
