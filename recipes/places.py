"""Determines where a run writes, and ensures that this is apart from the source, whatever the spelling, links or
mounts."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def run_directory(output: Path) -> Path:
    """`<output>.run` beside the resolved output directory, so that all spellings of an output and links to it have the
    same run directory and lock. The path keeps its spelling if it contains no link."""
    place = output if output.name and _real(output) == Path(os.path.abspath(output)) else _real(output)
    return place.parent / f"{place.name}.run"


def own_scratch(directory: Path, output: Path) -> Path:
    """The subdirectory for the run of `output` in a scratch directory that many runs may share."""
    tag = hashlib.sha256(str(_real(output)).encode()).hexdigest()[:12]
    return directory.absolute() / f"{_real(output).name}-{tag}.activations"


def is_inside(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or below it, considering links, other spellings and bind mounts; neither must
    exist."""
    places = [_real(inner), *_real(inner).parents]
    if _real(outer) in places:
        return True
    with contextlib.suppress(OSError):
        wanted = os.stat(outer)
        return any(os.path.samestat(there, wanted) for there in _stats(places))
    return False


def source_conflict(place: Path, source: Path) -> str | None:
    """Why nothing may be written below `place`: it is, contains or is inside the checkpoint in `source`, or contains
    the target of a link in that. The end of a message that begins with the place; None if the two are apart."""
    if is_inside(place, source):
        how = (
            "is the source checkpoint's own directory"
            if is_inside(source, place)
            else "lies inside the source checkpoint"
        )
    elif is_inside(source, place):
        how = "holds the source checkpoint"
    elif held := next((path for path in _links(source) if is_inside(path, place)), None):
        how = f"holds {held}, which a link in the source checkpoint leads to"
    else:
        return None
    return f"{how} ({source}), which is read only; name another directory"


def place_problems(source: Path, output: Path, scratch: str | None) -> list[str]:
    """One problem for every place of a run that is not apart from its source, and for a scratch directory inside the
    output. `source` is the directory of the checkpoint, `scratch` the recipe's offload.directory."""
    places = {"output": output, "run directory": run_directory(output)}
    if scratch is not None:
        places["offload.directory"] = own_scratch(Path(scratch), output)
    conflicts = {what: (place, source_conflict(place, source)) for what, place in places.items()}
    problems = [f"{what}: {place} {why}" for what, (place, why) in conflicts.items() if why is not None]
    if scratch is not None and is_inside(Path(scratch), output):
        problems.append(f"offload.directory: {scratch} lies inside the output {output}; name another directory")
    return problems


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _links(source: Path) -> Iterator[Path]:
    """Yields the targets of the links in a checkpoint's directory."""
    with contextlib.suppress(OSError), os.scandir(source) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(os.path.realpath(entry.path))


def _stats(places: Iterable[Path]) -> Iterator[os.stat_result]:
    for place in places:
        with contextlib.suppress(OSError):
            yield os.stat(place)
