"""Checkpoints of vision models: the language model is quantized, what lies beside it is copied, names stay the source's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.families.registry import family_of, language_config, open_source
from calibration.model.skeleton import build_skeleton
from calibration.plan.quantization_config import output_config, targets
from recipes.errors import RecipeError, SourceError
from tests.exported import recipe, task_of
from tests.models import any_family, wrappers

#: How transformers 4.52 and later write these names, and how the hub's checkpoints of Gemma 3 have them.
NEWER = (
    (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every wrapper."""
    made = tmp_path_factory.mktemp("wrapped")
    return {family: any_family.write(made / family, family) for family in wrappers.WRAPPERS}


def rewritten(source: Path, target: Path, *patterns: tuple[str, str]) -> Path:
    """The checkpoint in one file, its tensors renamed."""
    target.mkdir()
    tensors: dict[str, Any] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    for pattern, replacement in patterns:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        if "index" not in path.name:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def made(source: Path, tmp_path: Path, *wanted: str) -> Any:
    return task_of(recipe(source, tmp_path / "out", list(wanted or ("Linear",)), calibration=None, method="convert"))


@pytest.mark.parametrize("family", wrappers.WRAPPERS)
def test_what_lies_beside_the_language_model_is_copied(sources: dict[str, Path], tmp_path: Path, family: str) -> None:
    task = made(sources[family], tmp_path)
    parts = {name: task.family.place(name).part for name in task.plan.steps}
    beside = {name for name, part in parts.items() if part in ("vision tower", "projector")}
    assert {name for name, part in parts.items() if part == "vision tower"} and beside == {
        name
        for name in parts
        if re.search(
            r"^(model\.)?(vis|multi_modal_projector|mm_projector|patch_merge_mlp|vit_large_projector|embed_vision)",
            name,
        )
    }
    assert all(task.plan.steps[name].action == "copy" for name in beside)
    # Gemma-4's router has a layer called proj.
    layers = {
        name for name, part in parts.items() if re.search(r"layers\.\d+\..*proj\.weight$", name) and part != "router"
    }
    blocks = layers - beside
    assert {step.source for step in task.plan.quantized.values()} >= blocks


@pytest.mark.parametrize("family", wrappers.WRAPPERS)
def test_the_language_model_alone_is_built_and_filled(sources: dict[str, Path], tmp_path: Path, family: str) -> None:
    source = open_source(sources[family])
    model = build_skeleton(Formats(source), tmp_path, False)
    grammar = family_of(source.config, names=source.tensors)
    beside = {name for name in source.tensors if grammar.place(name).part in ("vision tower", "projector")}
    assert len(model.blocks) == language_config(source.config)["num_hidden_layers"]
    assert set(model.sources.values()) == source.tensors.keys() - beside


def test_targets_name_the_language_model_in_vllm_and_no_tower(sources: dict[str, Path], tmp_path: Path) -> None:
    task = made(sources["gemma3"], tmp_path, r"re:.*language_model.*q_proj", r"re:.*language_model.*[kv]_proj")
    (target,) = targets(task.plan, *task.plan.groups)
    assert re.match(target[3:], "language_model.model.layers.0.self_attn.q_proj")
    assert not re.match(target[3:], "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")
    module = "language_model.model.layers.1.self_attn.q_proj"
    assert task.family.serving_names(module) == (module,)


def test_another_spelling_of_the_names_is_kept(sources: dict[str, Path], tmp_path: Path) -> None:
    older, newer = sources["gemma3"], rewritten(sources["gemma3"], tmp_path / "newer", *NEWER)
    one, other = made(older, tmp_path), made(newer, tmp_path)

    def respelled(name: str) -> str:
        for pattern, replacement in NEWER:
            name = re.sub(pattern, replacement, name)
        return name

    assert {respelled(name): step.action for name, step in one.plan.steps.items()} == {
        name: step.action for name, step in other.plan.steps.items()
    }
    module = "model.language_model.layers.0.mlp.up_proj"
    assert f"{module}.weight_packed" in other.plan.outputs
    assert other.family.serving_names(module) == ("language_model.model.layers.0.mlp.up_proj",)
    assert other.family.model_name(f"{module}.weight") == "model.layers.0.mlp.up_proj.weight"
    # The head is called otherwise as well; the blocks of both have the same names in vLLM.
    assert targets(one.plan, *one.plan.groups) == targets(other.plan, *other.plan.groups)


