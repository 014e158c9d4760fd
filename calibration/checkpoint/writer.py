"""Writes one safetensors shard of the output, byte for byte as safetensors itself would."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from calibration.checkpoint.files import file_digest, write_safely
from calibration.checkpoint.header import OutputTensor
from recipes.errors import WorkflowError

#: The order of dtypes in a file of safetensors (0.8); tensors of one dtype are sorted by name.
DTYPE_ORDER = (
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8",
    "BOOL",
)  # fmt: skip


def write_shard(path: Path, outputs: Iterable[OutputTensor], tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Writes one safetensors shard of exactly `outputs` and returns its sha256 (hex).

    Each tensor is written to its place as soon as `tensors` yields it, in any order, so that only one needs to be in
    memory; the bytes are those of safetensors' own save_file. Raises EnvironmentProblem if the file cannot be written,
    WorkflowError if a tensor is missing or differs from `outputs`.
    """
    header, places = _layout(outputs)

    def save(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(header)
            _fill(file, places, tensors)

    write_safely(path, save, len(header) + sum(output.nbytes for output, _ in places.values()))
    return file_digest(path)


def _layout(outputs: Iterable[OutputTensor]) -> tuple[bytes, dict[str, tuple[OutputTensor, int]]]:
    """The header of a shard, and each tensor's offset in the file."""
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
