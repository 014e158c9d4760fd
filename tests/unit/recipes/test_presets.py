"""`preset` stands for what it writes out: the recipe that a run keeps says it in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.errors import RecipeError
from recipes.loader import dump_recipe, load_recipe, recipe_digest
from recipes.presets import PRESETS
from tests.unit.recipes.minimal import MODULES, write


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_out_in_full_and_loads_to_the_same_recipe(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(write(tmp_path, preset=name))
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    dumped = yaml.safe_load((tmp_path / "dumped.yaml").read_text())
    assert "preset" not in dumped
    assert dumped["modifiers"][:-1] == list(PRESETS[name].before)
    assert dumped["modifiers"][-1] == {PRESETS[name].modifier: MODULES | dict(PRESETS[name].arguments)}
    again = load_recipe(tmp_path / "dumped.yaml")
    assert recipe_digest(again) == recipe_digest(recipe)
    assert recipe_digest(recipe) != recipe_digest(load_recipe(write(tmp_path)))


def test_no_preset_changes_no_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert "preset" not in recipe.model_dump(mode="json") and "preset" not in dump_recipe(recipe)
    assert recipe.modifiers[0].arguments == MODULES


@pytest.mark.parametrize(
    ("modifier", "sections", "says"),
    [
        (MODULES, {"preset": "fastest"}, "preset: must be 'fast' or 'best', is \"fastest\""),
        (MODULES, {"preset": "fast", "method": "convert"}, "preset: fast needs method 'calibrate', has 'convert'; remove it"),
        (MODULES | {"weight_observer": "mse"}, {"preset": "fast"}, "sets weight_observer of QuantizationModifier; remove one"),
        (MODULES | {"observer": {"weights": "mse"}}, {"preset": "fast"}, "preset: fast sets observer of"),
        (MODULES, {"preset": "best", "modifiers": [{"GPTQModifier": MODULES}]}, "preset: best chooses the modifiers"),
    ],
    ids=range(5),
)  # fmt: skip
def test_a_recipe_that_says_otherwise_beside_its_preset_is_refused(
    tmp_path: Path, modifier: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, modifier, **sections))
    assert len(caught.value.problems) == 1 and says in caught.value.problems[0], caught.value.problems
