"""Writing output files so that a kill or a full disk never leaves a broken one under its final name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from calibration.checkpoint.header import OutputTensor, free_inodes, fsync_directory
from recipes.errors import EnvironmentProblem, WorkflowError
from recipes.files import open_regular

PARTIAL = ".partial"
#: The order in which safetensors (0.8) puts the dtypes of a file; within one, tensors stand by name.
DTYPE_ORDER = (
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8",
    "BOOL",
)  # fmt: skip


def write_shard(path: Path, outputs: Iterable[OutputTensor], tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Writes one safetensors shard of exactly `outputs` and returns its sha256 (hex).

    Each tensor goes to its place when `tensors` yields it, in any order, so that no more than one of them need be in
    memory; the file's bytes are those of safetensors' own save_file. Raises EnvironmentProblem when it cannot be
    written, WorkflowError for a tensor that is missing or not what `outputs` says.
    """
    header, places = _layout(outputs)

    def save(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(header)
            _fill(file, places, tensors)

    write_safely(path, save, len(header) + sum(output.nbytes for output, _ in places.values()))
    return file_digest(path)


def _layout(outputs: Iterable[OutputTensor]) -> tuple[bytes, dict[str, tuple[OutputTensor, int]]]:
    """The header of a shard, and the place of each tensor's first byte in the file."""
    ordered = sorted(outputs, key=lambda output: (DTYPE_ORDER.index(output.dtype), output.name))
    ends = list(itertools.accumulate(output.nbytes for output in ordered))
    begins = [0, *ends[:-1]]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for output, begin, end in zip(ordered, begins, ends, strict=bool(ends)):
        entries[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {o.name: (o, len(header) + begin) for o, begin in zip(ordered, begins, strict=bool(ends))}


def _fill(
    file: BinaryIO, places: dict[str, tuple[OutputTensor, int]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    missing = set(places)
    for name, tensor in tensors:
        output, begin = places[name]
        if tuple(tensor.shape) != output.shape or tensor.nbytes != output.nbytes:
            raise WorkflowError(
                f"{name}: made {tensor.dtype} {list(tensor.shape)}, the plan says {output.dtype} {list(output.shape)}: a "
                "defect here"
            )
        file.seek(begin)
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        missing.discard(name)
    if missing:
        raise WorkflowError(f"{min(missing)}: was not made (one of {len(missing)}): a defect here")


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8). A lone surrogate, which a name of other bytes than UTF-8 has in Python, is spelled."""
    write_safely(path, lambda partial: partial.write_bytes(text.encode(errors="backslashreplace")), len(text))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as transformers writes a config: two spaces, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safely(path: Path, write: Callable[[Path], object], nbytes: int) -> None:
    """Calls `write` with `<path>.partial`, which is not there, fsyncs it and renames it to `path`.

    Raises EnvironmentProblem naming the file, the bytes wanted and the bytes free; the partial file is removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a link there would have its target overwritten
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise EnvironmentProblem(explain(path, error, nbytes, error.errno == errno.ENOSPC)) from error


def file_digest(path: Path) -> str:
    """sha256 of a regular file, hex. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(path: Path, error: Exception, nbytes: int, full: bool) -> str:
    """What went wrong while `path` was written, in one sentence with its remedy; `full`: the disk is."""
    if not full:
        return f"{path}: cannot be written: {error}; check the path and the permissions"
    place = next(parent for parent in path.absolute().parents if parent.exists())
    disk = os.statvfs(place)
    if free_inodes(place) == 0:
        return (
            f"{path}: no inode is left for one more file on the file system of {place} ({disk.f_bavail * disk.f_frsize:,} "
            "bytes are free); remove some files there and run the same command again (files already finished stay)"
        )
    return (
        f"{path}: the disk is full: {nbytes:,} bytes wanted, {disk.f_bavail * disk.f_frsize:,} free; free some space and "
        "run the same command again (files already finished stay)"
    )