def test_a_tensor_of_no_known_part_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    strange = rewritten(
        sources["gemma3"], tmp_path / "strange", (r"\.vision_model\.post_layernorm", ".vision_model.adapter")
    )
    with pytest.raises(
        SourceError, match=r"unknown to the gemma3 model built from config.json: vision_tower\.vision_model\.adapter"
    ):
        made(strange, tmp_path)


def test_a_model_type_that_only_its_architecture_explains_is_derived(tmp_path: Path) -> None:
    source = any_family.write(tmp_path / "source", "kimi_k2", form="fp8_tiles", shards=3)
    task = made(source, tmp_path)
    assert task.family.place("model.layers.1.mlp.experts.7.up_proj.weight").part == "routed expert"
    assert {task.formats.of(step.source).kind for step in task.plan.quantized.values()} >= {"fp8_tiles"}
    assert build_skeleton(task.formats, tmp_path, False).model.config.model_type == "deepseek_v3"


@pytest.mark.parametrize("shards", [1, 3])
def test_int4_experts_that_the_language_model_s_config_declares_are_read(tmp_path: Path, shards: int) -> None:
    source = any_family.write(tmp_path / "source", "kimi_k25", form="int4", shards=shards)
    task = made(source, tmp_path, "part:routed expert")
    kinds = {task.formats.of(step.source).kind for step in task.plan.quantized.values()}
    assert kinds == {"int4"} and len(task.plan.quantized) == 24
    plain = any_family.write(tmp_path / "plain", "kimi_k25")
    name = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"
    read = task.formats.read(name.replace(".weight", ".weight_packed")).float()
    kept = Formats(Checkpoint.open(plain)).read(name).float()
    assert (read - kept).norm() / kept.norm() < 0.2


def test_a_tower_is_no_target(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none of them can be quantized"):
        made(sources["gemma3"], tmp_path, r"re:vision_tower.*fc1")


def test_a_quantization_that_the_language_model_s_config_declares_is_read_and_replaced(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = rewritten(sources["mistral3"], tmp_path / "nested")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="declares quant_method fp8, and no weight is stored so"):
        made(source, tmp_path)
    plan = made(sources["mistral3"], tmp_path).plan
    served = output_config(plan, config)
    assert "quantization_config" in served and "quantization_config" not in served["text_config"]
    assert Formats(Checkpoint.open(source))._tile == (64, 64)


def test_layers_that_transformers_joins_are_the_source_s_modules(sources: dict[str, Path], tmp_path: Path) -> None:
    source = Checkpoint.open(sources["minimax_m3_vl"])
    built = build_skeleton(Formats(source), tmp_path, False)
    mlp = "language_model.model.layers.0.mlp"
    leaves = ["gate_proj", "up_proj"]
    assert [built.source_module(f"model.layers.0.mlp.gate_up_proj.{leaf}") for leaf in leaves] == [
        f"{mlp}.{leaf}" for leaf in leaves
    ]
    experts = built.model.get_submodule("model.layers.1.mlp.experts")
    assert (experts.swiglu_alpha, experts.swiglu_limit) == (1.702, 7.0)  # its activation reads them
    loaded = AutoModelForImageTextToText.from_pretrained(sources["minimax_m3_vl"], dtype=torch.bfloat16)
    theirs = loaded.model.language_model.layers[0].mlp.gate_up_proj
    joined = built.model.get_submodule("model.layers.0.mlp.gate_up_proj")
    built.load([joined])
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    assert torch.equal(torch.cat([joined.gate_proj.weight, joined.up_proj.weight]), theirs.weight)
    assert (joined(x) - theirs(x)).abs().max() <= 2.0**-6 * theirs(x).abs().max()


def test_convolutions_that_transformers_joins_are_the_source_s_modules(tmp_path: Path) -> None:
    source = Checkpoint.open(any_family.write(tmp_path / "source", "olmo_hybrid"))
    built = build_skeleton(Formats(source), tmp_path, False)
    joined = built.model.get_submodule("model.layers.0.linear_attn.conv1d")
    built.load([joined])
    loaded = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.bfloat16)
    assert torch.equal(joined.weight, loaded.model.layers[0].linear_attn.conv1d.weight)
    assert built.source_module("model.layers.0.linear_attn.conv1d.k_conv1d") == "model.layers.0.linear_attn.k_conv1d"
