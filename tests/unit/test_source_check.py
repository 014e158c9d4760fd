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

from calibration.checkpoint.plan import Plan
from recipes.errors import SourceError
from tests.exported import plan_of, recipe
from tests.models import standard

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
