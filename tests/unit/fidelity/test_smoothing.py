"""Fidelity of a smoothed output: factors are found in it, and each must be taken in by all that read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.plan.smoothing import possible_sites
from calibration.plan.task import Task
from tests.models import standard
from tests.smoothed import export_smoothed
from verify.checks import Check
from verify.fidelity.fidelity import verify_fidelity
from verify.fidelity.rescaled import compensated
from verify.fidelity.smoothing import SmoothedWeights

SMOOTH = [
    {"SmoothQuantModifier": {}},
    {"QuantizationModifier": {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "NVFP4"}},
]
NORM, ROUTER = "model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    base = tmp_path_factory.mktemp("smoothed")
    return export_smoothed(standard.write(base / "source", "qwen3_moe"), base / "output", SMOOTH)


def checks(task: Task, output: Path, known: bool = True) -> dict[str, Check]:
    found = verify_fidelity(output, task.plan if known else None, Formats(Checkpoint.open(task.source.directory)))
    return {check.id.removeprefix("fidelity."): check for check in found}


def test_a_smoothed_output_passes_and_each_code_is_the_nearest_to_the_scaled_weight(
    smoothed: tuple[Task, Path],
) -> None:
    found = checks(*smoothed)
    assert {name: c.figure for name, c in found.items() if c.verdict != "PASS"} == {}
    assert found["smoothing"].figure == f"{len(smoothed[0].plan.smoothed)} layers and their readers"
    assert "all codes" in found["rounding"].figure
    assert found["kept"].figure.endswith(" tensors equal, 9 of them up to smoothing's factors")  # 6 norms, 3 routers


@pytest.mark.parametrize(
    ("tensor", "factor", "failing"),
    [
        (NORM, 2.0, {"smoothing", "kept"}),
        (NORM, 1.25, {"smoothing", "kept"}),
        (ROUTER, 2.0, {"kept"}),
        ("model.layers.1.input_layernorm.weight", 0.5, {"smoothing"}),
    ],
)
def test_a_norm_that_is_not_the_inverse_of_what_its_readers_took_in_fails(
    smoothed: tuple[Task, Path], tmp_path: Path, tensor: str, factor: float, failing: set[str]
) -> None:
    task, output = smoothed
    broken = Path(shutil.copytree(output, tmp_path / "broken"))
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if tensor in tensors:
            tensors[tensor][..., 1::2] *= factor
            save_file(tensors, path)
    found = checks(task, broken)
    assert failing <= {name for name, check in found.items() if check.verdict == "FAIL"}


def test_a_norm_that_was_copied_although_its_readers_took_factors_in_fails(
    smoothed: tuple[Task, Path], tmp_path: Path
) -> None:
    task, output = smoothed
    broken = Path(shutil.copytree(output, tmp_path / "broken"))
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if NORM in tensors:
            tensors[NORM] = task.formats.read(NORM)
            save_file(tensors, path)
    found = checks(task, broken)
    assert {"smoothing", "kept"} <= {name for name, check in found.items() if check.verdict == "FAIL"}
    assert ROUTER in found["kept"].figure


def test_without_a_plan_a_router_with_the_inverse_of_its_norms_factors_is_a_doubt_and_no_failure(
    smoothed: tuple[Task, Path],
) -> None:
    found = checks(*smoothed, known=False)
    assert {name: c.verdict for name, c in found.items() if c.verdict != "PASS"} == {"rescaled": "WARN"}
    assert "6 norms changed and 3 unquantized weights by the inverse, in 3 blocks" in found["rescaled"].figure


@pytest.mark.parametrize(("tensor", "factor"), [(ROUTER, 2.0), (ROUTER, 1.25), (NORM, 2.0), (NORM, 1.25)])
def test_without_a_plan_a_router_with_other_factors_than_its_norm_fails(
    smoothed: tuple[Task, Path], tmp_path: Path, tensor: str, factor: float
) -> None:
    broken = Path(shutil.copytree(smoothed[1], tmp_path / "broken"))
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if tensor in tensors:
            tensors[tensor][..., 7] *= factor
            save_file(tensors, path)
    kept = checks(smoothed[0], broken, known=False)["kept"]
    assert kept.verdict == "FAIL" and ROUTER in kept.figure


@pytest.mark.parametrize(("wrong", "explained"), [(1.0, {ROUTER}), (1.05, set())])
def test_factors_that_are_no_powers_of_two_are_inverse_up_to_the_rounding_of_both(
    smoothed: tuple[Task, Path], tmp_path: Path, wrong: float, explained: set[str]
) -> None:
    source = smoothed[0].source.directory
    foreign = Path(shutil.copytree(source, tmp_path / "foreign"))
    factors = 2 ** torch.randn(smoothed[0].formats.of(NORM).shape[0], generator=torch.Generator().manual_seed(0))
    for path in foreign.glob("*.safetensors"):
        tensors = load_file(path)
        for name in {NORM, ROUTER} & tensors.keys():
            scaled = tensors[name].float() * (1 / factors if name == NORM else factors)
            tensors[name] = scaled.to(tensors[name].dtype)
        if ROUTER in tensors:
            tensors[ROUTER][0, 7] *= wrong
        save_file(tensors, path)
    formats = [Formats(Checkpoint.open(directory)) for directory in (foreign, source)]
    assert compensated(*formats, smoothed[0].family, [NORM, ROUTER]) == explained


def test_without_a_plan_the_factors_are_found_by_the_models_structure(smoothed: tuple[Task, Path]) -> None:
    task, output = smoothed
    sites, formats = possible_sites(task.formats, task.family), Formats(Checkpoint.open(output))
    assert set(task.plan.smoothed) <= set(sites)
    found, known = (SmoothedWeights(some, formats, task.formats) for some in (sites, task.plan.smoothed))
    assert found.changes_norms() and not SmoothedWeights(sites, task.formats, task.formats).changes_norms()
    readers = {reader for site in task.plan.smoothed for reader in site.readers}
    for one, other in ((found.expected(name), known.expected(name)) for name in readers):
        assert torch.equal(one.row_factors, other.row_factors) and torch.equal(one.column_factors, other.column_factors)
    assert bool((found.expected(ROUTER.removesuffix(".weight")).column_factors != 1).any())
