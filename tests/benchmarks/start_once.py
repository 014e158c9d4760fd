"""What a run does before its first forward pass, in a process of its own; prints CPU-seconds and memory as JSON.

python -m tests.benchmarks.start_once SOURCE RECIPE WORK
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from compressed_tensors.utils import patch_attr
from torch.utils.data import DataLoader

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.engine import walk as sequential
from calibration.engine.oneshot import calibrate
from calibration.engine.results import Callbacks
from calibration.model.skeleton import build_skeleton
from calibration.plan.task import Task
from recipes.loader import load_recipe
from workflows.inspect_checkpoint import describe_checkpoint, describe_plan


class _Reached(Exception):
    pass


def _stop(*_: Any) -> NoReturn:
    raise _Reached


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def start(source: Path, recipe_path: Path, work: Path) -> dict[str, float]:
    """CPU-seconds of `open` (headers and stored formats), `plan`, `digest`, `describe` (both tables of inspect),
    `skeleton` and `session` (modifiers, observers, tracing), and bytes: `peak_planned` after inspect's part,
    `base` before the first of all, `peak` in all."""
    took: dict[str, float] = {"base": _memory("VmRSS")}
    begun = time.process_time()

    def done(what: str) -> None:
        nonlocal begun
        took[what], begun = time.process_time() - begun, time.process_time()

    recipe = load_recipe(recipe_path, [f"source.checkpoint={source}", f"offload.directory={work}"])
    formats = Formats(Checkpoint.open(source))
    done("open")
    task = Task.of(recipe, formats)
    plan = task.plan
    done("plan")
    assert plan.digest
    done("digest")
    describe_checkpoint(formats.checkpoint, formats)
    describe_plan(plan, formats.checkpoint)
    done("describe")
    took["peak_planned"] = _memory("VmHWM")
    model = build_skeleton(formats, work, False)
    done("skeleton")
    batch = {"input_ids": torch.arange(2, 34).reshape(1, 32), "attention_mask": torch.ones(1, 32, dtype=torch.long)}
    batches = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    try:
        with patch_attr(sequential.Walk, "walk", _stop):
            calibrate(task, model, batches, Callbacks(lambda _: None, lambda _: None), work)
    except _Reached:
        done("session")
    took["linears"] = len(plan.quantized)
    took["parameters"] = plan.parameters
    took["peak"] = _memory("VmHWM")
    return took


if __name__ == "__main__":
    print(json.dumps(start(*map(Path, sys.argv[1:4]))))
