"""A source of V4-Pro's shapes without its bytes: planning and building the empty model stay within bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.plan import make_plan
from calibration.source_model import build_skeleton
from recipes.loader import load_recipe
from tests.models.headers_only import ProSizes, takes_holes, write

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/deepseek_v4/pro-nvfp4-experts.yaml"


@pytest.fixture
def hollow(tmp_path: Path) -> Path:
    """A directory whose file system keeps holes."""
    if not takes_holes(tmp_path):
        pytest.skip("the file system of the temporary directory has no sparse files")
    return tmp_path


class _Allocations(TorchDispatchMode):
    """The largest tensor in memory that any operation inside gave, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.largest = max(self.largest, result.nbytes)
        return result


def test_empty_model_of_real_shapes_allocates_nothing_large(hollow: Path) -> None:
    """One block's experts are a parameter of 34 GB in transformers' constructor."""
    sizes = ProSizes(layers=1, hash_layers=1)
    checkpoint = Checkpoint.open(write(hollow / "pro", sizes, shards=2))
    plan = make_plan(checkpoint, Formats(checkpoint), load_recipe(RECIPE, []))
    assert len(plan.quantized) == sizes.layers * sizes.experts * 3
    with _Allocations() as allocations:
        model = build_skeleton(checkpoint, hollow / "run", False).model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert 0 < allocations.largest < 10e6


@pytest.mark.slow
def test_v4_pro_plans_in_a_minute_and_initialises_in_two_gigabytes(hollow: Path) -> None:
    source = write(hollow / "pro", ProSizes())
    command = [sys.executable, "-m", "tests.benchmarks.start_once", str(source), str(RECIPE), str(hollow / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    took = json.loads(done.stdout.splitlines()[-1])
    assert took["linears"] == 61 * 384 * 3
    assert took["parameters"] > 1.57e12
    assert sum(took[part] for part in ("open", "plan", "digest", "describe")) < 60
    assert took["peak"] < 2e9, took
