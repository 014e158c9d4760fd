"""What each method costs on a real model: perplexity in vLLM of SmolLM2-135M-Instruct, before and after.

`python -m tests.benchmarks.perplexity --directory DIR [--windows 32] [--only GPTQ]`: windows of 512 tokens of the Python language
reference (`pydoc_data.topics`), which no calibration text holds; bfloat16, all linear layers but the head quantized.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from recipes.checks import Serving
from tests.integration.whole_runs import LINEAR, run, write_recipe
from tests.models import smollm2
from tests.reference.engine import VLLM_PYTHON
from verify.serving.serving import Experiment, verify_serving

WINDOW = 512
SAMPLES = {"dataset": "bundled", "num_samples": 64, "max_seq_length": 512, "batch_size": 4}


def quantized(scheme: str) -> list[dict[str, Any]]:
    return [{"QuantizationModifier": {"targets": LINEAR, "scheme": scheme}}]


METHODS: dict[str, dict[str, Any]] = {
    "convert, NVFP4A16": {"method": "convert", "modifiers": quantized("NVFP4A16")},
    "convert, NVFP4 (uncalibrated W4A4)": {"method": "convert", "modifiers": quantized("NVFP4")},
    "calibrate, NVFP4 (W4A4)": {"modifiers": quantized("NVFP4"), "calibration": SAMPLES},
    "calibrate, NVFP4 with GPTQ (W4A4)": {
        "modifiers": [{"GPTQModifier": {"targets": LINEAR, "scheme": "NVFP4"}}],
        "calibration": SAMPLES,
    },
}


def nll(checkpoint: Path, logs: Path, count: int) -> list[float]:
    """Mean negative log-likelihood of each of the first `count` windows, in nats."""
    serving = Serving(python=VLLM_PYTHON, max_tokens=1, windows=count, window_tokens=WINDOW, dtype="bfloat16")
    experiment = Experiment(prompts=[{"kind": "short", "text": "The"}])
    _, result = verify_serving(checkpoint, serving, logs, experiment=experiment)
    assert result["ok"], result["error"]
    return [window["nll"] for window in result["windows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--only", default="", help="part of a method's name; BF16 always runs")
    options = parser.parse_args()
    source = options.directory / "source"
    if not source.exists():
        smollm2.write(source)
    base = nll(source, options.directory / "logs", options.windows)
    mean = sum(base) / len(base)
    print(
        f"| method | perplexity | NLL above BF16, nats |\n|---|---|---|\n| BF16 source | {math.exp(mean):.2f} | |",
        flush=True,
    )
    for number, (name, sections) in enumerate(METHODS.items()):
        if options.only not in name:
            continue
        directory = options.directory / str(number)
        directory.mkdir(exist_ok=True)
        done = run(write_recipe(directory, source, LINEAR, **({"verify": {}} | sections)), "--overwrite")
        assert done.returncode == 0, done.stderr
        found = nll(directory / "output", directory / "logs", options.windows)
        delta = [a - b for a, b in zip(found, base, strict=True)]
        average = sum(delta) / len(delta)
        error = math.sqrt(sum((d - average) ** 2 for d in delta) / (len(delta) - 1) / len(delta))
        print(f"| {name} | {math.exp(sum(found) / len(found)):.2f} | {average:+.3f} +- {error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
