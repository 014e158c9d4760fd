"""The plan: one action per source tensor, every rule that refuses a recipe, and the output's own config."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoint.index import Checkpoint
from calibration.families.registry import family_of
from calibration.plan.plan import Plan
from calibration.plan.quantization_config import output_config
from recipes.errors import RecipeError, SourceError, collapsed
from tests.exported import EXPERTS, plan_of, recipe
from tests.faults.editing import config, values
from tests.models import deepseek_v4, standard
from workflows.inspect_checkpoint import describe_plan


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sources")
    made = {stored: deepseek_v4.write(base / stored, stored) for stored in ("bf16", "fp8", "fp8_mxfp4")}
    return made | {family: standard.write(base / family, family) for family in ("qwen3_moe", "mixtral", "llama")}


def make(source: Path, *arguments: Any, **sections: Any) -> Plan:
    return plan_of(source, recipe(source, Path("/nowhere/out"), *arguments, **sections))[0]


@pytest.mark.parametrize("stored", ["bf16", "fp8", "fp8_mxfp4"])
def test_every_source_tensor_has_one_step_and_every_output_one_shard(sources: dict[str, Path], stored: str) -> None:
    plan, formats = plan_of(sources[stored], recipe(sources[stored], Path("/nowhere/out")))
    assert plan.steps.keys() == formats.checkpoint.tensors.keys()
    assert plan.weight_map.keys() == plan.outputs.keys()
    assert sorted(name for shard in plan.shards for name in shard.sources) == sorted(plan.steps)
    experts = 3 * (3 * 64 + 3)
    assert len(plan.quantized) == experts
    assert Counter(s.action for s in plan.steps.values())["consume"] == (0 if stored == "bf16" else experts)
    for name, step in plan.steps.items():
        if name.startswith("mtp."):
            assert step.action == "copy" and [o.name for o in step.outputs] == [name]


def test_outputs_of_a_quantized_module(sources: dict[str, Path]) -> None:
    plan = make(sources["fp8_mxfp4"])
    outputs = plan.quantized["layers.1.ffn.experts.7.w2"].outputs
    assert [(o.name.rpartition(".")[2], o.dtype, o.shape) for o in outputs] == [
        ("weight_packed", "U8", (64, 64)),
        ("weight_scale", "F8_E4M3", (64, 8)),
        ("weight_global_scale", "F32", (1,)),
        ("input_global_scale", "F32", (1,)),
    ]


def test_kept_fp8_keeps_codes_and_respells_scales_or_is_cast(sources: dict[str, Path]) -> None:
    plan = make(sources["fp8_mxfp4"])
    weight, scale = plan.steps["layers.0.attn.wq_a.weight"], plan.steps["layers.0.attn.wq_a.scale"]
    assert (weight.action, weight.group, weight.outputs[0].dtype) == ("copy", "kept_fp8", "F8_E4M3")
    assert (scale.action, scale.outputs[0].name, scale.outputs[0].dtype) == (
        "cast",
        "layers.0.attn.wq_a.weight_scale",
        "F32",
    )
    cast = make(sources["fp8_mxfp4"], export={"kept": "plain"})
    assert cast.steps["layers.0.attn.wq_a.weight"].outputs[0].dtype == "BF16"
    assert cast.steps["layers.0.attn.wq_a.scale"].action == "consume"
    assert "kept_fp8" not in cast.groups


def test_input_scales_are_shared_by_projection_or_per_expert(sources: dict[str, Path]) -> None:
    shared = {frozenset(group) for group in make(sources["bf16"]).shared_input_scales()}
    gate_up = frozenset(f"layers.0.ffn.experts.{e}.{w}" for e in range(64) for w in ("w1", "w3"))
    assert gate_up in shared and frozenset(f"layers.0.ffn.experts.{e}.w2" for e in range(64)) in shared
    alone = {
        frozenset(g) for g in make(sources["bf16"], export={"input_global_scale": "per_expert"}).shared_input_scales()
    }
    assert frozenset({"layers.0.ffn.experts.3.w1", "layers.0.ffn.experts.3.w3"}) in alone
    assert not any("layers.0.ffn.experts.3.w2" in group for group in alone)


def test_shards_hold_whole_blocks_and_respect_the_size(sources: dict[str, Path]) -> None:
    plan = make(sources["bf16"], export={"max_shard_size": 500_000})
    for shard in plan.shards:
        blocks = {plan.family.place(name).block for name in shard.sources}
        size = sum(o.nbytes for name in shard.sources for o in plan.steps[name].outputs)
        assert blocks == {shard.block} and (size <= 500_000 or len(shard.sources) == 1)
    assert len(plan.shards) > 12


WRONG = {
    "no target": ([r"re:^layers\.\d+\.ffn\.expert\.\d+\.w1$"], {}, "matches no module of the source"),
    "transformers names": (["re:.*self_attn.*"], {}, "spelled as in the source"),
    "half a fused pair": (
        [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[12]$"],
        {},
        "served as one matrix must be quantized alike",
    ),
    "some experts": (
        [r"re:^layers\.\d+\.ffn\.experts\.[0-3]\.w[123]$"],
        {},
        "routed experts of block 0 must be quantized alike",
    ),
    "norms only": ([r"re:^layers\.\d+\.attn_norm$"], {}, "none of them can be quantized"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_targets_are_refused(sources: dict[str, Path], case: str) -> None:
    targets, sections, message = WRONG[case]
    with pytest.raises(RecipeError, match=re.escape(message)):
        make(sources["bf16"], targets, **sections)


def test_all_problems_at_once(sources: dict[str, Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        make(sources["bf16"], [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w1$", "re:nothing.*", "absent"])
    text = str(caught.value)
    assert all(word in text for word in ("'re:nothing.*'", "'absent'", "served as one matrix"))
    assert len(caught.value.problems) == 4


def test_kept_mxfp4_has_no_output_form(sources: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"stored as MXFP4 and is no target.*export\.kept: plain \(and 575 more"):
        make(sources["fp8_mxfp4"], [r"re:^layers\.\d+\.ffn\.shared_experts\.w[123]$"])


def test_targets_that_also_match_mtp_warn_and_leave_it(sources: dict[str, Path]) -> None:
    plan = make(sources["bf16"], [r"re:.*\.ffn\.(shared_)?experts\..*"])
    assert any("MTP modules are copied" in warning for warning in plan.warnings)
    assert not any(module.startswith("mtp.") for module in plan.quantized)


def test_linear_means_linear_layers(sources: dict[str, Path]) -> None:
    plan = make(sources["qwen3_moe"], "Linear", ignore=["lm_head"])
    parts = Counter(plan.family.place(step.source).part for step in plan.quantized.values())
    assert parts.keys() == {"attention", "routed expert"} and not plan.warnings


def test_lm_head_in_ignore_is_the_head_however_the_source_spells_it(sources: dict[str, Path]) -> None:
    named, spelled, bare = (make(sources["bf16"], "Linear", ignore=ignore) for ignore in (["lm_head"], ["head"], []))
    assert "head" in bare.quantized and "head" not in named.quantized
    assert named.digest == spelled.digest and len(named.warnings) == 1  # what Linear leaves out


@pytest.mark.parametrize("entry", ["lm_head.weight", r"re:.*mlp\.gate$", "re:visual.*", "re:.*shared_expert_gate$"])
def test_an_ignore_entry_that_matches_nothing_is_a_note_and_changes_nothing(
    sources: dict[str, Path], entry: str
) -> None:
    plan, bare = make(sources["bf16"], ignore=[entry]), make(sources["bf16"])
    assert plan.digest == bare.digest
    (note,) = plan.warnings
    assert note.startswith(f"ignore: {entry!r} matches no module of the source and changes nothing; ")
    assert ("; closest: " in note) == (entry != "re:visual.*")


def test_a_long_ignore_list_of_another_model_is_a_few_notes_at_once(sources: dict[str, Path]) -> None:
    started = time.process_time()
    entries = [f"model.layers.{block}.mlp.experts.{expert}.gate" for block in range(61) for expert in range(60)]
    plan = make(sources["bf16"], ignore=[*entries, "re:" + "x" * 10_000])
    assert time.process_time() - started < 10
    assert 1 < len(plan.warnings) < 5 and "more like this" in plan.warnings[0]


def test_linear_leaves_out_what_vllm_runs_unquantized_and_says_so_in_one_line(sources: dict[str, Path]) -> None:
    plan = make(sources["bf16"], "Linear", ignore=["head"])
    (note,) = plan.warnings
    assert note.startswith("target 'Linear' leaves out ")
    for part in ("layers.N.attn.compressor.wkv", "(vLLM runs the compressor unquantized)", "(MTP modules are copied"):
        assert part in note
    parts = Counter(plan.family.place(step.source).part for step in plan.quantized.values())
    assert "router" not in parts and "compressor" not in parts and {"attention", "routed expert"} <= parts.keys()


def test_linear_leaves_out_a_weight_whose_shape_does_not_fit(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["llama"], tmp_path / "source")
    values(r"\.mlp\.(gate|up)_proj\.", lambda weight: weight[:-8])(source)
    values(r"\.mlp\.down_proj\.", lambda weight: weight[:, :-8])(source)
    config(lambda c: c.update(intermediate_size=c["intermediate_size"] - 8))(source)
    plan = make(source, "Linear")
    (note,) = plan.warnings
    assert "model.layers.N.mlp.down_proj (needs K to be a multiple of 16, K is " in note
    assert "model.layers.0.mlp.down_proj" not in plan.quantized and "model.layers.0.mlp.up_proj" in plan.quantized
    with pytest.raises(RecipeError, match="add the module to ignore"):
        make(source, ["re:.*down_proj$"])


def test_fp8_block_is_planned_only_for_shapes_that_vllm_loads_and_runs(sources: dict[str, Path]) -> None:
    """Qwen3-MoE: 64 inputs, 96 in the experts; Llama: 128 inputs, k and v with 64 rows; Mixtral: experts of 224 rows."""
    for name, kept, left in (
        ("qwen3_moe", {"o_proj"}, "experts.N.gate_proj and 3 more (needs K to be a multiple of 128, K is 64: vLLM quantizes"),
        ("llama", {"o_proj", "gate_proj", "up_proj", "down_proj"},
         "self_attn.q_proj, model.layers.N.self_attn.v_proj (k_proj, served with it, needs M to be a multiple of 128, M is 64"),
        ("mixtral", {"o_proj"}, "experts.N.w1 (needs M to be a multiple of 128, M is 224: vLLM stacks another weight below it)"),
    ):  # fmt: skip
        plan = make(sources[name], "Linear", "FP8_BLOCK", ignore=["part:head"])
        assert {module.rpartition(".")[2] for module in plan.quantized} == kept
        assert any(left in warning for warning in plan.warnings), plan.warnings
    with pytest.raises(RecipeError) as caught:
        make(sources["llama"], [r"re:.*self_attn\.[qkv]_proj$"], "FP8_BLOCK")
    assert caught.value.problems == [
        "config_groups.experts: model.layers.0.self_attn.k_proj.weight: FP8_BLOCK needs M to be a multiple of 128, M is 64: "
        "vLLM stacks another weight below it; add the module to ignore (and 1 more like this)"
    ], "q has 128 rows, v comes last"
    with pytest.raises(RecipeError, match=r"down_proj\.weight: FP8_BLOCK needs K to be a multiple of 128, K is 96"):
        make(sources["qwen3_moe"], [r"re:.*mlp\.experts\..*proj$"], "FP8_BLOCK")


def test_kept_tiles_that_no_gpu_runs_are_a_warning_because_the_source_has_them_too(sources: dict[str, Path]) -> None:
    plan = make(sources["fp8"])
    (warning,) = [warning for warning in plan.warnings if "keeps its FP8 tiles" in warning]
    assert "K is 64: vLLM quantizes inputs in such groups, on a GPU, in the source too (and " in warning
    assert not make(sources["fp8"], export={"kept": "plain"}).warnings


def test_the_table_of_a_plan_shows_formats_and_leaves_as_they_are_spelled(sources: dict[str, Path]) -> None:
    plan, formats = plan_of(
        sources["fp8_mxfp4"], recipe(sources["fp8_mxfp4"], Path("/nowhere/out"), export={"kept": "plain"})
    )
    rows = describe_plan(plan, formats.checkpoint)["steps"]
    reasons = {row["reason"] for row in rows}
    assert "attention: FP8 tiles 128x128 undone" in reasons
    assert not any("FPN" in reason or "NVFPN" in reason for reason in reasons)
    assert {row["pattern"] for row in rows} >= {f"layers.N.ffn.experts.N.w{leaf}.weight" for leaf in (1, 2, 3)}


def test_problems_collapse_over_blocks_and_experts_alone() -> None:
    blocks = [f"{shard}: layers.{n}.ffn.experts.{n}.w1 saw {n} of block {n}" for n in (1, 2) for shard in
              (f"a/model-0000{n}-of-00002.safetensors",)]  # fmt: skip
    assert collapsed(blocks) == [f"{blocks[0]} (and 1 more like this)"]
    apart = ["group1: w1 is FP8", "group2: w1 is FP8", "group1: v2 is FP8", "group1: w1 is FP4"]
    assert collapsed(apart) == apart


def test_every_mtp_tensor_has_a_part(sources: dict[str, Path]) -> None:
    family = family_of({"model_type": "deepseek_v4"})
    names = [name for name in Checkpoint.open(sources["bf16"]).tensors if name.startswith("mtp.")]
    parts = {name.removeprefix("mtp.0."): family.place(name).part for name in names}
    assert "other" not in parts.values()
    assert parts["enorm.weight"] == parts["hnorm.weight"] == parts["norm.weight"] == "norm"
    assert parts["e_proj.weight"] == parts["h_proj.weight"] == "MTP projection"


def test_the_plan_is_deterministic_and_its_digest_sees_the_recipe(sources: dict[str, Path]) -> None:
    one, two = make(sources["fp8"]), make(sources["fp8"])
    assert one.digest == two.digest
    assert make(sources["fp8"], export={"kept": "plain"}).digest != one.digest


def test_the_digest_is_that_of_runs_before_it_was_computed_without_copies(sources: dict[str, Path]) -> None:
    """A run that was started by an older release is resumed only if the digest is the same."""
    linear = {"QuantizationModifier": {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "NVFP4"}}
    for plan in (make(sources["fp8_mxfp4"]), make(sources["llama"], modifiers=[{"AWQModifier": None}, linear])):
        body = {
            "family": plan.family.name,
            "steps": [asdict(step) for step in plan.steps.values()],
            "shards": [asdict(shard) for shard in plan.shards],
            "groups": {name: scheme.name for name, scheme in plan.groups.items()},
            "input_global_scale": plan.input_global_scale,
        } | ({"smoothed": [asdict(site) for site in plan.smoothed]} if plan.smoothed else {})
        assert plan.digest == hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    assert plan.smoothed


@pytest.mark.parametrize("stored", ["bf16", "fp8_mxfp4"])
def test_config_targets_name_exactly_what_is_quantized(sources: dict[str, Path], stored: str) -> None:
    plan, formats = plan_of(sources[stored], recipe(sources[stored], Path("/nowhere/out")))
    config = output_config(plan, formats.checkpoint.config)
    source = formats.checkpoint.config
    assert all(config[k] == v for k, v in source.items() if k not in ("quantization_config", "expert_dtype"))
    for name, group in config["quantization_config"]["config_groups"].items():
        patterns = [re.compile(target.removeprefix("re:")) for target in group["targets"]]
        weights = {n.rpartition(".")[0] for n in formats.checkpoint.tensors if n.endswith(".weight")}
        assert {m for m in weights if any(p.match(m) for p in patterns)} == set(plan.modules(name))
        assert not any(
            p.match(f"model.layers.{number}.ffn.experts.0.gate_proj") for p in patterns for number in (3, 4, 11)
        )
    experts = config["quantization_config"]["config_groups"]["experts"]["targets"]
    assert any(re.match(t.removeprefix("re:"), "model.layers.2.ffn.experts.0.gate_proj") for t in experts)


def test_transformers_names_of_every_family(sources: dict[str, Path]) -> None:
    family = family_of({"model_type": "mixtral"})
    assert family.model_name("model.layers.1.block_sparse_moe.experts.3.w2") == "model.layers.1.mlp.experts.3.down_proj"
    assert family.model_name("model.layers.1.block_sparse_moe.gate.weight") == "model.layers.1.mlp.gate.weight"
    v4 = family_of({"model_type": "deepseek_v4"})
    assert v4.model_name("layers.2.ffn.experts.63.w3.weight") == "model.layers.2.mlp.experts.63.up_proj.weight"
    assert v4.model_name("mtp.0.ffn.experts.0.w1.weight") is None
    with pytest.raises(SourceError, match="'gpt9' has no grammar here"):
        family_of({"model_type": "gpt9"})


def test_a_target_that_takes_for_ever_to_match_is_refused(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.patterns.SECONDS_PER_MATCH", 0.02)
    slow = r"re:(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1[XY]"
    with pytest.raises(RecipeError) as caught:
        make(sources["bf16"], [*EXPERTS, slow], ignore=[slow])
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["ignore", "config_groups.experts.targets"]
    assert all("takes too long to match" in problem for problem in caught.value.problems)


def test_parts_are_targets_on_every_family(sources: dict[str, Path]) -> None:
    parts = ["part:routed expert", "part:shared expert"]
    for name, shared in (("bf16", True), ("qwen3_moe", False), ("mixtral", False)):
        plan = make(sources[name], parts)
        assert {plan.family.place(module).part for module in plan.quantized} == {
            "routed expert",
            *(["shared expert"] if shared else []),
        }
        assert not any(plan.family.place(module).mtp for module in plan.quantized)
        assert not any("MTP" in warning for warning in plan.warnings)  # a part never asks for the draft head
        noted = any("has no shared expert" in warning for warning in plan.warnings)
        assert noted is not shared
    dense = make(sources["llama"], ["part:attention", "part:mlp"])
    assert len(dense.quantized) == 7 * len(dense.block_numbers)


def test_parts_that_no_model_has_are_problems(sources: dict[str, Path]) -> None:
    with pytest.raises(
        RecipeError, match=r"'part:experts' matches no module of the source; the parts of this source are "
    ):
        make(sources["qwen3_moe"], ["part:experts"])
    with pytest.raises(RecipeError, match="none of them is in this source; nothing would be quantized"):
        make(sources["llama"], ["part:routed expert", "part:shared expert"])
