"""Finds a recipe's source on this machine: a local directory, or a hub snapshot, which is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from recipes.errors import RecipeError, SourceError
from recipes.places import place_problems
from recipes.schema import Recipe, Source

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def require_apart(recipe: Recipe, source: Path) -> None:
    """Raises RecipeError if the run would write into its source. `source` is the result of `resolve_source`, which the
    recipe's own validation does not know for a hub id."""
    problems = place_problems(source, Path(recipe.output), recipe.offload.directory)
    if problems:
        raise RecipeError(problems)


def resolve_source(source: Source) -> Path:
    """The local directory of `source.checkpoint`; a hub id is downloaded at `source.revision` through huggingface_hub
    (its cache, offline mode and token apply). Raises SourceError if there is neither."""
    path = Path(source.checkpoint)
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(source.checkpoint) or source.checkpoint.startswith("."):
        raise SourceError(f"source.checkpoint: {path}: no such directory, and not a hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.checkpoint, revision=source.revision))
    except Exception as error:  # huggingface_hub, its HTTP client and the file system raise different types
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"source.checkpoint: {source.checkpoint}: no such directory, and the hub snapshot "
            f"(revision {source.revision or 'main'}) cannot be downloaded: {first}; check the name, the network and the token, "
            "or download it and name the directory"
        ) from None
