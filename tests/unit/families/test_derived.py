"""The grammar that is read from transformers: equal to the table where there is one, and refused where it cannot be had."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.formats import Formats, logical_name
from calibration.checkpoint.index import Checkpoint
from calibration.families import derived as derived_module
from calibration.families import served
from calibration.families.derived import derive
from calibration.families.family import Family
from calibration.families.registry import expected_tensors, family_of
from calibration.model.skeleton import build_skeleton
from calibration.plan.quantization_config import targets
from recipes.errors import SourceError
from tests.exported import recipe, task_of
from tests.models import any_family, deepseek_v4, merged, standard

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300, "num_experts": 4, "n_routed_experts": 4,
    "num_local_experts": 4, "first_k_dense_replace": 1, "pad_token_id": None,
}  # fmt: skip


def derived(model_type: str, **fields: Any) -> Family:
    return derive(SMALL | {"model_type": model_type} | fields, "config.json")


def promised(family: Family) -> dict[str, Any]:
    return dict(family.promised(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", get_args(standard.Family))
def test_what_is_written_by_hand_is_derived_too(name: standard.Family, tmp_path: Path) -> None:
    source = Checkpoint.open(standard.write(tmp_path / "source", name))
    table, read = family_of(source.config), derive(source.config, "config.json")
    companions = Formats(source).companions
    weights = [tensor for tensor in source.tensors if tensor not in companions]
    assert [read.place(tensor).mtp for tensor in weights] == [table.place(tensor).mtp for tensor in weights]
    tensors = [
        tensor for tensor in weights if not table.place(tensor).mtp
    ]  # the draft head is nobody's in transformers
    assert [read.place(tensor) for tensor in tensors] == [table.place(tensor) for tensor in tensors]
    names = [logical_name(tensor) for tensor in tensors]
    assert [read.model_name(tensor) for tensor in names] == [table.model_name(tensor) for tensor in names]
    kept = {tensor: want for tensor, want in expected_tensors(source.config)[0].items() if not table.place(tensor).mtp}
    shapes = {tensor: (want.shape, want.optional) for tensor, want in promised(read).items()}
    assert shapes == {tensor: (want.shape, want.optional) for tensor, want in kept.items()}


def test_experts_that_return_their_input_have_no_tensors() -> None:
    """LongCat-Flash: 8 experts with weights of 12; two attentions, dense MLPs and pairs of norms in each of two blocks."""
    config = any_family.empty_model("longcat_flash").config.to_dict()
    family = derive(json.loads(json.dumps(config, default=str)), "config.json")
    experts = {family.place(name).expert for name in promised(family) if family.place(name).part == "routed expert"}
    assert experts == set(range(8))
    parts = {
        "self_attn.1.o_proj": "attention",
        "mlps.1.up_proj": "mlp",
        "input_layernorm.1": "norm",
        "mlp.router.classifier": "router",
    }
    assert {name: family.place(f"model.layers.1.{name}.weight").part for name in parts} == parts


def test_deepseek_v4_is_derived_too(tmp_path: Path) -> None:
    source = Checkpoint.open(deepseek_v4.write(tmp_path / "source", stored="fp8_mxfp4"))
    table, read = family_of(source.config), derive(source.config, "config.json", source.tensors)
    companions = Formats(source).companions
    names = [logical_name(tensor) for tensor in source.tensors if tensor not in companions]
    assert [read.place(name).mtp for name in names] == [table.place(name).mtp for name in names]
    names = [name for name in names if not table.place(name).mtp]
    assert [read.model_name(name) for name in names] == [table.model_name(name) for name in names]
    for name in names:
        ours, theirs = table.place(name), read.place(name)
        assert (theirs.block, theirs.expert) == (ours.block, ours.expert)
        assert theirs.part == ours.part or ours.part in {
            "mHC",
            "sink",
            "indexer",
            "compressor",
            "compressor position",
        }  # the table's own words for parts of attention and blocks
    kept = {name: want for name, want in expected_tensors(source.config)[0].items() if not table.place(name).mtp}
    assert {name: want.shape for name, want in promised(read).items()} == {n: want.shape for n, want in kept.items()}


def test_parts_beside_the_routed_experts() -> None:
    family = derived("qwen2_moe", shared_expert_intermediate_size=64, decoder_sparse_step=1, mlp_only_layers=[])
    block = "model.layers.1.mlp"
    leaves = ("gate", "shared_expert_gate", "shared_expert.up_proj")
    parts = {leaf: family.place(f"{block}.{leaf}.weight").part for leaf in leaves}
    assert parts == {"gate": "router", "shared_expert_gate": "router", "shared_expert.up_proj": "shared expert"}
    ((pattern, _),) = family.never_quantized
    assert re.search(pattern, f"{block}.shared_expert_gate") and not re.search(
        pattern, f"{block}.shared_expert.up_proj"
    )


def test_parts_of_a_block_that_holds_its_experts_itself() -> None:
    family = derived("gemma4_text", enable_moe_block=True, top_k_experts=2, layer_types=["full_attention"] * 2)
    leaves = ("mlp.up_proj", "self_attn.q_proj", "router.proj", "router.scale", "experts.3.up_proj", "input_layernorm")
    parts = [family.place(f"model.layers.1.{leaf}").part for leaf in leaves]
    assert parts == ["mlp", "attention", "router", "router", "routed expert", "norm"]


def test_a_router_is_one_beside_experts_that_are_no_stacks_too() -> None:
    """DBRX: `[E I, D]`."""
    family = derived("dbrx", attn_config={"kv_n_heads": 2, "rope_theta": 500000}, ffn_config={"moe_num_experts": 4})
    names = ("ffn.router.layer", "norm_attn_norm.attn.Wqkv", "norm_attn_norm.norm_1")
    parts = [family.place(f"transformer.blocks.1.{name}.weight").part for name in names]
    assert parts == ["router", "attention", "norm"]


def test_a_linear_layer_that_is_called_a_router_is_one() -> None:
    """Gemma-3n's: vLLM's class reads its weight, and ends if that is packed."""
    fields = {
        "altup_num_inputs": 2,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.0, 0.0],
        "num_kv_shared_layers": 0,
    }
    family = derived("gemma3n_text", layer_types=["full_attention"] * 2, **fields)
    assert family.place("model.layers.1.altup.modality_router.weight").part == "router"


def test_every_embedding_is_one_and_no_linear_layer() -> None:
    """Gemma-4's of each block, OPT's of positions."""
    gemma = derived("gemma4_text", hidden_size_per_layer_input=32, vocab_size_per_layer_input=300)
    opt = derived("opt", ffn_dim=128, word_embed_proj_dim=64)
    assert gemma.place("model.embed_tokens_per_layer.weight").part == "embedding"
    assert opt.place("model.decoder.embed_positions.weight").part == "embedding"


@pytest.mark.parametrize("method", ["calibrate", "convert"])
def test_a_layer_before_the_blocks_is_left_to_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(
        any_family.FAMILIES, "gemma4_text", any_family.FAMILIES["gemma4_text"] | any_family.PER_LAYER_INPUTS
    )
    source, calibrated = any_family.write(tmp_path / "source", "gemma4_text"), method == "calibrate"
    sections = {"method": method, "calibration": {"dataset": "bundled"} if calibrated else None, "ignore": ["lm_head"]}
    plan = task_of(recipe(source, tmp_path / "out", ["Linear"], **sections)).plan
    assert ("model.per_layer_model_projection" in plan.quantized) is not calibrated
    assert "model.layers.1.per_layer_projection" in plan.quantized


def test_matrices_that_are_no_linear_layers_are_never_quantized() -> None:
    """GPT-2's are stored [in, out]."""
    family = derived("gpt2", n_embd=64, n_layer=2, n_head=2)
    why = [why for pattern, why in family.never_quantized if re.search(pattern, "transformer.h.1.attn.c_attn")]
    assert why == ["transformers has no linear layer for it"]


