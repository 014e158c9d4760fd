"""Removes from an output what an earlier run of this project wrote there, and the shards of a checkpoint that
--overwrite replaces. Nothing else, nothing outside; a link is removed, not followed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import PARTIAL, is_file, read_json_object
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from calibration.runs.journal import RunDirectory
from recipes.errors import EnvironmentProblem, SourceError

#: Journal facts that begin a run: from then on the run owns the output. `replaced`: earlier contents are being removed.
BEGUN = frozenset({"fingerprint", "started", "replaced"})


def start_over(directory: RunDirectory, output: Path, fact: str, /, **facts: Any) -> None:
    """Discards the run in `directory`, removes its files and the checkpoint in `output`, and begins a journal with
    `fact`. The fact lists the files before they are removed, so that a kill in between leaves no file without an
    owner."""
    names = sorted(_written(directory) | set(_shards(output)))
    directory.restart(fact, removes=names, **facts)
    # The index is removed first: a directory that is being emptied must not look like a checkpoint.
    for path in (output / INDEX_NAME, *(found for name in names if (found := _below(output, name)) is not None)):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise EnvironmentProblem(
                f"{path}: cannot be removed: {error.strerror}; remove it, or name another output"
            ) from None


def entries(output: Path) -> list[str]:
    """The names in an output, sorted; none if it does not exist. Raises EnvironmentProblem if it cannot be read."""
    try:
        return sorted(os.listdir(output))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if not output.exists():  # a parent directory is a file: whatever writes there reports it
            return []
        raise EnvironmentProblem(f"{output}: output exists and is no directory; name another output") from None
    except OSError as error:
        raise EnvironmentProblem(f"{output}: cannot be read: {error.strerror}; name another output") from None


def remove_unfinished(output: Path) -> None:
    """Removes the partial shards that a kill left; `export` writes every other partial file again."""
    for path in output.glob(f"*.safetensors{PARTIAL}"):
        if path.is_symlink() or path.is_file():
            path.unlink()


def overwrite_problems(directory: RunDirectory, output: Path) -> list[str]:
    """Why --overwrite may not replace what is in `output`: it is neither a checkpoint nor the work of a run, or shards
    would remain that a loader could mistake for the new ones."""
    try:
        names = entries(output)
    except EnvironmentProblem as problem:
        return problem.problems
    checkpoint = CONFIG_NAME in names and bool({INDEX_NAME, SINGLE_NAME} & set(names))
    if names and not checkpoint and not directory.facts():
        return [
            f"{output}: holds files (first: {min(names)}) and neither a checkpoint nor a run of this project: --overwrite "
            "replaces nothing else; name another output, or an empty directory"
        ]
    return _strays(directory, output)


def _strays(directory: RunDirectory, output: Path) -> list[str]:
    known = _written(directory) | set(_shards(output))
    strays = sorted(path.name for path in output.glob("*.safetensors") if path.name not in known)
    if not strays:
        return []
    return [
        f"{output}: {len(strays)} safetensors files there are in no index and in no journal (first: {strays[0]}): "
        "--overwrite does not remove them, and they would remain in the output; move them away, or name another output"
    ]


def _written(directory: RunDirectory) -> set[str]:
    """The files, relative to the output, that this run and earlier ones wrote there, according to the journal."""
    names: set[str] = set()
    for fact in directory.facts():
        for listed in (fact.get("shards"), fact.get("files"), fact.get("removes")):
            if isinstance(listed, dict | list):
                names |= {name for name in listed if isinstance(name, str)}
    return names


def _shards(output: Path) -> list[str]:
    """The shards that the index in `output` names, or the only shard of a checkpoint without an index."""
    if not is_file(output / INDEX_NAME):
        return [SINGLE_NAME] if is_file(output / SINGLE_NAME) else []
    try:
        weight_map = read_json_object(output / INDEX_NAME).get("weight_map")
    except SourceError:
        return []
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    return [
        name for name in dict.fromkeys(map(str, shards)) if name == Path(name).name and name.endswith(".safetensors")
    ]


def _below(output: Path, name: str) -> Path | None:
    """The file or link `name` (from a journal or an index) if it exists inside `output`, not reached through a link;
    else None."""
    path = output / name
    inside = os.path.realpath(path.parent) == os.path.join(os.path.realpath(output), *Path(name).parts[:-1])
    if ".." in Path(name).parts or Path(name).is_absolute() or "\0" in name or not inside:
        return None
    return path if path.is_symlink() or path.is_file() else None
