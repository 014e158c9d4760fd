"""Which heights FP8_BLOCK asks, in a plan and in a budget alike: also of weights that the hub stores merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoint.formats import Formats
from calibration.families.registry import open_source
from calibration.plan.budget import BudgetTask
from calibration.plan.tiled import stacked_heights, tiled_rows_problem
from recipes.errors import RecipeError
from tests.exported import plan_of, recipe
from tests.models import mamba, merged, standard, torn


@pytest.mark.parametrize("shape", torn.SHAPES)
def test_a_merged_weight_is_planned_in_tiles_only_if_none_of_its_parts_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    source, loaded = torn.write(tmp_path / "source", monkeypatch, shape), torn.SHAPES[shape][1]
    plan, _ = plan_of(source, recipe(source, tmp_path / "out", "Linear", "FP8_BLOCK", ignore=["lm_head"]))
    assert {module.rpartition(".")[2] for module in plan.quantized} == loaded
    asked: dict[str, Any] = {"bits_per_parameter": 11.0, "candidates": ["NVFP4", "FP8_BLOCK", "bfloat16"]}
    made = recipe(source, tmp_path / "out", "Linear", ignore=["lm_head"], budget=asked)
    units = BudgetTask.of(made, Formats(open_source(source))).units
    assert {u.name.rpartition(".")[2] for u in units if "FP8_BLOCK" in u.sizes} == loaded, (
        "a budget follows the same rule"
    )


def test_a_torn_part_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = torn.write(tmp_path / "source", monkeypatch, "k is torn")
    with pytest.raises(RecipeError) as caught:
        plan_of(source, recipe(source, tmp_path / "out", [r"re:.*qkv_proj$"], "FP8_BLOCK"))
    assert caught.value.problems == [
        "config_groups.experts: model.layers.0.self_attn.qkv_proj.weight: FP8_BLOCK needs M of k to be a multiple of 128, M of k "
        "is 192: vLLM stacks another weight below it; add the module to ignore (and 1 more like this)"
    ]


@pytest.mark.parametrize("family", merged.FAMILIES)
def test_a_merged_weight_of_other_families_is_planned_in_tiles_by_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    leaf, heights, _ = merged.MERGED[family]
    planned = {}
    for broken in (False, True):
        source = merged.write(tmp_path / f"source-{broken}", monkeypatch, family, broken)
        plan, formats = plan_of(source, recipe(source, tmp_path / "out", "Linear", "FP8_BLOCK", ignore=["lm_head"]))
        module = next(name for name in formats.checkpoint.tensors if name.endswith(f"{leaf}.weight"))[: -len(".weight")]
        planned[broken] = module in plan.quantized
        assert broken or plan.family.merged_rows(module, sum(heights.values())) == heights
    assert planned == {False: True, True: False}


@pytest.mark.parametrize("family", mamba.FAMILIES)
def test_a_projection_of_mamba2_is_planned_in_tiles_by_its_five_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The last part, a row for each head, may end anywhere."""
    planned = {}
    for states in (64, 96):
        source = mamba.write(tmp_path / f"source-{states}", monkeypatch, family, states)
        plan, formats = plan_of(source, recipe(source, tmp_path / "out", "Linear", "FP8_BLOCK", ignore=["lm_head"]))
        module = next(name for name in formats.checkpoint.tensors if name.endswith("in_proj.weight"))[: -len(".weight")]
        planned[states] = module in plan.quantized
    assert planned == {64: True, 96: False}
    heights = {"M of mamba z": 512, "M of mamba x": 512, "M of mamba B": 192, "M of mamba C": 192, "M of mamba dt": 8}
    assert plan.family.merged_rows(module, 2 * 512 + 2 * 192 + 8) == heights


def test_the_last_part_may_end_anywhere_but_not_that_of_an_expert(tmp_path: Path) -> None:
    for family, asked in (("llama", {"q_proj", "k_proj", "gate_proj"}), ("mixtral", {"q_proj", "k_proj", "w1", "w3"})):
        source = standard.write(tmp_path / family, family)
        plan, formats = plan_of(source, recipe(source, tmp_path / "out", "Linear", ignore=["lm_head"]))
        shapes = {module: formats.of(step.source).shape for module, step in plan.quantized.items()}
        heights = stacked_heights(plan.family, shapes, plan.fused)
        assert {module.rpartition(".")[2] for module in heights} == asked
        assert all(dict(parts) == {"M": shapes[module][0]} for module, parts in heights.items())
    assert tiled_rows_problem({"M": 256}) is None and tiled_rows_problem({}) is None
