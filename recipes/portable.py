"""A recipe as others may see it: names instead of the paths of one machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from recipes.schema import Recipe, Source

#: owner/name, as huggingface_hub's validate_repo_id reads it.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: A snapshot in the hub's cache.
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")


def hub_id(source: Source) -> str | None:
    """The hub id of a source: the recipe's own, or that of the hub's cache that it points into; None for another directory."""
    if cached := _SNAPSHOT.search(source.checkpoint):
        return f"{cached[1]}/{cached[2]}"
    named = _HUB_ID.fullmatch(source.checkpoint) is not None
    return source.checkpoint if named and not os.path.isdir(source.checkpoint) else None


def hub_dataset(name: str) -> str | None:
    """`name` if it is a data set of the hub, None for the bundled text and for local files."""
    return name if _HUB_ID.fullmatch(name) and not os.path.exists(os.path.expanduser(name)) else None


def revision(source: Source) -> str | None:
    """The revision of a source: the recipe's own, or the commit of the hub's cache that it points into."""
    cached = _SNAPSHOT.search(source.checkpoint)
    return source.revision or (cached[3] if cached else None)


def source_name(source: Source) -> str:
    """The hub id of a source, or the last name of its path."""
    return hub_id(source) or _last(source.checkpoint)


def portable_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON types, loadable, with the last names of paths and without what does not touch the output's bytes: where
    activations lie, what is checked."""
    body: dict[str, Any] = recipe.model_dump(mode="json", exclude={"verify", "offload"})
    body["source"] |= {"checkpoint": source_name(recipe.source), "revision": revision(recipe.source)}
    body["output"] = _last(recipe.output)
    calibration = body.get("calibration")
    if calibration and (os.path.isabs(calibration["dataset"]) or os.path.exists(calibration["dataset"])):
        calibration["dataset"] = _last(calibration["dataset"])
    return body


def _last(path: str) -> str:
    return Path(os.path.abspath(path)).name
