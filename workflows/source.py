"""Finds a recipe's source on this machine: a local directory, or a hub snapshot, which is downloaded."""

from __future__ import annotations

from pathlib import Path

from calibration.checkpoint.hub import snapshot
from recipes.errors import RecipeError
from recipes.places import place_problems
from recipes.schema import Recipe, Source


def require_apart(recipe: Recipe, source: Path) -> None:
    """Raises RecipeError if the run would write into its source. `source` is the result of `resolve_source`, which the
    recipe's own validation does not know for a hub id."""
    problems = place_problems(source, Path(recipe.output), recipe.offload.directory)
    if problems:
        raise RecipeError(problems)


def resolve_source(source: Source) -> Path:
    """The local directory of `source.checkpoint`; a hub id is downloaded at `source.revision` through huggingface_hub
    (its cache, offline mode and token apply). Raises SourceError if there is neither."""
    return snapshot(source.checkpoint, source.revision, "source.checkpoint")
