"""A source whose tensors are not what its config.json promises is refused by name, whatever the method."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.plan.plan import Plan
from recipes.errors import SourceError
from tests.exported import plan_of, recipe
from tests.models import standard, stored_forms
from workflows.inspect_checkpoint import main as inspect

Tensors = dict[str, torch.Tensor]
METHODS: dict[str, dict[str, Any]] = {
    "calibrate": {},
    "convert": {"method": "convert", "calibration": None},
    "plain": {"method": "plain", "calibration": None, "modifiers": []},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standard.write(tmp_path_factory.mktemp("source") / "llama", "llama", shards=1)


def edited(source: Path, copy: Path, edit: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a source in one shard with the tensors that `edit` makes of its own, and these fields in its config."""
    copy.mkdir()
    tensors = {k: v.contiguous().clone() for k, v in edit(load_file(source / "model.safetensors")).items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((source / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(written))
    return copy


def planned(source: Path, method: str, targets: Any = "Linear") -> Plan:
    return plan_of(source, recipe(source, Path("/nowhere/out"), targets, **METHODS[method]))[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("spelled", "found", "right"),
    [
        (lambda name: f"module.{name}", "'module.'", "''"),
        (lambda name: name.replace("model.", "model.language_model.", 1), "'model.language_model.'", "'model.'"),
        (lambda name: name.removeprefix("model."), "''", "'model.'"),
    ],
    ids=["module", "language_model", "none"],
)
def test_a_foreign_prefix_is_named_with_the_right_one(
    llama: Path, tmp_path: Path, method: str, spelled: Callable[[str], str], found: str, right: str
) -> None:
    source = edited(llama, tmp_path / "source", lambda t: {spelled(name): value for name, value in t.items()})
    with pytest.raises(SourceError) as caught:
        planned(source, method)
    text = str(caught.value)
    assert "tensors are unknown to the llama model built from config.json" in text
    assert f"their prefix is likely {found} and should be {right}" in text
    assert len(caught.value.problems) == 2, "unknown and absent ones, nothing of the recipe"


@pytest.mark.parametrize("method", METHODS)
def test_one_unknown_tensor_is_no_target_and_no_passenger(llama: Path, tmp_path: Path, method: str) -> None:
    stray = {"model.layers.0.mlp.gate_projj.weight": torch.ones(256, 128, dtype=torch.bfloat16)}
    source = edited(llama, tmp_path / "source", lambda t: t | stray)
    with pytest.raises(SourceError, match=r"1 tensors are unknown .*gate_projj\.weight.*rename or remove"):
        planned(source, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_config_of_another_size_is_told_from_headers(llama: Path, tmp_path: Path, method: str) -> None:
    same: Callable[[Tensors], Tensors] = dict
    wider = edited(llama, tmp_path / "wider", same, hidden_size=256)
    with pytest.raises(
        SourceError, match=r"stored shape \[128\], the llama model built from config\.json needs \[256\]"
    ):
        planned(wider, method)
    deeper = edited(llama, tmp_path / "deeper", same, num_hidden_layers=3)
    with pytest.raises(SourceError, match=r"9 tensors of the llama model .* have no source tensor: model\.layers\.2\."):
        planned(deeper, method)
    shallower = edited(llama, tmp_path / "shallower", same, num_hidden_layers=1)
    with pytest.raises(SourceError, match=r"9 tensors are unknown to the llama model"):
        planned(shallower, method)
    without = edited(llama, tmp_path / "without", same, hidden_size=None)
    with pytest.raises(SourceError, match=r"config\.json: hidden_size is None"):
        planned(without, method)


@pytest.mark.parametrize("method", METHODS)
def test_integers_in_the_place_of_a_weight_are_refused(llama: Path, tmp_path: Path, method: str) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        name = "model.layers.1.mlp.down_proj.weight"
        return tensors | {name: torch.ones(tensors[name].shape, dtype=torch.int32)}

    source = edited(llama, tmp_path / "source", spoil)
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.down_proj\.weight: I32 integers"):
        planned(source, method)


@pytest.mark.parametrize("method", METHODS)
def test_rotary_tables_are_left_out_and_cache_scales_carried(llama: Path, tmp_path: Path, method: str) -> None:
    tables = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(16) for n in (0, 1)}
    names = ("k_scale", "v_scale", "kv_scale", "k_proj.k_scale", "v_proj.v_scale", "q_scale", "k_zero_point")
    scales = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in names}
    source = edited(llama, tmp_path / "source", lambda t: t | tables | scales)
    plan = planned(source, method)
    assert not any("inv_freq" in name for name in plan.outputs)
    assert "2 rotary tables of the source are left out: every loader computes them" in plan.warnings
    for name in scales:
        assert plan.steps[name].action == "copy" and plan.outputs[name].shape == (1,)
    assert not any(re.search("_scale$", name) for name in plan.quantized)


def gptq(weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    return {"qweight": torch.zeros(columns // 8, rows).int(), "qzeros": torch.zeros(1, rows // 8).int(),
            "scales": torch.ones(1, rows).half(), "g_idx": torch.zeros(columns).int()}  # fmt: skip


def awq(weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    return {"qweight": torch.zeros(columns, rows // 8).int(), "qzeros": torch.zeros(1, rows // 8).int(),
            "scales": torch.ones(1, rows).half()}  # fmt: skip


#: A format, what stands for a weight by suffix, and the word of its name.
FOREIGN: dict[str, Callable[[torch.Tensor], Tensors]] = {
    "GPTQ": gptq,
    "AWQ": awq,
    "bitsandbytes": lambda w: {
        "weight": torch.zeros(w.numel() // 2, 1).byte(), "weight.absmax": torch.ones(w.numel() // 64),
        "weight.quant_map": torch.ones(16), "weight.quant_state.bitsandbytes__nf4": torch.zeros(9).byte()},
    "INT8": lambda w: {"weight": torch.zeros(w.shape).char(), "weight_scale": torch.ones(w.shape[0], 1)},
    "EETQ": lambda w: {"weight": torch.zeros(w.T.shape).char(), "weight_scales": torch.ones(w.shape[0]).half()},
    "HQQ": lambda w: {"W_q": torch.zeros(w.shape).byte(), "scale": torch.ones(1), "zero": torch.ones(1)},
    "quanto": lambda w: {"weight._data": torch.zeros(w.shape).char(), "weight._scale": torch.ones(w.shape[0], 1)},
    "AQLM": lambda w: {"codes": torch.zeros(8, 8).char(), "codebooks": torch.ones(1), "scales": torch.ones(8)},
    "sparse-bitmask": lambda w: {"compressed": torch.ones(7), "bitmask": torch.ones(3).byte(), "shape": torch.ones(2)},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FOREIGN)
def test_formats_that_are_not_undone_are_refused_by_their_names(
    llama: Path, tmp_path: Path, method: str, form: str
) -> None:
    def store(tensors: Tensors) -> Tensors:
        name = "model.layers.0.mlp.down_proj.weight"
        made = {name.removesuffix("weight") + suffix: part for suffix, part in FOREIGN[form](tensors[name]).items()}
        return {n: t for n, t in tensors.items() if n != name} | made

    source = edited(llama, tmp_path / "source", store, quantization_config={"quant_method": form.lower()})
    with pytest.raises(
        SourceError, match=rf"stored as {form}.*which this project cannot dequantize; start from the original"
    ):
        planned(source, method)


DECLARED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not supported"),
    "no method": ({"bits": 4}, "quant_method None is not supported"),
    "unknown format": (
        {"quant_method": "compressed-tensors", "format": "marlin-24"}, "format 'marlin-24' is not supported"),
    "not borne out": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "declares quant_method fp8, and no weight"),
    "another format": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format pack-quantized, and no weight is stored so"),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", DECLARED)
def test_a_declaration_that_the_tensors_do_not_bear_out_is_refused(
    llama: Path, tmp_path: Path, method: str, case: str
) -> None:
    declared, message = DECLARED[case]
    source = edited(llama, tmp_path / "source", dict, quantization_config=declared)
    with pytest.raises(SourceError, match=message):
        planned(source, method)


def test_modelopts_own_file_declares_too(llama: Path, tmp_path: Path) -> None:
    source = edited(llama, tmp_path / "source", dict)
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(SourceError, match=r"hf_quant_config\.json: declares quant_method modelopt, and no weight"):
        planned(source, "plain")
    stored = stored_forms.write(tmp_path / "stored", "llama", "fp8_modelopt")
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    (stored / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert planned(stored, "plain").outputs["model.layers.0.mlp.up_proj.weight"].dtype == "BF16"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_git_lfs_pointers_are_told_with_their_remedy(llama: Path, tmp_path: Path, name: str) -> None:
    source = edited(llama, tmp_path / "source", dict)
    (source / "small.json").write_text("{}")
    (source / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n")
    with pytest.raises(SourceError, match=rf"1 files are git-lfs pointers.*\({name}\): run `git lfs pull`"):
        planned(source, "plain")


def test_inspect_shows_a_source_and_what_its_config_contradicts(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect([str(llama)]) == 0
    assert not capsys.readouterr().err
    source = edited(llama, tmp_path / "source", lambda t: {f"module.{name}": value for name, value in t.items()})
    assert inspect([str(source)]) == 3
    shown = capsys.readouterr()
    assert "module.model.layers.N.mlp.up_proj.weight" in shown.out and "error: " in shown.err
    assert "their prefix is likely 'module.'" in shown.err and "Traceback" not in shown.err
    assert inspect([str(source), "--json"]) == 3
    assert len(json.loads(capsys.readouterr().out)["checkpoint"]["problems"]) == 2
