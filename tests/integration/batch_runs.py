"""Batches of tiny recipes in real processes, and single runs of the same recipes to compare their outputs with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from calibration.runs.journal import RunDirectory
from tests.integration.interrupted_runs import _CONTEXT, finish
from tests.models import deepseek_v4, standard
from tests.outputs import contents

QWEN = [r"re:^model\.layers\.\d+\..*(proj|w[123])$"]
V4 = [r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$"]


def write_sources(root: Path) -> dict[str, Path]:
    """The tiny sources of the batches, by name."""
    return {
        "qwen": standard.write(root / "qwen", "qwen3_moe"),
        "v4": deepseek_v4.write(root / "v4", "fp8_mxfp4"),
    }


def write_recipe(folder: Path, name: str, source: Path, targets: list[str], **sections: Any) -> Path:
    """`folder/name.yaml` with the output `folder/name/output`: a model card holds the last part alone."""
    body = {
        "source": {"checkpoint": str(source)},
        "output": str(folder / name / "output"),
        "modifiers": [{"QuantizationModifier": {"targets": targets, "scheme": "NVFP4"}}],
        "calibration": {"dataset": "bundled", "num_samples": 6, "max_seq_length": 64, "batch_size": 2},
        "verify": {"fidelity": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(body | sections))
    return path


def converted(scheme: str = "NVFP4A16") -> dict[str, Any]:
    """Sections of a recipe that needs no model: seconds instead of tens of them."""
    return {"method": "convert", "calibration": None, "export": {"max_shard_size": "70000"}}


def single_run(recipe: Path, folder: Path) -> dict[str, bytes]:
    """What one uninterrupted run of the recipe writes, into a folder of its own."""
    body = yaml.safe_load(recipe.read_text())
    body["output"] = str(folder / recipe.stem / "output")
    folder.mkdir(exist_ok=True)
    alone = folder / recipe.name
    alone.write_text(yaml.safe_dump(body))
    code, text = finish([str(alone)], folder / "log")
    assert code == 0, text
    return files(folder, recipe.stem)


def files(folder: Path, name: str) -> dict[str, bytes]:
    """Everything in an output, but for the path of `folder` and the times of its run."""
    return contents(folder / name / "output", folder)


def start_batch(arguments: list[str], log: Path, launcher: Sequence[str] = ()) -> BaseProcess:
    """`python -m workflows.batch ARGUMENTS` by fork from a process that has imported everything; its runs are processes of
    their own all the same. `launcher`: what stands before `-m workflows.run` in their commands."""
    process = _CONTEXT.Process(target=_main, args=(arguments, log, launcher))  # type: ignore[attr-defined]
    process.start()
    return process  # type: ignore[no-any-return]


def finish_batch(arguments: list[str], log: Path, seconds: float = 300) -> tuple[int, str]:
    """Runs a batch to its end; its exit code and what it printed."""
    begin = log.stat().st_size if log.exists() else 0
    process = start_batch(arguments, log)
    process.join(seconds)
    code, text = process.exitcode, log.read_bytes()[begin:].decode()
    if code is None:
        process.kill()
    assert code is not None, f"still running after {seconds} s: {text}"
    return code, text


def facts(batch: Path, name: str, kind: str) -> list[dict[str, Any]]:
    """The attempts' lines of one kind."""
    path = batch / "runs" / name / "attempts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [fact for fact in map(json.loads, lines) if fact["fact"] == kind]


def journal(folder: Path, name: str, kind: str = "shards") -> list[dict[str, Any]]:
    """The lines of one kind in the journal of a run."""
    return RunDirectory(folder / name / "output").facts(kind)


def summary(batch: Path) -> dict[str, dict[str, Any]]:
    """Run -> its row in summary.json."""
    return {row["name"]: row for row in json.loads((batch / "summary.json").read_text())["runs"]}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return found


def run_batch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m workflows.batch ARGUMENTS` as a user calls it."""
    command = [sys.executable, "-m", "workflows.batch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _main(arguments: list[str], log: Path, launcher: Sequence[str]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from workflows.batch import queue
    from workflows.batch.__main__ import main

    torchrun = queue.torchrun
    queue.torchrun = lambda gpus: [*torchrun(gpus), *launcher]
    sys.exit(main(arguments))
