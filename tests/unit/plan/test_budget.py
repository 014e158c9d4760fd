"""A size budget: what is chosen together, at which size, and the config groups of a choice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoint.dequantize import StoredFormat
from calibration.checkpoint.formats import Formats
from calibration.families.registry import open_source
from calibration.plan.budget import BudgetTask, _as_scheme
from calibration.plan.plan import Step
from calibration.plan.planner import make_plan
from calibration.plan.quantization_config import output_config
from calibration.plan.tiled import Heights
from recipes.errors import RecipeError
from recipes.loader import dump_recipe
from tests.exported import recipe
from tests.models import deepseek_v4, standard
from verify.structure.targets import read_quantization
from workflows.inspect_checkpoint import describe_plan

LINEAR = [r"re:^model\.layers\.\d+\..*(proj|w[123])$"]
ALL = ["NVFP4", "FP8_BLOCK", "bfloat16"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sources")
    made = {stored: deepseek_v4.write(base / stored, stored) for stored in ("bf16", "fp8_mxfp4")}
    return made | {name: standard.write(base / name, name) for name in ("qwen3_moe", "llama", "mixtral")}


def budgeted(
    source: Path, bits: float, targets: list[str] = LINEAR, candidates: list[str] = ALL, **sections: Any
) -> BudgetTask:
    asked = {"bits_per_parameter": bits, "candidates": candidates}
    return BudgetTask.of(
        recipe(source, Path("/nowhere/out"), targets, budget=asked, **sections), Formats(open_source(source))
    )


def test_what_vllm_serves_as_one_is_chosen_as_one(sources: dict[str, Path]) -> None:
    units = {unit.name: unit for unit in budgeted(sources["qwen3_moe"], 11).units}
    assert len(units) == 9
    assert len(units["model.layers.1.mlp.experts.*"].modules) == 8 * 3
    fused = units["model.layers.0.self_attn.q_proj+k_proj+v_proj"]
    assert [module.rpartition(".")[2] for module in fused.modules] == ["q_proj", "k_proj", "v_proj"]
    # 64 inputs are no whole group of 128, in which vLLM quantizes inputs to FP8.
    assert "FP8_BLOCK" not in fused.sizes and "FP8_BLOCK" in units["model.layers.0.self_attn.o_proj"].sizes
    dense = [unit.name.rpartition(".")[2] for unit in budgeted(sources["llama"], 11).units if unit.block == 0]
    assert sorted(dense) == ["down_proj", "gate_proj+up_proj", "o_proj", "q_proj+k_proj+v_proj"]


@pytest.mark.parametrize(
    ("shape", "asked", "possible"),
    [((192, 256), {}, True), ((192, 256), {"M": 192}, False), ((256, 256), {"M": 256}, True), ((256, 192), {}, False)],
    ids=["alone", "rows of tiles are torn", "whole tiles", "inputs in no whole groups"],
)
def test_fp8_is_a_candidate_only_where_vllm_takes_it(shape: tuple[int, int], asked: Heights, possible: bool) -> None:
    step = Step("a.weight", "quantize", (), "", "group")
    assert (_as_scheme("FP8_BLOCK", step, StoredFormat("plain", shape), asked) is not None) == possible


def test_any_choice_becomes_disjoint_groups_that_vllm_resolves_to_it_and_has_the_size_that_was_said(
    sources: dict[str, Path],
) -> None:
    rng = random.Random(3)
    for name in ("qwen3_moe", "llama", "mixtral"):
        task = budgeted(sources[name], 11)
        for _ in range(4):
            choice = {unit.name: rng.choice(list(unit.sizes)) for unit in task.units}
            made = task.task_of(choice)
            assert describe_plan(made.plan, made.source)["output_bytes"] == task.nbytes(choice)
            assert made.plan.bits_per_parameter == task.bits(task.nbytes(choice))
            config = read_quantization(output_config(made.plan, made.source.config))
            assert not config.problems
            schemes = {"nvfp4": "NVFP4", "fp8_block": "FP8_BLOCK", None: "bfloat16"}
            for unit in task.units:
                for module in unit.modules:
                    groups = [g for g in config.groups if g.targets.name(module, made.family.serving_names(module))]
                    assert len(groups) <= 1
                    assert schemes[groups[0].name if groups else None] == choice[unit.name], module


def test_the_choice_is_within_the_budget_and_takes_what_costs_most(sources: dict[str, Path]) -> None:
    for bits in (7.0, 9.0, 12.0, 15.0):
        task = budgeted(sources["qwen3_moe"], bits)
        errors = {u.name: {c: 0.0 if c == "bfloat16" else 1.0 + u.block for c in u.sizes} for u in task.units}
        choice, found = task.choose(errors)
        made = task.task_of(choice)
        assert made.plan.bits_per_parameter <= bits and made.plan.output_bytes <= task.limit
        assert found.error == pytest.approx(sum(errors[name][chosen] for name, chosen in choice.items()))
    assert choice["model.layers.2.mlp.experts.*"] == "bfloat16"


def test_the_recipe_of_a_choice_is_an_ordinary_recipe(sources: dict[str, Path]) -> None:
    task = budgeted(sources["qwen3_moe"], 11, preset="fast")
    made = task.recipe_of(task.smallest)
    assert "budget" not in dump_recipe(made)
    arguments = made.modifiers[-1].arguments
    assert arguments["weight_observer"] == "nvfp4_weighted"
    # All experts of all blocks: few expressions, not a list of names.
    assert len(arguments["config_groups"]["nvfp4"]["targets"]) == 7
    assert len(make_plan(task.formats.checkpoint, task.formats, made).quantized) == 84


def test_modules_that_are_no_choice_stay_as_the_recipe_says(sources: dict[str, Path]) -> None:
    source = sources["fp8_mxfp4"]
    targets = [r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$"]
    task = budgeted(source, 7.05, targets, ["NVFP4", "bfloat16"], export={"kept": "plain"})
    assert all("shared_experts" in unit.name for unit in task.units), "MXFP4 experts keep their values in NVFP4 alone"
    experts = {m for m, step in task.task_of(task.largest).plan.quantized.items() if ".experts." in m and step.group}
    assert len(experts) == 3 * 3 * 64


@pytest.mark.parametrize(
    ("bits", "candidates", "says"),
    [
        (
            5.0,
            ALL,
            "budget.bits_per_parameter: 5 is too small: the least that these targets and candidates give is 6.868 (3.283 of",
        ),
        (
            16.0,
            ALL,
            "budget.bits_per_parameter: 16 leaves nothing to choose: all modules as their largest candidate have 16.000",
        ),
        (6.0, ["NVFP4", "NVFP4A16"], "6 is too small"),
    ],
    ids=range(3),
)
def test_a_budget_that_cannot_be_kept_or_leaves_no_choice_is_refused_from_headers(
    sources: dict[str, Path], bits: float, candidates: list[str], says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        budgeted(sources["qwen3_moe"], bits, candidates=candidates)
    assert says in str(caught.value)


def test_a_mixture_that_a_dialect_cannot_say_is_refused_before_anything_is_measured(sources: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"budget\.candidates: export.dialect: nvidia: .*NVFP4 and NVFP4A16"):
        budgeted(sources["qwen3_moe"], 6.866, candidates=["NVFP4", "NVFP4A16"], export={"dialect": "nvidia"})


def test_a_plan_of_a_recipe_that_still_has_a_budget_is_refused(sources: dict[str, Path]) -> None:
    source = sources["llama"]
    made = recipe(source, Path("/nowhere/out"), LINEAR, budget={"bits_per_parameter": 9})
    with pytest.raises(RecipeError, match="budget: a run chooses for it"):
        make_plan(open_source(source), Formats(open_source(source)), made)
