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


def to_tiles(
    weight: torch.Tensor, scale_dtype: torch.dtype, side: int = TILE, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[o, i] -> E4M3 [o, i] and scales [ceil(o/side), ceil(i/width)] of `scale_dtype`: value = code * scale. Tiles are
    square where no `width` is given.

    float8_e8m0fnu scales are rounded up to a power of two, so that no code saturates.
    """
    rows, columns = weight.shape
    width = side if width is None else width
    tile_rows, tile_columns = ceil_div(rows, side), ceil_div(columns, width)
    padded = torch.zeros(tile_rows * side, tile_columns * width)
    padded[:rows, :columns] = weight.float()
    tiles = padded.view(tile_rows, side, tile_columns, width)
    scale = tiles.abs().amax(dim=(1, 3)).clamp(min=2.0**-100) / E4M3_MAX
    if scale_dtype == torch.float8_e8m0fnu:
        scale = power_of_two_at_least(scale)
    codes = (tiles / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = codes.view(tile_rows * side, tile_columns * width)[:rows, :columns]
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


def to_fp8(
    weight: torch.Tensor, per: str, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """[o, i] -> E4M3 [o, i] and scales, [o, 1] `per` channel, [1] per tensor (compressed-tensors), [] scalar (modelopt)."""
    largest = weight.float().abs().amax(1, keepdim=True) if per == "channel" else weight.float().abs().max()
    scale = (largest.clamp(min=2.0**-100) / E4M3_MAX).to(scale_dtype)
    codes = (weight.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale.reshape(1) if per == "tensor" else scale


def to_int4(
    weight: torch.Tensor, group: int, asymmetric: bool = False, ordered: bool = False
) -> dict[str, torch.Tensor]:
    """[o, i] -> compressed-tensors' pack-quantized tensors by suffix: int32 [o, i/8], first value in the low bits, BF16
    scales [o, i/group]; zero points packed along the rows where `asymmetric`; a group for each column where `ordered`."""
    rows, columns = weight.shape
    group_of = torch.arange(columns) // group
    if ordered:
        group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    scale, codes = torch.empty(rows, columns // group), torch.empty(rows, columns, dtype=torch.int32)
    zero = torch.zeros(rows, columns // group, dtype=torch.int32)
    for number in range(columns // group):
        values = weight.float()[:, group_of == number]
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        step = (high - low) / 15 if asymmetric else values.abs().amax(1) / 7.5
        scale[:, number] = step.clamp(min=2.0**-30).bfloat16().float()
        if asymmetric:
            zero[:, number] = (-8 - low / scale[:, number]).round().clamp(-8, 7).int()
        made = (values / scale[:, number, None]).round().int() + zero[:, number, None]
        codes[:, group_of == number] = made.clamp(-8, 7)
    made = {"weight_packed": _packed_int32(codes), "weight_scale": scale.bfloat16()}
    made["weight_shape"] = torch.tensor([rows, columns])
    if asymmetric:
        made["weight_zero_point"] = _packed_int32(zero.T).T
    if ordered:
        made["weight_g_idx"] = group_of.int()
    return made


def _packed_int32(codes: torch.Tensor) -> torch.Tensor:
    """Values -8 ... 7, [o, i] -> int32 [o, ceil(i/8)], each 8 too large, the first in the low bits."""
    padded = torch.nn.functional.pad(codes + 8, (0, -codes.shape[1] % 8)).reshape(codes.shape[0], -1, 8).long()
    packed = (padded << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def to_modelopt_nvfp4(weight: torch.Tensor, amax: float | None = None) -> dict[str, torch.Tensor]:
    """[o, i] -> modelopt's NVFP4 by suffix (Model-Optimizer, qtensor/nvfp4_tensor.py): uint8 [o, i/2], element 0 in the low
    nibble, E4M3 scales [o, i/16], F32 scalars weight_scale_2 = amax / 2688 and input_scale. `amax` is that of fused
    weights, which modelopt gives one scale."""
    groups = weight.float().reshape(weight.shape[0], -1, 16)
    double = torch.tensor(float(weight.float().abs().max()) if amax is None else amax) / (6.0 * E4M3_MAX)
    scale = groups.abs().amax(-1) / (6.0 * double)
    scale = torch.where(scale == 0, 1.0, scale).clamp(2**-9, E4M3_MAX).to(torch.float8_e4m3fn)
    scaled = groups / (scale.float() * double).unsqueeze(-1)
    midpoints = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1_VALUES)])
    codes = torch.searchsorted(midpoints, scaled.abs()).to(torch.uint8) + (scaled < 0).to(torch.uint8) * 8
    flat = codes.reshape(weight.shape)
    packed = flat[:, 0::2] | flat[:, 1::2] << 4
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": double, "input_scale": torch.tensor(0.0123)}


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
