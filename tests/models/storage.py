"""Random tensors that depend on their name alone, the stored formats of DeepSeek-V4, and sharded safetensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models.tokenizer import write_json

TILE = 128
"""Side of an FP8 tile."""
MXFP4_GROUP = 32
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The value of code `i`; code `i + 8` is its negative (OCP Microscaling Formats v1.0, table for FP4 E2M1)."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint as it is stored: what the header says before any value exists."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def generator(seed: int, name: str) -> torch.Generator:
    """A random generator for one tensor, independent of the other tensors, their order and their format."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def normal(seed: int, name: str, shape: Sequence[int], mean: float, std: float) -> torch.Tensor:
    """float32 normal values for the tensor `name`."""
    return torch.randn(tuple(shape), generator=generator(seed, name)).mul_(std).add_(mean)


def ceil_div(value: int, divisor: int) -> int:
    """Smallest integer that is not below value / divisor."""
    return -(-value // divisor)


def power_of_two_at_least(value: torch.Tensor) -> torch.Tensor:
    """Smallest power of two not below each positive float32 (zero becomes 2^-126), as float32, exactly."""
    mantissa, exponent = torch.frexp(value.clamp(min=2.0**-126))
    return torch.ldexp(torch.ones_like(value), torch.where(mantissa == 0.5, exponent - 1, exponent))


def to_tiles(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[o, i] -> E4M3 [o, i] and scales [ceil(o/128), ceil(i/128)] of `scale_dtype`: value = code * scale.

    float8_e8m0fnu scales are rounded up to a power of two, so that no code saturates.
    """
    rows, columns = weight.shape
    tile_rows, tile_columns = ceil_div(rows, TILE), ceil_div(columns, TILE)
    padded = torch.zeros(tile_rows * TILE, tile_columns * TILE)
    padded[:rows, :columns] = weight.float()
    tiles = padded.view(tile_rows, TILE, tile_columns, TILE)
    scale = tiles.abs().amax(dim=(1, 3)).clamp(min=2.0**-100) / E4M3_MAX
    if scale_dtype == torch.float8_e8m0fnu:
        scale = power_of_two_at_least(scale)
    codes = (tiles / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = codes.view(tile_rows * TILE, tile_columns * TILE)[:rows, :columns]
    return codes.contiguous(), scale.to(scale_dtype)


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[o, i] -> int8 [o, i/2] (element 0 in the low nibble) and float8_e8m0fnu scales [o, i/32].

    The scale is the smallest power of two that keeps the group's largest weight within E2M1's 6.
    Raises ValueError when i is no multiple of 32.
    """
    rows, columns = weight.shape
    if columns % MXFP4_GROUP:
        raise ValueError(f"MXFP4 needs in features in groups of {MXFP4_GROUP}, got {columns}")
    groups = weight.float().view(rows, columns // MXFP4_GROUP, MXFP4_GROUP)
    scale = power_of_two_at_least(groups.abs().amax(dim=-1) / E2M1_VALUES[-1])
    scaled = (groups / scale[..., None]).view(rows, columns)
    values = torch.tensor(E2M1_VALUES)
    magnitude = scaled.abs()
    codes = (scaled < 0).to(torch.uint8) * 8
    for midpoint in ((values[1:] + values[:-1]) / 2).tolist():
        # Counting the midpoints below is four times faster than torch.bucketize, which benchmarks notice.
        codes += magnitude > midpoint
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.view(torch.int8), scale.to(torch.float8_e8m0fnu)


def split_at(entries: Sequence[Entry], shards: int, anchors: Callable[[int], Callable[[str], bool]]) -> list[int]:
    """Positions in `entries` at which shards 2, 3, ... begin: near equal bytes, each right behind an anchor tensor.

    `anchors(boundary)` says which names may end the shard before that boundary (counted from 0).
    Raises ValueError when there are more shards than anchors allow.
    """
    ends = torch.tensor([entry.nbytes for entry in entries], dtype=torch.int64).cumsum(0).tolist()
    cuts: list[int] = []
    for boundary in range(shards - 1):
        ideal = ends[-1] * (boundary + 1) / shards
        is_anchor = anchors(boundary)
        earliest = cuts[-1] if cuts else 0
        places = [i + 1 for i, entry in enumerate(entries[:-1]) if i >= earliest and is_anchor(entry.name)]
        if not places:
            raise ValueError(f"{shards} shards are too many: nothing is left to split at boundary {boundary}")
        cuts.append(min(places, key=lambda place: abs(ends[place - 1] - ideal)))
    return cuts


def write_shards(
    directory: Path, entries: Sequence[Entry], cuts: Sequence[int], make: Callable[[Entry], torch.Tensor]
) -> None:
    """Write the shards and the index, one shard in memory at a time; a single shard has no index.

    Raises ValueError when a tensor that `make` returns differs from its entry in dtype or shape.
    """
    bounds = [0, *cuts, len(entries)]
    shards = len(bounds) - 1
    weight_map: dict[str, str] = {}
    for number, (first, last) in enumerate(pairwise(bounds), start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for entry in entries[first:last]:
            tensor = make(entry).contiguous()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry.name}: made {tensor.dtype} {tuple(tensor.shape)}, planned {entry}")
            tensors[entry.name] = tensor
            weight_map[entry.name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(directory / "model.safetensors.index.json", index)


def new_directory(directory: Path) -> Path:
    """Create `directory`; raises FileExistsError when it already holds something."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: name a new directory or empty it")
    return directory
