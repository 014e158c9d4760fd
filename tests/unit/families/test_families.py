"""Families: each stands in calibration/families alone, and promises what its checkpoints on the hub hold."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from calibration.families.registry import ENCODINGS, FAMILIES, expected_tensors, family_of
from recipes.errors import SourceError
from recipes.schema import Calibration
from tests.models import standard

ROOT = Path(__file__).parents[3]
MODEL_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]


def test_every_model_type_is_of_one_family_and_has_a_tiny_model() -> None:
    assert sorted(MODEL_TYPES) == sorted({*get_args(standard.Family), "deepseek_v4", "deepseek_v41"})


@pytest.mark.parametrize("family", get_args(standard.Family))
def test_a_config_promises_the_tensors_of_its_hub_checkpoint(family: standard.Family) -> None:
    config = standard.config(family)
    promised, problems = expected_tensors(config)
    assert problems == []
    held = {spec.name: spec.shape for spec in standard.specs(family)}
    assert {name: want.shape for name, want in promised.items() if name in held or not want.optional} == held


@pytest.mark.parametrize("model_type", ["gpt9", "Llama", "", None])
def test_a_model_type_of_no_family_raises_by_name(model_type: str | None) -> None:
    for ask in (family_of, expected_tensors):
        with pytest.raises(SourceError, match=f"model_type {model_type!r} has no grammar here"):
            ask({"model_type": model_type})


def test_no_other_folder_compares_with_a_family_s_name() -> None:
    named = []
    for folder in ("calibration", "verify", "workflows"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.parent.name not in ("families", "inside_vllm"):  # the latter runs in vLLM's interpreter, alone
                for node in ast.walk(ast.parse(file.read_text())):
                    if isinstance(node, ast.Constant) and node.value in MODEL_TYPES:
                        named.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.value}")
    assert named == []


def test_a_recipe_can_name_the_chat_encoding_of_every_family() -> None:
    chat = get_args(Calibration.model_fields["chat"].annotation)
    assert sorted(chat) == sorted({"auto", "template", *(encoding.name for encoding in ENCODINGS)})


def test_mtp_blocks_that_follow_the_others_are_told_from_them_by_the_config() -> None:
    config = standard.config("glm4_moe")
    family, without = family_of(config), family_of(config | {"num_nextn_predict_layers": 0})
    names = ["model.layers.2.eh_proj.weight", "model.layers.3.eh_proj.weight", "model.layers.30.eh_proj.weight"]
    assert [family.place(name).mtp for name in names] == [False, True, False]
    assert family.place(names[1]).block is None and family.model_name(names[1]) is None
    assert family.mtp_blocks(names) == {"3"}
    assert [without.place(name).block for name in names] == [2, 3, 30]
    optional = {name for name, want in expected_tensors(config)[0].items() if want.optional}
    assert optional == {
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
    }  # not in GLM-4.6


def test_places_are_found_once_and_no_more_are_kept_than_a_large_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(expected_tensors(standard.config("glm4_moe"))[0])
    family = replace(family_of(standard.config("glm4_moe")))  # what others have asked for is not in a copy
    found = [family.place(name) for name in names]
    assert all(family.place(name) is place for name, place in zip(names, found, strict=True))
    monkeypatch.setattr("calibration.families.family.MOST_PLACES", 10)
    bounded = replace(family)
    assert [bounded.place(name) for name in names] == found
    assert len(bounded._places) <= 10 < len(names)


def test_mtp_blocks_are_counted_by_the_numbers_in_their_names() -> None:
    family = family_of({"model_type": "deepseek_v4"})
    names = ["layers.0.attn.wkv.weight", "mtp.0.norm.weight", "mtp.1.norm.weight", "mtp.1.ffn.gate.weight", "mtp.note"]
    assert family.mtp_blocks(names) == {"0", "1"}
    assert [family.place(name).mtp for name in names] == [False, True, True, True, True]
    assert family_of({"model_type": "llama"}).mtp_blocks(names) == set()
