"""The section `budget`: what contradicts it is refused by the loader, and without it nothing of a recipe changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.errors import RecipeError
from recipes.loader import dump_recipe, load_recipe, recipe_digest
from tests.unit.recipes.minimal import MODULES, write


def test_a_recipe_with_a_budget_is_written_and_read_and_without_one_is_as_before(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, budget={"bits_per_parameter": 5, "candidates": ["nvfp4", "BFLOAT16"]}))
    assert recipe.budget is not None and recipe.budget.candidates == ["NVFP4", "bfloat16"]
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dumped.yaml") == recipe
    assert "budget" not in load_recipe(write(tmp_path)).model_dump(mode="json")
    assert recipe_digest(recipe) != recipe_digest(load_recipe(write(tmp_path)))


WRITTEN_OUT = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "sections", "says"),
    [
        ({}, {}, "budget.bits_per_parameter: is required and missing"),
        ({"bits_per_parameter": 0}, {}, "budget.bits_per_parameter: must be more than 0"),
        ({"bits_per_parameter": 5, "candidates": ["NVFP4", "INT4"]}, {}, 'budget.candidates.1: "INT4" is no scheme that can be'),
        ({"bits_per_parameter": 5, "candidates": ["NVFP4"]}, {}, "budget.candidates: must have at least 2 entr"),
        ({"bits_per_parameter": 5, "candidates": ["NVFP4", "nvfp4"]}, {}, "budget.candidates: name NVFP4 twice"),
        ({"bits_per_parameter": 5, "candidates": ["FP8_BLOCK", "bfloat16"]}, {}, "NVFP4 of group_0 is none of them"),
        ({"bits_per_parameter": 5}, {"method": "convert"}, "and method 'convert' has none"),
        ({"bits_per_parameter": 5}, {"export": {"dialect": "nvidia"}}, "FP8_BLOCK beside NVFP4 has no form in export.dialect"),
        ({"bits_per_parameter": 5}, {"modifier": {"config_groups": {"a": {"targets": ["re:.*"], "weights": WRITTEN_OUT}}}},
         "a has its arguments written out; give it a scheme"),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_contradicts_a_budget_is_refused(
    tmp_path: Path, budget: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    modifier = sections.pop("modifier", MODULES)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, modifier, budget=budget, **sections))
    assert says in str(caught.value)
