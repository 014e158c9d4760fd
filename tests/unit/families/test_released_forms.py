"""The forms in which DeepSeek-V4 is released today: a DSpark draft head, and DeepSeek-V4.1, which transformers cannot run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.families.registry import FAMILIES, expected_tensors, family_of, language_config
from calibration.forecast.cost import attention, hidden_width
from calibration.model.skeleton import build_skeleton
from recipes.checks import Fidelity
from recipes.errors import RecipeError, SourceError
from recipes.schema import Recipe
from tests.converted import converting, run, tensors, undoing
from tests.exported import plan_of, recipe
from tests.models import deepseek_v4, deepseek_v41
from verify.checks import Check
from verify.fidelity.fidelity import verify_fidelity
from verify.fidelity.forward import verify_forward
from verify.known import Known
from verify.structure.structure import verify_structure
from workflows.inspect_checkpoint import describe_checkpoint

ROUTED = [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"]
V41 = deepseek_v41.Sizes(experts=8, draft_experts=4)
#: Read by every engine in the stored form alone, or copied for the speculative path.
NATIVE = re.compile(r"^mtp\.|\.engram\.embed\.")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("released")
    return {
        "dspark": deepseek_v4.write(base / "dspark", "fp8_mxfp4", experts=8, draft_blocks=3),
        "v41": deepseek_v41.write(base / "v41", sizes=V41),
    }


@pytest.fixture(scope="module")
def outputs(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """Routed experts in NVFP4 by convert, MXFP4 kept bit for bit."""
    made = {
        "dspark": converting(sources["dspark"], tmp_path_factory.mktemp("dspark"), ROUTED),
        "v41": converting(sources["v41"], tmp_path_factory.mktemp("v41"), ROUTED, export={"kept": "plain"}),
    }
    for one in made.values():
        run(one)
    return made


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.id.partition(".")[2]: check.verdict for check in checks if check.verdict != "PASS"}


def dspark_config(**fields: Any) -> dict[str, Any]:
    return deepseek_v4.config(deepseek_v4.Sizes(experts=8, draft_blocks=3), "fp8_mxfp4") | fields


def test_a_config_promises_what_a_checkpoint_of_its_form_holds() -> None:
    sizes = deepseek_v4.Sizes(experts=8, draft_blocks=3)
    for config, specs in (
        (dspark_config(), deepseek_v4.specs(sizes)),
        (deepseek_v41.config(V41), deepseek_v41.specs(V41)),
    ):
        promised, problems = expected_tensors(config)
        assert problems == []
        assert {name: want.shape for name, want in promised.items()} == {spec.name: spec.shape for spec in specs}


def test_the_blocks_of_a_dspark_head_are_counted_as_engines_count_them() -> None:
    """num_nextn_predict_layers stays 1 in the released configs: vLLM takes n_mtp_layers, SGLang one block a target layer."""

    def blocks(**fields: Any) -> set[str]:
        config = dspark_config(**fields)
        return family_of(config).mtp_blocks(expected_tensors(config)[0])

    assert blocks() == {"0", "1", "2"}
    assert blocks(n_mtp_layers=2) == {"0", "1"}
    assert blocks(dspark_target_layer_ids=[2]) == {"0"}


def test_a_config_that_promises_half_a_draft_head_says_what_it_lacks() -> None:
    lacking = [f"dspark_{key}" for key in ("markov_rank", "target_layer_ids")]
    for key in lacking:
        config = dspark_config()
        del config[key]
        assert [problem.split()[1] for problem in expected_tensors(config)[1]] == [key]
    without = expected_tensors(dspark_config(enable_confidence_head=False))[0]
    assert expected_tensors(dspark_config())[0].keys() - without.keys() == {"mtp.2.confidence_head.proj.weight"}


def test_a_nested_config_is_told_where_it_lacks_a_field_once_for_all_blocks() -> None:
    config = deepseek_v41.config(V41)
    del config["text_config"]["hidden_size"], config["vision_config"]["patch_size"]
    assert expected_tensors(config)[1] == [
        f"config.json: {field} is missing, a whole number is needed to serve this model"
        for field in ("text_config.hidden_size", "vision_config.patch_size")
    ]


def test_v41_without_engram_vision_or_compression_is_a_model_of_the_family_too() -> None:
    config = deepseek_v41.config(V41)
    del config["vision_config"]
    for key in ("engram_layer_ids", "engram_num_embeddings", "kv_source_layer_ids", "index_source_layer_ids"):
        del config["text_config"][key]
    promised, problems = expected_tensors(config)
    assert problems == [] and "layers.0.ffn.gate.bias" in promised
    assert not [
        name for name in promised if re.search(r"engram|vision|aligner|image_|bias_vl|compressor|indexer", name)
    ]


def test_only_a_family_that_nests_its_language_model_is_read_inside() -> None:
    nested = deepseek_v41.config(V41)
    assert (
        language_config(nested)["hidden_size"] == V41.hidden and language_config(nested)["model_type"] == "deepseek_v41"
    )
    assert hidden_width(nested) == 4 * V41.hidden and attention(nested) == (V41.heads, 512)
    stranger = {"model_type": "llama", "hidden_size": 64, "text_config": {"hidden_size": 1}}
    assert language_config(stranger) == stranger and language_config({"model_type": "x"}) == {"model_type": "x"}


@pytest.mark.parametrize("form", ["dspark", "v41"])
def test_the_output_verifies_alone_and_against_its_source(
    outputs: dict[str, Recipe], sources: dict[str, Path], form: str
) -> None:
    output = Path(outputs[form].output)
    alone = verify_structure(output)
    assert verdicts(alone) == {"copies": "UNCHECKED"}
    figure = next(check.figure for check in alone if check.id == "structure.mtp")
    assert figure.startswith("3 found, config.json promises 3")
    plan, formats = plan_of(sources[form], outputs[form])
    assert verdicts(verify_structure(output, Known(plan, formats))) == {}
    fidelity = verify_fidelity(output, plan, formats)
    assert verdicts(fidelity) == {}
    assert next(c.figure for c in fidelity if c.id == "fidelity.weights").startswith("worst 0.0000")


@pytest.mark.parametrize("form", ["dspark", "v41"])
def test_draft_heads_and_engram_tables_keep_their_bytes(
    outputs: dict[str, Recipe], sources: dict[str, Path], tmp_path: Path, form: str
) -> None:
    """Method plain undoes everything else: no engine reads an Engram table in BF16."""
    plain = undoing(sources[form], tmp_path / "plain")
    run(plain)
    before = tensors(sources[form])
    converted, undone = tensors(outputs[form].output), tensors(plain.output)
    engram = {name for name in before if ".engram.embed." in name}
    native = {name for name in before if NATIVE.search(name)}
    assert len(engram) == (2 if form == "v41" else 0) and len(native) > 50
    for found, names in ((converted, native), (undone, engram)):
        for name in names:
            assert found[name].dtype == before[name].dtype, name
            assert torch.equal(found[name].view(torch.uint8), before[name].view(torch.uint8)), name
    low_bit = {name for name, tensor in undone.items() if tensor.element_size() == 1}
    assert low_bit == engram
    assert verdicts(verify_structure(Path(plain.output))) == {"copies": "UNCHECKED"}


def test_in_nvidias_dialect_everything_but_routed_experts_keeps_its_bytes(tmp_path: Path) -> None:
    """vllm 0.32, models/deepseek_v41/quant_config.py: FP8 in tiles of `weight_block_size`, NVFP4 experts where `ignore` does
    not name them, MXFP4 where it does."""
    source = deepseek_v41.write(tmp_path / "source", sizes=replace(V41, q_lora_rank=96))
    made = converting(source, tmp_path / "out", ROUTED, export={"dialect": "nvidia"})
    run(made)
    before, after = tensors(source), tensors(made.output)
    for name, tensor in before.items():
        if re.match(r"layers\.\d+\.ffn\.experts\.", name) is None:
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    expert = "layers.0.ffn.experts.3.w1"
    assert torch.equal(after[f"{expert}.weight"].view(torch.int8), before[f"{expert}.weight"])
    declared = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = declared["quantization_config"]
    assert (declared["expert_dtype"], quantization["moe_quant_algo"], quantization["weight_block_size"]) == (
        "fp4",
        "NVFP4",
        [32, 32],
    )
    assert "mtp.*" in quantization["ignore"] and "ignored_layers" not in quantization
    alone = verify_structure(Path(made.output))
    assert verdicts(alone) == {"copies": "UNCHECKED"}
    assert verdicts(verify_structure(Path(made.output), Known(*plan_of(source, made)))) == {}


def test_tiles_that_vllm_would_cut_in_a_fused_matrix_are_told_in_nvidias_dialect_too(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"wq_a\.weight: keeps its FP8 tiles, .* a multiple of 32, M is 80: "):
        plan_of(sources["v41"], converting(sources["v41"], tmp_path / "out", ROUTED, export={"dialect": "nvidia"}))


def test_plain_values_of_32x32_tiles_are_code_times_scale(sources: dict[str, Path]) -> None:
    formats, stored = Formats(Checkpoint.open(sources["v41"])), tensors(sources["v41"])
    name = "layers.1.attn.wq_b"
    assert formats.of(f"{name}.weight").label == "FP8 tiles 32x32"
    scale = stored[f"{name}.scale"].float().repeat_interleave(32, 0).repeat_interleave(32, 1)[:, : V41.q_lora_rank]
    wanted = (stored[f"{name}.weight"].float() * scale).bfloat16()
    assert torch.equal(formats.read(f"{name}.weight"), wanted)


def test_calibration_of_a_model_without_code_is_refused_with_the_way_that_works(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"method: calibrate: .* no code of deepseek_v41.*use method: convert"):
        plan_of(sources["v41"], recipe(sources["v41"], tmp_path / "out", ROUTED, export={"kept": "plain"}))
    with pytest.raises(SourceError, match="no code of deepseek_v41") as raised:
        build_skeleton(Formats(Checkpoint.open(sources["v41"])), tmp_path, False)
    assert "correct the source" not in str(raised.value)
    checks, blocks = verify_forward(tmp_path, Checkpoint.open(sources["v41"]), Fidelity(), None)
    assert blocks == [] and {check.verdict for check in checks} == {"UNCHECKED"}
    assert all(check.figure.startswith("no forward: transformers has no code of deepseek_v41") for check in checks)


def test_a_family_is_not_calibrated_only_while_transformers_has_no_class_of_it() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for family in FAMILIES:
        for model_type in family.model_types:
            assert (model_type in CONFIG_MAPPING) == (not family.not_calibrated), model_type


def test_tiles_that_the_output_cannot_keep_are_refused_by_their_size(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is stored as FP8 tiles 32x32 and is no target; .*set export\.kept: plain"):
        plan_of(sources["v41"], converting(sources["v41"], tmp_path / "out", ROUTED))


def test_linear_leaves_out_what_vllm_runs_unquantized(sources: dict[str, Path], tmp_path: Path) -> None:
    made = converting(sources["v41"], tmp_path / "out", "Linear", ignore=["head"], export={"kept": "plain"})
    plan = plan_of(sources["v41"], made)[0]
    leaves = {re.sub(r"\d+", "N", name) for name in plan.quantized}
    assert {"layers.N.engram.wkv", "layers.N.attn.wq_b", "layers.N.attn.indexer.wq_b"} <= leaves
    assert not [
        name for name in leaves if re.search(r"^(vision|aligner|mtp)|embed|compressor|indexer\.w(k|eights)", name)
    ]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda sizes: replace(sizes, draft_blocks=2), "config.json describes another model"),
        (lambda sizes: replace(sizes, engram_rows=(241,)), r"engram\.embed\.weight: stored shape \[240, 64\]"),
        (lambda sizes: replace(sizes, vision_hidden=64), r"vision\..*stored shape"),
        (lambda sizes: replace(sizes, kv_sources=(1,)), "are unknown to the deepseek_v41 model"),
    ],
)
def test_a_source_that_contradicts_its_config_is_refused_or_its_draft_head_fails(
    sources: dict[str, Path], tmp_path: Path, spoil: Any, told: str
) -> None:
    copy = Path(shutil.copytree(sources["v41"], tmp_path / "source"))
    changed = spoil(V41)
    (copy / "config.json").write_text(json.dumps(deepseek_v41.config(changed)))
    made = converting(copy, tmp_path / "out", ROUTED, export={"kept": "plain"})
    if changed.draft_blocks != V41.draft_blocks:  # copied byte for byte: not the plan's to refuse
        assert "tensors" in verdicts(verify_structure(copy))
        return
    with pytest.raises(SourceError, match=told):
        plan_of(copy, made)


def test_inspect_names_the_parts_of_v41(sources: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(sources["v41"])
    facts = describe_checkpoint(checkpoint, Formats(checkpoint))
    assert facts["problems"] == [] and facts["mtp_blocks"] == 3 and facts["blocks"] == V41.layers
    assert {"vision", "Engram table", "Engram", "MTP"} <= facts["parts"].keys() and "other" not in facts["parts"]
    assert facts["stored_formats"]["FP8 tiles 1x32"] == 1
