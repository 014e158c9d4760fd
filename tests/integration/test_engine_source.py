"""The empty model and its source: every tensor has its place, and what comes into memory is what the source holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from safetensors.torch import load_file, save_file

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.data.batches import embedding_rows
from calibration.engine.experts import ExpertCalibration
from calibration.engine.stacked_experts import Stack
from calibration.model.skeleton import build_skeleton
from calibration.model.source_model import SourceModel
from recipes.errors import SourceError
from tests.integration.engine_runs import (
    STANDARD,
    STORED,
    differing,
    even_products,
    model_directory,
    ours,
    recipe,
    require_equal_but_for_rounding,
    skeleton,
    stock_model,
)


@pytest.mark.parametrize("name", [*STANDARD, *STORED])
def test_loaded_model_equals_transformers_own_load(name: str) -> None:
    """Every parameter and buffer, computed ones included, in value and dtype."""
    source = skeleton(name)
    source.load([source.model])
    own, mine = stock_model(name), dict(source.model.named_parameters()) | dict(source.model.named_buffers())
    theirs = dict(own.named_parameters(remove_duplicate=False)) | dict(own.named_buffers())
    assert mine.keys() <= theirs.keys()
    assert theirs.keys() - mine.keys() <= {"lm_head.weight"}
    for key, value in mine.items():
        assert (value.dtype, value.shape) == (theirs[key].dtype, theirs[key].shape), key
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", [*STANDARD, *STORED])
def test_an_empty_model_is_as_llm_compressor_would_make_it(name: str) -> None:
    """In eval mode and without experts of three dimensions: the engine does not let it look for either."""
    source = skeleton(name)
    assert get_non_linearized_moes(source.model) == []
    assert not any(module.training for module in source.model.modules())
    modules = source.modules_of(source.model_modules())
    assert modules == {name: source.model.get_submodule(own) for name, own in source.model_modules().items()}
    assert source.modules_of(["nowhere"]) == {}


def test_only_what_is_asked_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = skeleton("fp8_mxfp4"), list[str]()
    original = source.formats.checkpoint.read
    monkeypatch.setattr(
        source.formats.checkpoint, "read", lambda name, out=None: read.append(name) or original(name, out)
    )
    block = source.blocks["model.layers.1"]
    source.load([block])
    assert {name.split(".")[1] for name in read} == {"1"}
    assert len(read) == len(set(read))
    assert source.source_block("model.layers.1") == "layers.1"
    source.unload([block])
    assert source.loaded() == set()


def test_parameters_that_the_source_does_not_know_become_nan() -> None:
    source = skeleton("llama")
    block = source.blocks["model.layers.0"]
    block.register_parameter("weight_scale", torch.nn.Parameter(torch.empty(3, device="meta"), requires_grad=False))
    source.load([block])
    assert block.weight_scale.isnan().all()


def test_edited_names_only_what_was_written_to() -> None:
    source = skeleton("llama")
    block = source.blocks["model.layers.0"]
    source.load([block])
    assert source.edited([block]) == {}
    with torch.no_grad():
        block.input_layernorm.weight.mul_(2)
    assert list(source.edited([block])) == ["model.layers.0.input_layernorm.weight"]


def changed(directory: Path, name: str, config: dict[str, Any], drop: str = "", add: str = "") -> Checkpoint:
    """A copy of a tiny model with other config entries, one tensor less, one more."""
    shutil.copytree(model_directory(name), directory)
    tensors: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors.pop(drop, None)
    if add:
        tensors[add] = torch.zeros(1)
    save_file(tensors, directory / "model.safetensors")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Checkpoint.open(directory)


def test_all_mismatches_are_told_at_once(tmp_path: Path) -> None:
    checkpoint = changed(
        tmp_path / "model",
        "llama",
        {"hidden_size": 64, "num_hidden_layers": 3},
        drop="model.layers.0.mlp.up_proj.weight",
        add="model.layers.0.mlp.unknown.weight",
    )
    with pytest.raises(SourceError) as caught:
        build_skeleton(Formats(checkpoint), tmp_path / "run", False)
    message = str(caught.value)
    assert "model.layers.0.mlp.up_proj.weight" in message
    assert "have no source tensor" in message and "model.layers.2." in message
    assert "1 source tensors have no place in LlamaForCausalLM: model.layers.0.mlp.unknown.weight" in message
    assert "model.embed_tokens.weight" in message and "[1024, 64]" in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token_id": 1024}, "pad_token_id: 1024 has no row in an embedding of vocab_size 1024"),
        ({"pad_token_id": -1025}, "pad_token_id: -1025 has no row"),
        ({"hidden_act": "no_such"}, r"config\.json: transformers cannot build the model: KeyError: .*no_such"),
        ({"rope_parameters": 5}, r"config\.json: transformers cannot build the model: "),
        ({"num_attention_heads": 0}, r"config\.json: transformers cannot build the model: ZeroDivisionError"),
    ],
)
def test_a_config_that_transformers_cannot_build_is_one_message(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = changed(tmp_path / "llama", "llama", config)
    with pytest.raises(SourceError, match=message) as raised:
        build_skeleton(Formats(checkpoint), tmp_path / "run", False)
    assert len(raised.value.problems) == 1


def test_the_rows_of_the_embedding_come_from_config_and_header(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path / "llama", "llama", {"vocab_size": 900})
    assert embedding_rows(checkpoint) == {
        "vocab_size in config.json": 900,
        "model.embed_tokens.weight in model.safetensors": 1024,
    }


def test_mtp_and_scale_companions_need_no_place(tmp_path: Path) -> None:
    source = skeleton("fp8_mxfp4")
    tensors = source.formats.checkpoint.tensors
    assert any(name.startswith("mtp.") for name in tensors)
    used = set(source.sources.values())
    assert {name for name in tensors if not name.startswith("mtp.")} - used == {
        name for name in source.formats.companions if not name.startswith("mtp.")
    }


def test_config_on_disk_has_no_quantization(tmp_path: Path) -> None:
    source = skeleton("fp8")
    config = json.loads((Path(source.model.config.name_or_path) / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == "deepseek_v4"


def test_prefetched_weights_are_the_same_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = skeleton("fp8_mxfp4"), list[str]()
    first, second = list(source.blocks.values())[:2]
    original = source.formats.checkpoint.read
    monkeypatch.setattr(
        source.formats.checkpoint, "read", lambda name, out=None: read.append(name) or original(name, out)
    )
    source.load([first])
    source.prefetch([second])
    source.load([second])
    assert len(read) == len(set(read)) and {name.split(".")[1] for name in read} == {"0", "1"}
    ahead = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    assert source.edited([second]) == {}
    source.unload([second])
    source.load([second])
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in ahead.items())


def test_what_cannot_be_prefetched_is_reported_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = skeleton("llama")
    first, second = source.blocks.values()
    original = source.formats.checkpoint.read

    def broken(name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            raise SourceError(f"{name}: vanished")
        return original(name, out)

    monkeypatch.setattr(source.formats.checkpoint, "read", broken)
    source.prefetch([second])
    source.load([first])
    source.prefetch([second])
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight: vanished"):
        source.load([second])


def test_a_run_that_prefetches_gives_the_same_scales() -> None:
    plain, ahead = skeleton("mixtral"), skeleton("mixtral")
    ahead.prefetches = True
    one, two = ours(recipe("mixtral"), plain), ours(recipe("mixtral"), ahead)
    assert differing(one.parameters, two.parameters) == [] and ahead.loaded() == set()


@pytest.mark.parametrize(
    ("name", "ahead"), [("mixtral", False), ("qwen3_moe", True), ("bf16", False), ("fp8_mxfp4", True)]
)
def test_a_run_that_computes_all_experts_at_once_gives_the_same_scales(
    name: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator; on the CPU the products have the same bits where they do not depend on the number of rows."""
    one, used = ours(recipe(name), skeleton(name)), list[int]()
    all_tokens = Stack.all_tokens
    monkeypatch.setattr(ExpertCalibration, "stacked", True)
    monkeypatch.setattr(Stack, "all_tokens", lambda *given: used.append(1) or all_tokens(*given))
    source = skeleton(name)
    source.prefetches = ahead
    two = ours(recipe(name), source)
    if even_products(one):
        assert differing(one.parameters, two.parameters) == []
        assert [r.tokens_per_expert for r in one.results] == [r.tokens_per_expert for r in two.results]
    else:
        require_equal_but_for_rounding(one, two, {result.block for result in one.results})
        assert all(name.endswith(".input_global_scale") for name in differing(one.parameters, two.parameters))
    assert len(used) >= 3 * len(source.blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3_moe", "fp8_mxfp4"])
def test_a_run_on_the_gpu_agrees_with_the_cpu(name: str) -> None:
    """Twice the same bits; weight scales those of the CPU, input scales within a rounding of its products."""
    gpu = [ours(recipe(name), _skeleton_on(name, torch.device("cuda"))).scales for _ in range(2)]
    assert differing(*gpu) == []
    on_host = {key: value.cpu() for key, value in gpu[0].items()}
    wanted = ours(recipe(name), _skeleton_on(name, torch.device("cpu"))).scales
    assert all(key.endswith("input_global_scale") for key in differing(on_host, wanted))
    for key, value in wanted.items():
        torch.testing.assert_close(on_host[key].float(), value.float(), rtol=2**-5, atol=0)


def _skeleton_on(name: str, device: torch.device) -> SourceModel:
    source = skeleton(name)
    return build_skeleton(source.formats, Path(source.model.config.name_or_path).parent, False, device)
