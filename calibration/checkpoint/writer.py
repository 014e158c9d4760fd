"""Writing output files so that a kill or a full disk never leaves a broken one under its final name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from calibration.checkpoint.header import fsync_directory
from recipes.errors import EnvironmentProblem

PARTIAL = ".partial"
#: safetensors writes to a temporary file of its own beside the target, readable by its owner alone, and renames it.
_SAFETENSORS_TEMPORARY = ".tmp??????"
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Writes one safetensors shard and returns its sha256 (hex). Raises EnvironmentProblem when it cannot."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(partial: Path) -> None:
        save_file(contiguous, partial, metadata={"format": "pt"})
        partial.chmod(0o666 & ~_UMASK)

    write_safely(path, save, nbytes)
    return file_digest(path)


def remove_unfinished(directory: Path) -> None:
    """Removes what a kill left of half-written files in `directory` itself: our own and those of safetensors."""
    for pattern in ("*" + PARTIAL, _SAFETENSORS_TEMPORARY):
        for path in directory.glob(pattern):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8)."""
    write_safely(path, lambda partial: partial.write_bytes(text.encode()), len(text))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as transformers writes a config: two spaces, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safely(path: Path, write: Callable[[Path], object], nbytes: int) -> None:
    """Calls `write` with `<path>.partial`, fsyncs it and renames it to `path`.

    Raises EnvironmentProblem naming the file, the bytes wanted and the bytes free; the partial file is removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # safetensors wraps the operating system's error into its own type and keeps only the text.
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full and not isinstance(error, OSError) and "Error while serializing" not in str(error):
            raise
        raise EnvironmentProblem(explain(path, error, nbytes, full)) from error


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(path: Path, error: Exception, nbytes: int, full: bool) -> str:
    """What went wrong while `path` was written, in one sentence with its remedy; `full`: the disk is."""
    if not full:
        return f"{path}: cannot be written: {error}; check the path and the permissions"
    disk = os.statvfs(path.parent)
    return (
        f"{path}: the disk is full: {nbytes:,} bytes wanted, {disk.f_bavail * disk.f_frsize:,} free; free some space and "
        "run the same command again (files already finished stay)"
    )
