"""Prediction against fact: what `--dry-run` and the rehearsal say of a run, and what the run took.

    python -m tests.benchmarks.estimate_benchmark [--directory DIR] [--cases v4-bf16 v4-fp8 v4-fp8_mxfp4 qwen3_moe llama convert]
    python -m tests.benchmarks.estimate_benchmark --cases budget-smollm2 budget-qwen3_moe

One thread, every command in a process of its own, the source dropped from the page cache before each. Prints a row per
case: processor seconds, seconds of the clock, bytes written, peak memory of the stage calibrate, or of the stage `budget` alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from tests.benchmarks.convert_benchmark import forget
from tests.benchmarks.engine_benchmark import FLAT, TARGETS
from tests.models import deepseek_v4, smollm2, standard

CASES = ("v4-bf16", "v4-fp8", "v4-fp8_mxfp4", "qwen3_moe", "llama", "convert")
MEASURED = ("budget-smollm2", "budget-qwen3_moe")
MOE = {"moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 8}
#: Samples, tokens each, batch size.
DATA = {"qwen3_moe": (12, 512, 2), "llama": (16, 512, 2)}


def write_source(directory: Path, case: str) -> Path:
    """A model of 55 MB (V4), 27 MB (Qwen3-MoE) or 13 MB (Llama) a block in BF16."""
    if case.startswith(("v4", "convert")):
        stored: Any = "fp8_mxfp4" if case == "convert" else case.removeprefix("v4-")
        return deepseek_v4.write(directory, stored, **(FLAT["small"] | {"layers": 3}))
    if case == "smollm2":
        return smollm2.write(directory)
    form = standard.FORMS[case]
    larger: dict[str, Any] = {"blocks": 4, "hidden": 768, "intermediate": 2048}
    if case == "qwen3_moe":
        larger = {"blocks": 4, "hidden": 512, "experts": 32, "moe_intermediate": 256, "extra": MOE}
    extra = tuple((dict(form.extra) | larger.pop("extra", {})).items())
    with patch.dict(standard.FORMS, {case: dataclasses.replace(form, extra=extra, **larger)}):
        return standard.write(directory, case)


def write_recipe(base: Path, case: str) -> Path:
    """A recipe with one thread for the methods that have threads of their own."""
    source, measures = base / "source", case.startswith("budget-")
    case = case.removeprefix("budget-")
    if not source.exists():
        write_source(source, case)
    samples, tokens, batch = DATA.get(case, (8, 512, 1))
    kind = "v4" if case.startswith(("v4", "convert")) else case
    target = TARGETS.get(kind, r"re:^model\.layers\.\d+\..*proj$")
    scheme = "NVFP4A16" if case == "convert" else "NVFP4"
    body: dict[str, Any] = {
        "source": {"checkpoint": str(source)},
        "output": str(base / "output"),
        "modifiers": [{"QuantizationModifier": {"targets": [target], "scheme": scheme}}],
        "verify": {"structure": True, "fidelity": False},
    }
    if case == "convert":
        body |= {"method": "convert", "convert": {"workers": 1}}
    else:
        body["calibration"] = {
            "dataset": "bundled",
            "num_samples": samples,
            "max_seq_length": tokens,
            "batch_size": batch,
        }
    if measures:
        body["budget"] = {"bits_per_parameter": 10.0}
    path = base / "recipe.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def run(recipe: Path, *options: str) -> str:
    """stdout of `python -m workflows.run`."""
    forget(recipe.parent / "source")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "workflows.run", str(recipe), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{recipe}: {done.stderr[-3000:]}")
    return done.stdout


def row(case: str, dry: dict[str, Any], both: dict[str, Any]) -> str:
    """One line of the table in docs/cost-model.md: dry run / rehearsal / fact."""
    rehearsed, fact = both["predicted"], both["fact"]

    def three(key: str, unit: float, digits: int) -> str:
        return " / ".join(f"{(told[key] or 0) / unit:,.{digits}f}" for told in (dry, rehearsed, fact))

    return (
        f"| {case} | {three('cpu_seconds', 1, 2)} | {three('seconds', 1, 1)} | {three('bytes_written', 1e6, 1)} | "
        f"{three('peak_memory', 1e6, 0)} |"
    )


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("estimate-benchmark"))
    parser.add_argument("--cases", nargs="*", choices=(*CASES, *MEASURED), default=CASES)
    given = parser.parse_args()
    for case in given.cases:
        base = given.directory / case
        base.mkdir(parents=True, exist_ok=True)
        recipe = write_recipe(base, case)
        stage = "budget" if case in MEASURED else "calibrate"
        dry = json.loads(run(recipe, "--dry-run", "--json"))["estimate"]["stages"][stage]
        run(recipe, *(["--stages", "inspect"] if case in MEASURED else ["--overwrite", "--restart"]))
        both = json.loads((base / "output.run" / "estimate.json").read_text())["stages"][stage]
        print(row(case, dry, both), flush=True)


if __name__ == "__main__":
    main()
