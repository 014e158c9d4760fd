"""The miniature of a source keeps the first block of every kind, promised by its own config.json and planned as in the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.families.cut import block_traits, cut_config
from calibration.plan import miniature
from calibration.plan.miniature import Cut, NoMiniature, find_cut, kinds_of_blocks, make_miniature
from tests.exported import EXPERTS, recipe, task_of
from tests.models import any_family, deepseek_v4, headers_only, standard

PRO = replace(headers_only.ProSizes(), layers=9, experts=4)
#: Blocks 0-1 compress by 128 and hash, 2 by 4 and hashes, 3 by 128, 4 by 4; 5 to 8 repeat the last two.
PRO_KINDS = [(0, 1), (2,), (3, 5, 7), (4, 6, 8)]


@pytest.fixture(scope="module")
def pro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return headers_only.write(tmp_path_factory.mktemp("hollow") / "pro", PRO, shards=4)


def test_deepseek_v4_pro_has_four_kinds_of_block(pro: Path, tmp_path: Path) -> None:
    task = task_of(recipe(pro, tmp_path / "output"))
    cut = find_cut(task)
    assert kinds_of_blocks(task) == PRO_KINDS and cut.kept == (0, 2, 3, 4)
    assert cut.config["num_hidden_layers"] == 4 and cut.config["compress_ratios"] == [128, 4, 128, 4]
    assert cut.config["num_hash_layers"] == 2 and cut.config["num_nextn_predict_layers"] == 0
    assert cut.names["layers.4.ffn.gate.weight"] == "layers.3.ffn.gate.weight"
    assert not any(name.startswith("mtp.") for name in cut.names)


def test_targets_that_name_a_block_make_a_kind_of_it(pro: Path, tmp_path: Path) -> None:
    targets = [r"re:^layers\.[0-6]\.ffn\.experts\.\d+\.w[123]$"]
    task = task_of(recipe(pro, tmp_path / "output", targets, export={"kept": "plain"}))
    assert kinds_of_blocks(task) == [(0, 1), (2,), (3, 5), (4, 6), (7,), (8,)]
    small = make_miniature(task, find_cut(task), tmp_path / "miniature")
    assert {small.family.place(name).block for name in small.plan.quantized} == {0, 1, 2, 3}


def test_miniature_is_a_source_of_its_own_that_copies_no_tensor(pro: Path, tmp_path: Path) -> None:
    task = task_of(recipe(pro, tmp_path / "output"))
    cut = find_cut(task)
    small = make_miniature(task, cut, tmp_path / "miniature")
    assert small.plan.output_bytes == cut.output_bytes(task.plan) < task.plan.output_bytes
    assert small.plan.block_numbers == [0, 1, 2, 3]
    shards = list((tmp_path / "miniature" / "source").glob("*.safetensors"))
    assert shards and all(path.is_symlink() for path in shards)
    assert small.recipe.source.checkpoint == str(tmp_path / "miniature" / "source")


def test_its_tensors_are_the_source_s_own_values(tmp_path: Path) -> None:
    source = deepseek_v4.write(tmp_path / "source", "fp8_mxfp4", layers=5)
    task = task_of(recipe(source, tmp_path / "output"))
    cut = find_cut(task)
    small = make_miniature(task, cut, tmp_path / "miniature")
    for old, new in cut.names.items():
        if old not in task.formats.companions:
            assert torch.equal(task.formats.read(old), small.formats.read(new)), old
    assert {old: task.source.tensors[old].nbytes for old in cut.names} == {
        old: small.source.tensors[new].nbytes for old, new in cut.names.items()
    }


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe", "mixtral", "llama"])
def test_families_of_the_table(family: Any, tmp_path: Path) -> None:
    task = task_of(recipe(standard.write(tmp_path / "source", family), tmp_path / "output", "Linear"))
    assert find_cut(task).kept == ((0, 1) if family == "glm4_moe" else (0,))


@pytest.mark.parametrize(
    ("family", "targets"), [("llama4_text", "Linear"), ("gpt_oss", "Linear"), ("mxfp4", "part:attention")]
)
def test_stacks_of_experts_taken_apart_and_whole(family: str, targets: str, tmp_path: Path) -> None:
    source = any_family.write(tmp_path / "source", "gpt_oss" if family == "mxfp4" else family, mxfp4=family == "mxfp4")
    task = task_of(recipe(source, tmp_path / "output", targets, export={"kept": "plain"}))
    cut = find_cut(task)
    small = make_miniature(task, cut, tmp_path / "small")
    read = 0
    for old, new in cut.names.items():
        if new in small.plan.steps and small.plan.steps[new].outputs:
            assert torch.equal(small.formats.read(new), task.formats.read(old)), old
            read += 1
    assert read == sum(1 for step in small.plan.steps.values() if step.outputs)


def test_a_period_that_the_cut_cannot_say_keeps_the_blocks_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = any_family.FAMILIES["ernie4_5_moe"] | {
        "num_hidden_layers": 6, "moe_layer_start_index": 0, "moe_layer_end_index": 5, "moe_layer_interval": 3,
    }  # fmt: skip
    monkeypatch.setitem(any_family.FAMILIES, "ernie4_5_moe", sizes)
    task = task_of(recipe(any_family.write(tmp_path / "source", "ernie4_5_moe"), tmp_path / "output", "Linear"))
    assert kinds_of_blocks(task) == [(0, 1, 3, 4), (2, 5)]
    assert find_cut(task).kept == (0, 1, 2)


def test_a_source_whose_cut_is_not_proven_has_no_miniature(
    pro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniature, "cut_config", lambda config, *_: config | {"num_hidden_layers": 2})
    with pytest.raises(NoMiniature, match=r"cannot be cut to blocks 0, 2, 3, 4"):
        find_cut(task_of(recipe(pro, tmp_path / "output")))


def test_a_miniature_that_would_be_planned_otherwise_is_none(
    pro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(recipe(pro, tmp_path / "output"))
    monkeypatch.setattr(
        miniature, "_recipe", lambda task, cut, directory: recipe(pro, directory / "output", EXPERTS[:1])
    )
    with pytest.raises(NoMiniature, match=r"shared_experts.* would be treated otherwise"):
        make_miniature(task, find_cut(task), tmp_path / "miniature")


CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "first dense blocks": ({"first_k_dense_replace": 3}, (0, 3), {"first_k_dense_replace": 1}),
    "dense blocks by number": ({"mlp_only_layers": [1, 4]}, (0, 1), {"mlp_only_layers": [1]}),
    "every second block is sparse": (
        {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (0, 1, 3),
        {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]},
    ),
    "a value per block": ({"layer_types": list("aabab" "b")}, (0, 2), {"layer_types": ["a", "b"]}),
    "a value per block and one per draft block": (
        {"compress_ratios": [0, 0, 4, 8, 4, 8, 0]}, (0, 2, 3), {"compress_ratios": [0, 4, 8]},
    ),
    "hybrid blocks by number": ({"hybrid_layer_ids": [2, 5]}, (0, 2), {"hybrid_layer_ids": [1]}),
    "tables beside block numbers": (
        {"engram_layer_ids": [1, 2], "engram_num_embeddings": [7, 9]}, (0, 2),
        {"engram_layer_ids": [1], "engram_num_embeddings": [9]},
    ),
    "a draft head": (
        {"num_nextn_predict_layers": 1, "dspark_target_layer_ids": [3], "n_mtp_layers": 3}, (0,),
        {"num_nextn_predict_layers": 0, "n_mtp_layers": 0},
    ),
    "what is no block's": (
        {"eos_token_id": [1, 2, 3, 4, 5, 6], "architectures": ["A"]}, (0,),
        {"eos_token_id": [1, 2, 3, 4, 5, 6], "architectures": ["A"]},
    ),
    "nested fields": (
        {"text_config": {"num_hidden_layers": 6, "layer_types": list("abbbbb")}}, (0, 1),
        {"text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_fields_of_single_blocks_are_cut(case: str) -> None:
    fields, kept, wanted = CONFIGS[case]
    config = {"model_type": "of nobody", "num_hidden_layers": 6} | fields
    before = json.dumps(config)
    cut = cut_config(config, kept, 6)
    assert cut == {"model_type": "of nobody", "num_hidden_layers": len(kept)} | wanted
    assert json.dumps(config) == before


def test_a_list_that_transformers_derives_is_written_out() -> None:
    config = {"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4}
    assert cut_config(config, (0, 3), 8)["layer_types"] == ["linear_attention", "full_attention"]
    traits = block_traits(config, 8)
    assert traits[0] == traits[1] == traits[6] != traits[3] == traits[7]


def test_cut_counts_the_bytes_of_its_tensors_alone(pro: Path, tmp_path: Path) -> None:
    plan = task_of(recipe(pro, tmp_path / "output")).plan
    cut = Cut((0,), ((0,),), {}, {"embed.weight": "embed.weight"})
    assert cut.output_bytes(plan) == plan.outputs["embed.weight"].nbytes


@pytest.mark.parametrize(
    ("words", "kept", "sites"),
    [
        ({}, (0,), 4),
        ({"mappings": [["re:.*q_proj", "model.layers.1.input_layernorm"]]}, (0, 1), 1),
        ({"ignore": ["re:.*norm"]}, (0,), 2),
    ],
)
def test_what_a_recipe_smooths_is_smoothed_in_the_miniature(
    words: dict[str, Any], kept: tuple[int, ...], sites: int, tmp_path: Path
) -> None:
    modifiers = [{"SmoothQuantModifier": words}, {"QuantizationModifier": {"targets": "Linear", "scheme": "NVFP4"}}]
    task = task_of(recipe(standard.write(tmp_path / "source", "llama"), tmp_path / "output", modifiers=modifiers))
    cut = find_cut(task)
    assert cut.kept == kept
    assert len(make_miniature(task, cut, tmp_path / "miniature").plan.smoothed) == sites


def test_lists_that_count_the_draft_head_s_blocks_and_numbers_in_a_text_are_cut() -> None:
    config = {
        "num_hidden_layers": 3, "num_nextn_predict_layers": 2, "rope_theta": [1.0, 2.0, 3.0, 9.0, 9.0], "moe_layers_enum": "1,2",
        "note": "1,2",
    }  # fmt: skip
    cut = cut_config(config, (0, 2), 3)
    assert (cut["rope_theta"], cut["moe_layers_enum"], cut["num_nextn_predict_layers"]) == ([1.0, 3.0], "1", 0)
    assert cut["note"] == "1,2"
