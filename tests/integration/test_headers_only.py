"""A source of V4-Pro's shapes without its bytes: planning and building the empty model stay within bounds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.convert.layout import ShardLayout
from calibration.model.skeleton import build_skeleton
from calibration.plan.planner import make_plan
from recipes.loader import load_recipe
from tests.exported import recipe, task_of
from tests.models.headers_only import MODELS, ProSizes, stored_tensors, takes_holes, write, write_kimi_k2

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/deepseek_v4/pro-nvfp4-experts.yaml"
V41_RECIPE = ROOT / "recipes/deepseek_v41/flash-nvfp4-convert.yaml"


@pytest.fixture
def hollow(tmp_path: Path) -> Path:
    """A directory whose file system keeps holes."""
    if not takes_holes(tmp_path):
        pytest.skip("the file system of the temporary directory has no sparse files")
    return tmp_path


#: Tensors and bytes by the index of each repository, parameters as the hub counts them (FP4 as values, scales not). Flash-0731:
#: vllm-project/vllm pull request 41834. V4.1-Flash: revision dba1be0, EfficientMoE/MoE-Infinity pull request 210. None: not
#: published where this project could look.
PUBLISHED = {
    "pro": (None, None, 1_598_839_674_782),
    "pro-0813": (None, None, 1_650_497_936_906),
    "flash": (69_187, None, None),
    "flash-0731": (72_317, 166_878_536_440, None),
    "v4.1-flash": (96_085, 510_286_023_000, 763_205_315_794),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_hollow_source_is_as_large_as_the_published_one(model: str) -> None:
    stored = list(stored_tensors(MODELS[model]))
    values = [math.prod(entry.shape) * (2 if entry.dtype == torch.int8 else 1) for entry in stored]
    scales = [entry.dtype == torch.float8_e8m0fnu for entry in stored]
    parameters = sum(count for count, scale in zip(values, scales, strict=True) if not scale)
    found = (len(stored), sum(entry.nbytes for entry in stored), parameters)
    published = PUBLISHED[model]
    assert [have for have, want in zip(found, published, strict=True) if want is not None] == [
        want for want in published if want is not None
    ]


def test_the_draft_blocks_of_a_hollow_source_are_those_of_the_published_index() -> None:
    draft = [e.name.split(".")[1] for e in stored_tensors(MODELS["flash-0731"]) if e.name.startswith("mtp.")]
    assert Counter(draft) == {"0": 1568, "1": 1565, "2": 1572}


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
        model = build_skeleton(Formats(checkpoint), hollow / "run", False).model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert 0 < allocations.largest < 10e6


def test_a_derived_family_of_kimi_k2_s_size_is_planned(hollow: Path) -> None:
    """A trillion parameters have 61 blocks; measured on all of them (docs/families.md)."""
    source = write_kimi_k2(hollow / "k2", blocks=4, shards=4)
    targets = [r"re:^model\.layers\.\d+\.mlp\.experts\.\d+\."]
    task = task_of(recipe(source, hollow / "out", targets))
    assert len(task.plan.quantized) == 3 * 384 * 3  # the first block is dense
    assert task.family.derived and not task.plan.family.never_quantized


def test_an_engram_table_of_v41_is_copied_in_pieces(hollow: Path) -> None:
    """It takes 98 GB; the recipe that ships plans the three first blocks of V4.1-Flash, the table among them."""
    sizes = replace(MODELS["v4.1-flash"], layers=3)
    checkpoint = Checkpoint.open(write(hollow / "v41", sizes, shards=4))
    formats = Formats(checkpoint)
    plan = make_plan(checkpoint, formats, load_recipe(V41_RECIPE, []))
    assert len(plan.quantized) == 3 * 384 * 3
    table = "layers.1.engram.embed.weight"
    assert (plan.steps[table].action, formats.of(table).tile) == ("copy", (1, 32))
    shard = next(shard for shard in plan.shards if table in shard.sources)
    jobs = list(ShardLayout(plan, formats, shard).jobs())
    assert sum(job.output_bytes for job in jobs) > 98e9 and max(job.output_bytes for job in jobs) < 128e6


@pytest.mark.slow
def test_v41_in_nvidia_s_dialect_is_as_large_as_nvidia_s_own(hollow: Path) -> None:
    """nvidia/DeepSeek-V4.1-Flash-NVFP4 (revision 3431dde): 188,245 tensors, 527.27 GB by the headers of its shards."""
    source = write(hollow / "v41", MODELS["v4.1-flash"])
    checkpoint = Checkpoint.open(source)
    ours = [f"source.checkpoint={source}", f"output={hollow / 'out'}", "export.dialect=nvidia", "export.kept=native"]
    plan = make_plan(checkpoint, Formats(checkpoint), load_recipe(V41_RECIPE, ours))
    assert len(plan.outputs) == 188_245
    assert round(plan.output_bytes / 1e9, 2) == 527.27


def test_v4_pro_starts_in_half_a_minute_and_two_gigabytes(hollow: Path) -> None:
    """CPU-seconds, twice those of docs/cost-model.md."""
    source = write(hollow / "pro", ProSizes())
    command = [sys.executable, "-m", "tests.benchmarks.start_once", str(source), str(RECIPE), str(hollow / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    took = json.loads(done.stdout.splitlines()[-1])
    assert took["linears"] == 61 * 384 * 3
    assert took["parameters"] > 1.57e12
    planned = sum(took[part] for part in ("open", "plan", "digest", "describe"))
    assert planned < 15, took
    assert planned + took["skeleton"] + took["session"] < 32, took
    assert took["peak"] < 2e9, took
