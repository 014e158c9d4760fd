"""The header of one safetensors file, read and checked without reading a tensor.

Format: 8 bytes little-endian header length, a JSON object of that length
(`{name: {dtype, shape, data_offsets}, "__metadata__": {...}}`), then the tensors' bytes.
Source: the safetensors format description (README of the safetensors project).
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.errors import SourceError

#: Bytes per element of every dtype the project reads or writes, by safetensors' own spelling.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

#: The safetensors library refuses longer headers (its MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor lies: `dtype` in safetensors' spelling, `begin`/`end` as byte offsets in the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this safetensors dtype and shape takes on disk."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Reads and checks the header of one safetensors file.

    Returns tensor name -> header, in the order of the bytes. Raises SourceError, listing every problem: a file too
    short for its own header (truncated), a header that is not JSON, an unknown dtype, a shape that does not fit its
    offsets, overlapping or gapped offsets, bytes missing at the end or left over.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if length < 2 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise SourceError(
                    f"{path}: not a whole safetensors file: it says its header takes {length} bytes and the file has "
                    f"{size} bytes; copy or download the shard again"
                )
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check the path and the permissions") from None
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: the safetensors header is damaged ({error}); download the shard again") from None
    header.pop("__metadata__", None)
    return _checked(path, header, data_begin=8 + length, size=size)


def _checked(path: Path, header: dict[str, Any], data_begin: int, size: int) -> dict[str, TensorHeader]:
    problems: list[str] = []
    tensors: list[TensorHeader] = []
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError):
            problems.append(f"{path}: {name}: the header entry lacks dtype, shape or data_offsets")
            continue
        if dtype not in DTYPE_BYTES:
            problems.append(f"{path}: {name}: dtype {dtype} is not known; known: {', '.join(DTYPE_BYTES)}")
        elif min(shape, default=0) < 0 or begin < 0 or end - begin != tensor_bytes(dtype, shape):
            problems.append(
                f"{path}: {name}: {dtype} {list(shape)} takes {tensor_bytes(dtype, shape)} bytes, its offsets "
                f"[{begin}, {end}] hold {end - begin}"
            )
        else:
            tensors.append(TensorHeader(name, dtype, shape, path.name, data_begin + begin, data_begin + end))
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = data_begin
    for tensor in tensors if not problems else []:
        if tensor.begin != position:
            kind = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap before it"
            problems.append(f"{path}: {tensor.name}: begins at byte {tensor.begin}, expected {position}: it {kind}")
        position = tensor.end
    if not problems and position != size:
        kind = "truncated" if position > size else "longer than its header says"
        problems.append(f"{path}: {kind}: the header ends at byte {position}, the file at {size}")
    if problems:
        raise SourceError([*problems, f"{path}: remedy: copy or download this shard again"])
    return {tensor.name: tensor for tensor in tensors}


def fsync_directory(directory: Path) -> None:
    """Makes renames inside `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