def test_the_draft_head_is_what_comes_after_the_last_block() -> None:
    family = derived("deepseek_v3", num_nextn_predict_layers=1, q_lora_rank=32)
    assert family.place("model.layers.2.mlp.experts.0.up_proj.weight").mtp
    assert not any(family.place(name).mtp for name in promised(family))
    assert family.mtp_blocks(["model.layers.2.eh_proj.weight"]) == {"2"}


def test_names_that_transformers_changes_are_followed() -> None:
    family = derived("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_layer_end_index=1)
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    assert name in promised(family)
    assert family.model_name(name) == "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"


def test_targets_of_modules_that_vllm_looks_up_under_no_parent(tmp_path: Path) -> None:
    source = any_family.write(tmp_path / "source", "jamba")
    task = task_of(recipe(source, tmp_path / "out", ["part:attention"], calibration=None, method="convert"))
    (target,) = targets(task.plan, "experts")
    assert re.match(target.removeprefix("re:"), "model.layers.1.o_proj")


def test_targets_of_blocks_that_are_not_called_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = merged.write(tmp_path / "source", monkeypatch, "dbrx")
    task = task_of(recipe(source, tmp_path / "out", ["Linear"], ignore=["lm_head"]))
    (target,) = targets(task.plan, "experts")
    looked_up = [f"transformer.blocks.{number}.norm_attn_norm.attn.Wqkv" for number in range(3)]
    assert [bool(re.match(target.removeprefix("re:"), name)) for name in looked_up] == [True, True, False]


def test_a_linear_layer_that_is_multiplied_by_and_never_called_is_no_target() -> None:
    family = derived("jamba", attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=16)
    mamba = "model.layers.0.mamba"
    called = {name: not re.search(family.not_observed, f"{mamba}.{name}") for name in ("dt_proj", "in_proj", "x_proj")}
    assert called == {"dt_proj": False, "in_proj": True, "x_proj": True}
    assert not re.search(derived("qwen2").not_observed, "model.layers.0.mlp.up_proj")


def test_a_name_may_be_one_part_in_some_blocks_and_another_in_others() -> None:
    family = derived(
        "kimi_linear", layer_types=["linear_attention", "full_attention"], linear_num_heads=2, linear_head_dim=32
    )
    parts = [family.place(f"model.layers.{block}.self_attn.o_proj.weight").part for block in (0, 1)]
    assert parts == ["linear attention", "attention"]


def test_an_mlp_is_no_part_of_the_attention_after_which_its_block_is_called() -> None:
    family = derived("jamba", attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=16, num_experts=1)
    parts = [family.place(f"model.layers.{block}.feed_forward.up_proj.weight").part for block in (0, 1)]
    assert parts == ["mlp", "mlp"]


def test_an_infinity_in_a_config_is_read_as_transformers_writes_it() -> None:
    limit = [0.0, {"__float__": "Infinity"}]
    family = derived("falcon_h1", time_step_limit=limit, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16)
    assert family.place("model.layers.1.mamba.in_proj.weight").block == 1


def test_what_vllm_said_of_a_class_once_is_part_of_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    said = served.Served(
        vllm="0", config="0", architecture="A", fused=(("k_proj", "q_proj", "v_proj"), ("down_proj", "o_proj")),
        parents=(("self_attn", "attn"),), unquantized=("mlp.N.gate_proj",),
    )  # fmt: skip
    monkeypatch.setattr(derived_module, "rows", lambda: {"qwen2": said})
    family = derived("qwen2", rope_theta=4242.0)
    assert family.fused_leaves == (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj", "o_proj"))
    assert family.serving_names("model.layers.1.self_attn.o_proj") == ("model.layers.1.attn.o_proj",)
    ((pattern, why),) = family.never_quantized
    assert why == "vLLM runs it unquantized" and re.search(pattern, "model.layers.1.mlp.12.gate_proj")
    assert not re.search(pattern, "model.layers.1.mlp.gate_proj")


def test_every_kept_row_is_of_a_family_of_the_matrix_and_no_reader_is_lost() -> None:
    assert served.rows().keys() <= any_family.FAMILIES.keys()
    assert served.rows()["minimax_m2"].serving_parents == ((r"\.block_sparse_moe\.", ".mlp."),)


def test_targets_bear_the_names_under_which_vllm_looks_modules_up(tmp_path: Path) -> None:
    source = any_family.write(tmp_path / "source", "minimax_m2")
    task = task_of(recipe(source, tmp_path / "out", ["re:.*experts.*"], calibration=None, method="convert"))
    (target,) = targets(task.plan, "experts")
    assert r"\.mlp\.experts\." in target and "block_sparse_moe" not in target
    module = "model.layers.0.block_sparse_moe.experts.3.w1"
    assert task.family.serving_names(module) == ("model.layers.0.mlp.experts.0.w1",)


def test_minimax_m2_rotates_the_part_of_a_head_that_its_config_names(tmp_path: Path) -> None:
    source = Checkpoint.open(any_family.write(tmp_path / "source", "minimax_m2"))
    assert (source.config["rotary_dim"], source.config["head_dim"]) == (32, 64)
    model = build_skeleton(Formats(source), tmp_path / "run", False).model
    cos, _ = model.get_submodule("model.rotary_emb")(torch.zeros(1), torch.arange(4)[None])
    assert cos.shape[-1] == 32


def test_mimo_v2_flash_rotates_by_the_bases_and_the_share_that_its_config_names(tmp_path: Path) -> None:
    source = any_family.write(tmp_path / "source", "mimo_v2_flash")
    config = json.loads((source / "config.json").read_text())
    own = {"rope_theta": 90000.0, "swa_rope_theta": 400.0, "partial_rotary_factor": 0.5}
    assert "rope_parameters" not in config and all(config[key] != value for key, value in own.items())
    (source / "config.json").write_text(json.dumps(config | own))
    rotary = build_skeleton(Formats(Checkpoint.open(source)), tmp_path / "run", False).model.get_submodule(
        "model.rotary_emb"
    )
    for kind, base in (("full_attention", 90000.0), ("sliding_attention", 400.0)):
        frequencies = rotary.get_buffer(f"{kind}_inv_freq")
        assert len(frequencies) == config["head_dim"] * 0.5 / 2
        assert frequencies[1] == pytest.approx(base ** (-1 / len(frequencies)))


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        (
            "inkling_text",
            r"mlp\.shared_experts\.gate_proj holds all experts of a block in one tensor: transformers does not say how "
            "InklingSharedExperts lays out its experts",
        ),
        ("gpt9", "transformers has no such model"),
    ],
)
def test_what_cannot_be_derived_is_refused_by_tensor(model_type: str, why: str) -> None:
    with pytest.raises(SourceError, match=f"config.json: model_type '{model_type}' has no grammar here, .*{why}"):
        derived(model_type)


