"""A recipe with serving, and the whole run of it as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests import forced
from tests.integration.interrupted_runs import run_command
from tests.reference.engine import FORKED_PYTHON, claims_too_much

ROOT = Path(__file__).parents[2]
LINEAR = [r"re:^model\.layers\.\d+\..*(proj|w[123])$"]
SERVING: dict[str, Any] = {
    "python": FORKED_PYTHON, "max_tokens": 8, "prompts": ["Once upon a time"], "text": None, "compare": False,
}  # fmt: skip
if claims_too_much():  # in BF16 vLLM would run what this processor lacks, and end by SIGILL
    SERVING["dtype"] = "float32"


def write_recipe(directory: Path, source: Path, targets: list[str], **sections: Any) -> Path:
    """A recipe file whose output is `<directory>/output`, small enough for a test, serving included."""
    body: dict[str, Any] = {
        "source": {"checkpoint": str(source)},
        "output": str(directory / "output"),
        "modifiers": [{"QuantizationModifier": {"targets": targets, "scheme": "NVFP4"}}],
        "calibration": {"dataset": "bundled", "num_samples": 8, "max_seq_length": 128, "batch_size": 4},
        "verify": {"serving": SERVING},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(body | sections))
    return path


def run(recipe: Path, *arguments: str, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """`python -m workflows.run RECIPE ...` as a user runs it; `fresh` in an interpreter of its own."""
    if not fresh:
        return run_command("workflows.run", [str(recipe), *arguments])
    command = [sys.executable, *forced.command("workflows.run"), str(recipe), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
