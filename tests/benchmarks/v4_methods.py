"""What each way to NVFP4 costs on a DeepSeek-V4 as it is released (FP8 + MXFP4): error, block cosine, KL, perplexity, time.

`python -m tests.benchmarks.v4_methods --directory DIR [--source CHECKPOINT --data FILE --text FILE]`: without --source the tiny
random V4 of the tests, whose perplexity says little; `python -m tests.models.trained_v4` makes a trained one with its texts.
KL and top-1 in the real vLLM on a CPU, against the source served as a plain BF16 copy, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.models import deepseek_v4

ROUTED = r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"
SHARED = r"re:^layers\.\d+\.ffn\.shared_experts\.w[123]$"
METHODS: dict[str, dict[str, Any]] = {
    "convert, lossless, constant input scale": {"method": "convert"},
    "calibrate, lossless": {},
    "calibrate, requantized": {"export": {"mxfp4": "requantize"}},
}
TARGETS = {"routed": [ROUTED], "routed + shared": [ROUTED, SHARED]}


def run(directory: Path, given: argparse.Namespace, targets: list[str], sections: dict[str, Any]) -> float:
    """Runs a recipe with every level of verification into `directory`; CPU-seconds of the stages up to the export."""
    directory.mkdir(parents=True, exist_ok=True)
    serving = {"max_tokens": 4, "windows": 8, "compare": True, "text": given.text}
    body = {
        "source": {"checkpoint": str(given.source)},
        "output": str(directory / "output"),
        "modifiers": [{"QuantizationModifier": {"targets": targets, "scheme": "NVFP4"}}],
        "calibration": {"dataset": given.data, "num_samples": 32, "max_seq_length": 256},
        "verify": {"structure": True, "fidelity": True, "serving": serving},
    }
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(body | sections))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "workflows.run", str(recipe), "--no-rehearsal", "--overwrite", "--stages"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    subprocess.run([*command, "inspect,calibrate,export"], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command[:-2], "--from", "verify"], capture_output=True, text=True, env=environment)
    assert done.returncode in (0, 5), done.stderr[-3000:]
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def row(name: str, directory: Path, seconds: float) -> str:
    """A line of the table from what the run left."""
    facts = directory / "output.run"
    fidelity, serving = (json.loads((facts / f"{file}.json").read_text()) for file in ("fidelity", "serving"))
    errors = [line[5] for line in fidelity["rows"] if line[1] == "routed expert"]
    worst, last = min(block["cosine"] for block in fidelity["blocks"]), fidelity["blocks"][-1]["cosine_propagated"]
    source = serving["source"]
    agreement = source["agreement"]
    return (
        f"| {name} | {max(errors):.4f} | {worst:.4f} | {last:.4f} | {agreement['kl']:.4f} | {100 * agreement['top1']:.1f} % | "
        f"{source['nll_difference']:+.4f} +- {source['nll_error']:.4f} | {serving['perplexity']:.1f} | {seconds:.0f} |"
    )


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="a DeepSeek-V4 stored in FP8 and MXFP4")
    parser.add_argument("--data", default="bundled", help="calibration data")
    parser.add_argument(
        "--text", default="bundled", help="text for KL, top-1 and perplexity, which --data does not hold"
    )
    options = parser.parse_args()
    options.source = options.source or options.directory / "source"
    if not options.source.exists():
        deepseek_v4.write(options.source, "fp8_mxfp4")
    print(
        "| method, what becomes NVFP4 | worst routed error | worst block cosine | propagated | KL | top-1 | NLL above the "
        "source, nats | perplexity | CPU-s |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for what, targets in TARGETS.items():
        for number, (method, sections) in enumerate(METHODS.items()):
            directory = options.directory / f"{number}-{len(targets)}"
            print(row(f"{method}; {what}", directory, run(directory, options, targets, sections)), flush=True)


if __name__ == "__main__":
    main()