def test_blocks_that_share_weights_are_refused_by_tensor() -> None:
    """Their checkpoint has the first of them alone, and is complete."""
    sizes = {"mamba_d_state": 16, "mamba_headdim": 16, "n_mamba_heads": 8, "num_mem_blocks": 1, "adapter_rank": 16}
    with pytest.raises(
        SourceError, match=r"layers\.1\.shared_transformer\S+ is model\.layers\.0\.shared_transformer\S+: blocks"
    ):
        derived("zamba2", layers_block_type=["hybrid", "hybrid"], tie_word_embeddings=True, **sizes)


def test_a_config_that_transformers_refuses_is_a_message() -> None:
    with pytest.raises(SourceError, match="transformers cannot build its causal language model: "):
        derived("olmo2", num_attention_heads="many")


@pytest.mark.parametrize("lost", [r"mlp\.experts\.3\.up_proj", r"mlp\.gate\.weight"])
def test_every_tensor_has_one_place_or_no_plan_is_made(tmp_path: Path, lost: str) -> None:
    source = any_family.write(tmp_path / "source", "qwen2_moe")
    made = recipe(source, tmp_path / "out", ["Linear"], calibration=None, method="convert")
    assert task_of(made).plan.quantized
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        renamed = {re.sub(lost, "mlp.elsewhere", name): tensor for name, tensor in tensors.items()}
        save_file(renamed, shard, metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    index.write_text(re.sub(lost, "mlp.elsewhere", index.read_text()))
    with pytest.raises(SourceError, match=r"tensors are unknown to the qwen2_moe model .*elsewhere"):
        task_of(made)
