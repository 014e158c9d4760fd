"""Checks disks before the work: the space a run needs, and whether files can be written, fsynced and renamed there."""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.checkpoint.files import PARTIAL, free_inodes, fsync_directory
from recipes.errors import EnvironmentProblem

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Need:
    """Bytes and files that a run will write below `directory`, which may not exist yet; `what` names them in
    messages."""

    what: str
    directory: Path
    nbytes: int
    files: int = 1


def existing(directory: Path) -> Path:
    """The directory itself, or its nearest parent that exists."""
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    return directory


def space_problems(needs: Sequence[Need]) -> list[str]:
    """One message per file system whose free bytes or inodes are fewer than the sum of the needs on it."""
    together: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        together[existing(need.directory).stat().st_dev].append(need)
    problems = []
    for group in together.values():
        place, wanted = existing(group[0].directory), sum(need.nbytes for need in group)
        free = shutil.disk_usage(place).free
        if wanted > free:
            parts = " and ".join(f"{need.what} {need.nbytes:,}" for need in group if need.nbytes)
            problems.append(
                f"{place}: {free:,} bytes free, the run needs {wanted:,} ({parts}); free some space, or name another "
                "output or offload.directory"
            )
        files, inodes = sum(need.files for need in group), free_inodes(place)
        if inodes is not None and files > inodes:
            parts = " and ".join(f"{need.what} {need.files:,}" for need in group)
            problems.append(
                f"{place}: {inodes:,} inodes free, the run needs {files:,} ({parts}); remove files there, or name another output "
                "or offload.directory"
            )
    return problems


def probe_write(directory: Path, tag: str, nbytes: int) -> float:
    """Writes, fsyncs, renames and removes a file of `nbytes` in `directory` (or its nearest parent that exists);
    returns bytes per second. The file names end with `.partial`, so that a leftover of a kill is recognized as one, and
    contain `tag`, so that the next probe replaces it. Raises EnvironmentProblem that names the step that failed."""
    place = existing(directory)
    first, last = (place / f".{tag}.{step}{PARTIAL}" for step in ("rehearsal", "renamed"))
    chunk, step, began = os.urandom(min(_CHUNK, nbytes)), "written", time.monotonic()
    try:
        with first.open("wb", buffering=0) as file:
            for begin in range(0, nbytes, _CHUNK):
                file.write(chunk[: nbytes - begin])
            step = "made durable (fsync)"
            os.fsync(file.fileno())
        step = "renamed"
        first.replace(last)
        fsync_directory(place)
        seconds = time.monotonic() - began
        step = "removed"
        last.unlink()
    except OSError as error:
        for path in (first, last):
            path.unlink(missing_ok=True) if path.exists() else None
        raise EnvironmentProblem(
            f"{place}: a file of {nbytes:,} bytes cannot be {step} there: {error.strerror}; name another output or "
            "offload.directory"
        ) from None
    return nbytes / max(seconds, 1e-9)
