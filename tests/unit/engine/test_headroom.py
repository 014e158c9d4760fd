"""calibration.input_headroom: wider input scales, and nothing else in the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from calibration.checkpoint.files import file_digest
from calibration.families.registry import family_of
from calibration.runs.fingerprint import fingerprint
from recipes.checks import Fidelity
from recipes.errors import RecipeError
from recipes.loader import load_recipe
from tests.exported import EXPERTS, calibrated, export, recipe, task_of
from tests.models import deepseek_v4
from verify.fidelity.forward import InputSeen
from verify.fidelity.input_scales import input_scale_check, saturation_check
from workflows.inspect_checkpoint import describe_plan
from workflows.run.card import model_card


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(deepseek_v4.write(tmp_path_factory.mktemp("headroom") / "source", "fp8_mxfp4"))


def with_headroom(source: Path, output: Path, factor: float) -> Path:
    data = {"dataset": "bundled", "input_headroom": factor}
    export(source, output, recipe(source, output, calibration=data))
    return output


def shards(output: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in output.glob("*.safetensors")}


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in output.glob("*.safetensors") for name, value in load_file(path).items()}


def test_a_headroom_of_one_leaves_every_byte_and_two_halves_input_scales_alone(source: Path, tmp_path: Path) -> None:
    plan, formats = export(source, tmp_path / "left-out")
    assert shards(with_headroom(source, tmp_path / "one", 1.0)) == shards(tmp_path / "left-out")
    one, two = tensors(tmp_path / "one"), tensors(with_headroom(source, tmp_path / "two", 2.0))
    wider = [name for name in one if not torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8))]
    assert len(wider) == len(plan.quantized) and all(name.endswith(".input_global_scale") for name in wider)
    assert all(torch.equal(one[name] / 2, two[name]) for name in wider)
    seen = {name: module.input_global_scale for name, module in calibrated(plan, formats, 1).items()}
    w2 = [value for name, value in seen.items() if ".experts." in name and name.endswith(".w2")]
    assert torch.equal(one["layers.1.ffn.experts.5.w2.input_global_scale"], torch.stack(w2).amin(0))


def test_the_plan_the_card_and_the_fingerprint_name_it(source: Path, tmp_path: Path) -> None:
    tasks = {
        factor: task_of(recipe(source, tmp_path, calibration={"dataset": "bundled", "input_headroom": factor}))
        for factor in (1.0, 1.5)
    }
    before = task_of(recipe(source, tmp_path))
    assert before.plan.digest == tasks[1.0].plan.digest != tasks[1.5].plan.digest
    key = "recipe calibration.input_headroom"
    now = {factor: fingerprint(task, "data", "cpu").get(key) for factor, task in tasks.items()}
    assert now == {1.0: None, 1.5: 1.5}, "runs that were begun before there was a headroom go on"
    assert describe_plan(tasks[1.5].plan, tasks[1.5].source)["input_headroom"] == 1.5
    assert "1.5 times the largest calibrated input" in model_card(tasks[1.5], [], {})
    weights_only = task_of(recipe(source, tmp_path, EXPERTS, "NVFP4A16"))
    assert weights_only.plan.input_headroom is None and "calibrated input" not in model_card(weights_only, [], {})


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"scheme": "NVFP4A16"}, "NVFP4A16 has none"),
        ({"scheme": "FP8_BLOCK"}, "FP8_BLOCK has none"),
        ({"method": "convert"}, "convert.input_amax"),
        ({"headroom": 0.5}, "at least 1"),
        ({"headroom": 17}, "at most 16"),
        ({"headroom": float("nan")}, "input_headroom"),
    ],
)
def test_a_headroom_that_nothing_can_take_is_refused_by_its_key(
    tmp_path: Path, sections: dict[str, Any], word: str
) -> None:
    scheme, factor = sections.get("scheme", "NVFP4"), sections.get("headroom", 2.0)
    body = {
        "source": {"checkpoint": "/models/x"},
        "output": str(tmp_path / "out"),
        "method": sections.get("method", "calibrate"),
        "modifiers": [{"QuantizationModifier": {"targets": ["re:.*"], "scheme": scheme}}],
        "calibration": {"dataset": "bundled", "input_headroom": factor},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body))
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert all("input_headroom" in problem for problem in refused.value.problems)
    assert word in refused.value.problems[0]


def test_one_group_with_input_scales_is_enough(tmp_path: Path) -> None:
    groups = {"a": {"targets": ["re:a"], "scheme": "NVFP4A16"}, "b": {"targets": ["re:b"], "scheme": "NVFP4"}}
    made = recipe(tmp_path / "x", tmp_path / "y", calibration={"dataset": "bundled", "input_headroom": 4},
                  modifiers=[{"QuantizationModifier": {"config_groups": groups}}])  # fmt: skip
    assert made.calibration is not None and json.loads(made.model_dump_json())["calibration"]["input_headroom"] == 4


def test_a_headroom_is_no_fault_of_the_input_scales() -> None:
    family = family_of({"model_type": "llama"})
    leaves = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")

    def judged(admitted: float, headroom: float) -> str:
        seen = [
            InputSeen(f"model.layers.0.{leaf}", admitted * (1 + place / 10), 1.0 + place / 10, 4)
            for place, leaf in enumerate(leaves)
        ]
        (found,) = input_scale_check(seen, family, Fidelity(max_input_headroom=20), "", headroom)
        return found.verdict

    assert judged(8.0, 1.0) == "WARN" and judged(8.0, 8.0) == "PASS"
    assert judged(30.0, 1.0) == "FAIL" and judged(30.0, 16.0) == "PASS"
    assert judged(0.4, 1.0) == judged(0.4, 16.0) == "FAIL", "a headroom excuses no input that saturates"


def test_unseen_values_beyond_the_extreme_are_counted_by_scale_and_many_of_them_warn() -> None:
    family = family_of({"model_type": "mixtral"})
    prefix = "model.layers.0.block_sparse_moe.experts"
    # 2688 / scale misses the calibrated extreme by a float32 rounding; the extreme itself does not saturate.
    admitted = 2688 / float(torch.tensor(2688.0) / torch.tensor(1.1015625))
    shared = [InputSeen(f"{prefix}.{expert}.w2", admitted) for expert in range(3)]
    x = torch.full((50, 100), 1.1015625, dtype=torch.bfloat16)
    for seen in shared[:2]:
        seen(torch.nn.Linear(1, 1), (x,))
    (found,) = saturation_check(shared, family)
    assert found.verdict == "PASS" and found.figure == "0.0e+00 of 10,000 values, under 0 of 1 scales"
    x[0, :4] = -4.40625
    shared[0](torch.nn.Linear(1, 1), (x,))
    (found,) = saturation_check(shared, family)
    assert found.verdict == "PASS" and f"{prefix}.0.w2: 2.7e-04" in found.figure and "4 times" in found.figure
    shared[1](torch.nn.Linear(1, 1), (x * 2,))
    (found,) = saturation_check(shared, family)
    assert found.verdict == "WARN" and "calibration.input_headroom" in found.figure
    (found,) = saturation_check(shared[2:], family)
    assert found.verdict == "UNCHECKED"
    assert saturation_check([], family) == []
