"""Reads and checks the header of one safetensors file, without reading a tensor.

Format: 8 bytes little-endian header length, a JSON object of that length
(`{name: {dtype, shape, data_offsets}, "__metadata__": {...}}`), then the tensors' bytes.
Source: the safetensors format description (README of the safetensors project).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.checkpoint.files import open_regular, parse_json
from recipes.errors import SourceError, first_of

#: Bytes per element of every dtype the project reads or writes, by safetensors' own spelling.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

#: Longest header in bytes; the safetensors library refuses longer ones (its MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
#: Maximum dimensions of a shape; models have up to 5.
MAX_DIMENSIONS = 32
#: Maximum letters of a tensor name; the longest names of real models have about 120.
MAX_NAME = 1_000
#: Largest number in a shape or an offset: the largest size of a file.
MAX_SIZE = (1 << 63) - 1
#: Maximum number of problems of one file that a message lists.
MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the values of a tensor are in a matrix `[rows, columns]` that contains it: the lines `begin`, `begin +
    step`, ... (`count` of them), which are rows, or columns if `transposed`. A vector is a matrix of one column."""

    rows: int
    columns: int
    begin: int
    count: int
    step: int = 1
    transposed: bool = False
    vector: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's own shape: `[count, columns]`, `[count, rows]` if transposed, `[count]` for a vector."""
        return (self.count,) if self.vector else (self.count, self.rows if self.transposed else self.columns)

    def turned(self) -> Layout:
        """The same values in the transposed matrix."""
        return replace(self, rows=self.columns, columns=self.rows, transposed=not self.transposed)

    @property
    def contiguous(self) -> bool:
        """Whether the tensor's bytes are adjacent and in its own order."""
        return self.step == 1 and not self.transposed

    def take(self, matrix: npt.NDArray[np.uint8], itemsize: int) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, uint8 `[count, bytes of a row]`, copied from those of the matrix."""
        values = matrix.reshape(self.rows, self.columns, itemsize)
        lines = (values.transpose(1, 0, 2) if self.transposed else values)[self.begin :: self.step][: self.count]
        return np.ascontiguousarray(lines).reshape(self.count, -1)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """The location of one tensor: `dtype` in safetensors' spelling, `begin`/`end` as byte offsets in the file
    `shard`. With a `layout` these are the bytes of the matrix that contains the tensor's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int
    layout: Layout | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.begin if self.layout is None else tensor_bytes(self.dtype, self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output checkpoint; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this safetensors dtype and shape takes on disk."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Reads and checks the header of one safetensors file.

    Returns tensor name -> header, in the order of the bytes. Raises SourceError that lists the first problems: not a
    regular file, a file shorter than its own header (truncated), a header that is not JSON, a name with unprintable
    characters, an unknown dtype, a shape that does not fit its offsets, overlapping or gapped offsets, missing or extra
    bytes at the end.
    """
    raw, size = _raw_header(path)
    return parse_header(path, raw, size)


def read_metadata(path: Path) -> dict[str, str]:
    """`__metadata__` of one safetensors file whose header `read_header` accepts. Raises SourceError as it does."""
    metadata: dict[str, str] = parse_json(_raw_header(path)[0], str(path)).get("__metadata__", {})
    return metadata


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The JSON of a header, and the file's size."""
    with open_regular(path, "copy or download the shard again") as file:
        try:
            size = os.fstat(file.fileno()).st_size
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
    return raw, size


def parse_header(path: Path, raw: bytes, size: int) -> dict[str, TensorHeader]:
    """The header `raw` (JSON) of the file `path` of `size` bytes, checked. Raises SourceError as `read_header`."""
    if not raw.startswith(b"{"):
        raise SourceError(f"{path}: the safetensors header is damaged (it is no JSON object); download the shard again")
    try:
        header = parse_json(raw, str(path))
    except SourceError as error:
        raise SourceError(f"{error}: the safetensors header is damaged; download the shard again") from None
    metadata = header.pop("__metadata__", {})
    problems = [] if _is_metadata(metadata) else [f"{path}: __metadata__ is no mapping of text to text"]
    data_begin = 8 + len(raw)
    tensors, shard = list[TensorHeader](), path.name
    for name, entry in header.items():
        problem = _entry_problem(name, entry)
        if problem is None:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if end - begin == tensor_bytes(dtype, shape):
                tensors.append(TensorHeader(name, dtype, shape, shard, data_begin + begin, data_begin + end))
                continue
            problem = (
                f"{dtype} {list(shape)} takes {tensor_bytes(dtype, shape)} bytes, its offsets [{begin}, {end}] hold "
                f"{end - begin}"
            )
        problems.append(f"{path}: {shown_name(name)}: {problem}")
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    if not problems:
        problems = _layout_problems(path, tensors, data_begin, size)
    if problems:
        raise SourceError([*first_of(problems, MOST_PROBLEMS), f"{path}: remedy: copy or download this shard again"])
    return {tensor.name: tensor for tensor in tensors}


def shown_name(name: str) -> str:
    """A tensor name for a message: unchanged, or quoted and shortened if it is invalid."""
    return name if name_problem(name) is None else f"{name!r:.100}"


def name_problem(name: str) -> str | None:
    """Why a text is not a valid tensor name, or None. Control characters and bidirectional marks would affect a
    terminal, a page or a log; no model has such a name."""
    if not 0 < len(name) <= MAX_NAME:
        return f"the name has {len(name):,} letters, 1 to {MAX_NAME:,} are allowed"
    return None if name.isprintable() else "the name holds characters that cannot be printed"


def _entry_problem(name: str, entry: Any) -> str | None:
    """What is wrong with one entry of a header, regardless of the others; None if nothing is."""
    problem = name_problem(name)
    if problem is not None:
        return problem
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "the header entry lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"dtype {dtype!r:.40} is not known; known: {', '.join(DTYPE_BYTES)}"
    if not isinstance(shape, list) or not _are_sizes(shape, MAX_DIMENSIONS):
        found = (
            f"{shape!r:.80}"
            if not isinstance(shape, list) or len(shape) <= MAX_DIMENSIONS
            else f"of {len(shape):,} numbers"
        )
        return f"shape {found} is no list of at most {MAX_DIMENSIONS} sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets, 2):
        return "data_offsets are no two byte numbers"
    return None


def _are_sizes(numbers: list[Any], most: int) -> bool:
    # `type`, because True and 1.0 are not sizes.
    return len(numbers) <= most and all(type(n) is int and 0 <= n <= MAX_SIZE for n in numbers)


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _layout_problems(path: Path, tensors: list[TensorHeader], data_begin: int, size: int) -> list[str]:
    """Gaps and overlaps between tensors, and a file that is shorter or longer than its header says."""
    problems, position = list[str](), data_begin
    for tensor in tensors:
        if tensor.begin != position:
            kind = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap before it"
            problems.append(f"{path}: {tensor.name}: begins at byte {tensor.begin}, expected {position}: it {kind}")
        position = tensor.end
    if not problems and position != size:
        kind = "truncated" if position > size else "longer than its header says"
        problems.append(f"{path}: {kind}: the header ends at byte {position}, the file at {size}")
    return problems
