"""The rehearsal refuses prompts that the verify stage could not serve whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.errors import RecipeError
from recipes.schema import Recipe
from tests.exported import recipe, task_of
from tests.models import standard
from workflows.run.rehearse import _check_prompts


def run_with(source: Path, prompts: list[str]) -> Any:
    made = recipe(source, source.parent / "output", ["Linear"])
    serving = {"prompts": prompts, "max_model_len": 128, "max_tokens": 32}
    task = task_of(Recipe.model_validate(made.model_dump() | {"verify": {"serving": serving}}))
    return SimpleNamespace(recipe=task.recipe, source=task.source)


def test_a_prompt_is_counted_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "llama")
    run = run_with(source, ["word " * 200, "short"])
    with pytest.raises(RecipeError, match=r"prompt 1 has [\d,]+ tokens, and a context of 128 leaves 96") as refused:
        _check_prompts(run)
    assert len(refused.value.problems) == 1
    _check_prompts(run_with(source, ["short"]))


def test_without_a_tokenizer_a_word_is_a_token_as_in_the_engine(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "llama")
    for path in source.glob("tokenizer*"):
        path.unlink()
    _check_prompts(run_with(source, ["word " * 96]))
    with pytest.raises(RecipeError, match="prompt 1 has 97 tokens"):
        _check_prompts(run_with(source, ["word " * 97]))
