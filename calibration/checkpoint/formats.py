"""Finds from headers in which format a source stores each weight, and reads weights through it."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch

from calibration.checkpoint import nvfp4
from calibration.checkpoint.collector import collector_paused
from calibration.checkpoint.dequantize import INT4_PACKED, MXFP4_GROUP, StoredFormat, check_finite, dequantize
from calibration.checkpoint.dialect import COMPRESSED_TENSORS, NVIDIA
from calibration.checkpoint.foreign import REMEDY, foreign_formats
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import TORCH, Checkpoint
from calibration.checkpoint.source_config import declared_quantization
from recipes.errors import SourceError, collapsed

FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
#: Largest weight, in bytes, whose codes share a thread's buffer; an expert of DeepSeek-V4-Pro takes 22 MB.
_CODE_BYTES = 64 << 20
#: Scale companions of an E4M3 weight, by the suffix after the module name: the spellings of DeepSeek-V4, DeepSeek-V3
#: and compressed-tensors (FP8_BLOCK, per tensor, per channel; also modelopt's and fbgemm's).
FP8_SCALES = ("scale", "weight_scale_inv", "weight_scale")
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Possible sides of a tile if config.json names none.
_SIDES = (16, 32, 64, 128, 256, 512)


def module_of(tensor: str) -> str:
    """Module name of a tensor name: `layers.0.attn.wq_a.weight` -> `layers.0.attn.wq_a`."""
    return tensor.rpartition(".")[0]


def logical_name(tensor: str) -> str:
    """The name of a tensor independent of its stored format: a packed weight's name ends with `weight`."""
    return f"{module_of(tensor)}.weight" if tensor.endswith(".weight_packed") else tensor


class Formats:
    """The stored format of every tensor of a checkpoint; reads tensors dequantized."""

    @collector_paused()
    def __init__(self, checkpoint: Checkpoint) -> None:
        """Finds every format from the headers. Raises SourceError, all at once, for low-bit weights without complete
        and fitting companions and for formats that cannot be dequantized here."""
        self.checkpoint = checkpoint
        self._memory = threading.local()
        self._formats: dict[str, StoredFormat] = {}
        self._tile = _configured_tile(checkpoint.config)
        problems = foreign_formats(checkpoint)
        if problems:
            raise SourceError(problems)
        for name, header in checkpoint.tensors.items():
            try:
                self._formats[name] = self._detect(name, header)
            except SourceError as error:
                problems += [f"{checkpoint.path(name)}: {name}: {problem}" for problem in error.problems]
        if problems:
            raise SourceError(collapsed(problems))
        self.companions = {scale for stored in self._formats.values() for scale in stored.companions.values()}

    def of(self, name: str) -> StoredFormat:
        """The stored format of tensor `name`."""
        if name not in self.checkpoint.whole:
            return self._formats[name]
        undone = self.checkpoint.whole[name].undone
        if undone is None:
            return StoredFormat("plain", self.checkpoint.header(name).shape)
        return StoredFormat("mxfp4", undone.shape, {"group_scale": undone.scales})

    @property
    def parameters(self) -> int:
        """The number of logical values in all tensors except scale companions."""
        return sum(math.prod(found.shape) for name, found in self._formats.items() if name not in self.companions)

    def read(
        self, name: str, dtype: torch.dtype | None = torch.bfloat16, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tensor `name`, dequantized, in `dtype`; with `dtype=None` plain tensors keep their dtype and others become
        BF16. Integer tensors are never cast. The tensor has memory of its own, or that of `out` (of the logical shape
        and `dtype`) if it is given and the values are not integers. Raises SourceError that names the tensor for NaN or
        Inf."""
        stored, kept = self.of(name), TORCH[self.checkpoint.header(name).dtype]
        if stored.kind == "plain" and out is not None and out.dtype == kept:
            value = self.checkpoint.read(name, out)
        elif stored.kind == "plain":
            tensor = self.checkpoint.read(name)
            if not tensor.is_floating_point():
                return tensor
            value = tensor.to(dtype or kept) if out is None else out.copy_(tensor)
        else:
            tensor = self.checkpoint.read(name) if out is None else self._codes(name)
            scales = {role: self.checkpoint.read(scale) for role, scale in stored.scales.items()}
            value = dequantize(stored, tensor, scales, dtype or torch.bfloat16, out)
        check_finite(value, f"{self.checkpoint.path(name)}: {name}")
        return value

    def _codes(self, name: str) -> torch.Tensor:
        """The codes of a weight, in a buffer of this thread that the next call overwrites: fresh pages for every weight
        would cost a third of the time of dequantizing FP8."""
        header = self.checkpoint.header(name)
        if header.nbytes > _CODE_BYTES:
            return self.checkpoint.read(name)
        if not hasattr(self._memory, "codes"):
            self._memory.codes = torch.empty(_CODE_BYTES, dtype=torch.uint8)
        codes: torch.Tensor = self._memory.codes[: header.nbytes].view(TORCH[header.dtype]).view(header.shape)
        return self.checkpoint.read(name, codes)

    def _detect(self, name: str, header: TensorHeader) -> StoredFormat:
        if len(header.shape) != 2:
            return StoredFormat("plain", header.shape)
        if name.endswith(".weight") and header.dtype == "F8_E4M3":
            return self._fp8(header)
        if name.endswith(".weight") and header.dtype in ("I8", "U8"):
            return self._four_bits(header)
        if name.endswith(".weight_packed") and header.dtype == "U8":
            shape = (header.shape[0], header.shape[1] * 2)
            companions = self._companions(header, COMPRESSED_TENSORS.companions)
            found = self._found(name, {"input_scale": COMPRESSED_TENSORS.input_scale})
            return StoredFormat("nvfp4", shape, companions | found)
        if name.endswith(".weight_packed") and header.dtype == "I32":
            return self._int4(header)
        return StoredFormat("plain", header.shape)

    def _found(self, name: str, leaves: dict[str, str]) -> dict[str, str]:
        """Role -> tensor name of those companions of tensor `name` that the checkpoint has."""
        found = {role: f"{module_of(name)}.{leaf}" for role, leaf in leaves.items()}
        return {role: companion for role, companion in found.items() if companion in self.checkpoint.tensors}

    def _companions(self, header: TensorHeader, leaves: dict[str, str]) -> dict[str, str]:
        module = module_of(header.name)
        missing = [leaf for leaf in leaves.values() if f"{module}.{leaf}" not in self.checkpoint.tensors]
        if missing:
            raise SourceError(f"low-bit weight without {', '.join(missing)}; get a whole copy")
        return {role: f"{module}.{leaf}" for role, leaf in leaves.items()}

    def _fp8(self, header: TensorHeader) -> StoredFormat:
        tensors, shape = self.checkpoint.tensors, header.shape
        spelled = (f"{module_of(header.name)}.{leaf}" for leaf in FP8_SCALES)
        scale = next((tensors[name] for name in spelled if name in tensors), None)
        if scale is None:
            raise SourceError("F8_E4M3 weight without a scale (.scale, .weight_scale_inv or .weight_scale)")
        further = self._found(header.name, {"input_scale": "input_scale", "input_bound": "input_scale_ub"})
        # Lookup tables have a scale for each part of a row, whatever tile the other weights have.
        tiles = (self._tile or _tile_of(shape, scale.shape), _row_group(shape, scale.shape))
        tile = next((tile for tile in tiles if tile is not None and scale.shape == _grid(shape, tile)), None)
        if tile is not None:
            return StoredFormat("fp8_tiles", shape, {"tile_scale": scale.name} | further, tile)
        if scale.dtype in ("F32", "BF16", "F16"):
            if scale.numel == 1:
                return StoredFormat("fp8_tensor", shape, {"tensor_scale": scale.name} | further)
            if scale.shape in ((shape[0],), (shape[0], 1)):
                return StoredFormat("fp8_channel", shape, {"channel_scale": scale.name} | further)
        declared = self._tile or (128, 128)
        raise SourceError(
            f"F8_E4M3 {list(shape)} in tiles of {list(declared)} needs {list(_grid(shape, declared))} scales, per "
            f"channel [{shape[0]}, 1], per tensor [1], in F32, BF16 or F16; {scale.name} is {scale.dtype} "
            f"{list(scale.shape)}; check weight_block_size in config.json"
        )

    def _four_bits(self, header: TensorHeader) -> StoredFormat:
        """The format of a weight whose bytes each hold two E2M1 codes."""
        tensors, (rows, columns) = self.checkpoint.tensors, (header.shape[0], header.shape[1] * 2)
        leaves = {"mxfp4": "scale", **NVIDIA.companions, "input_scale": NVIDIA.input_scale}
        found = self._found(header.name, leaves)
        mxfp4 = tensors.get(found.pop("mxfp4", ""))
        if mxfp4 is not None and mxfp4.dtype == "F8_E8M0":
            if mxfp4.shape != (rows, columns // MXFP4_GROUP) or columns % MXFP4_GROUP:
                raise SourceError(
                    f"MXFP4 {[rows, columns]} needs group scales [{rows}, {columns}/32], {mxfp4.name} has "
                    f"{list(mxfp4.shape)}"
                )
            return StoredFormat("mxfp4", (rows, columns), {"group_scale": mxfp4.name})
        if {"group_scale", "global_scale"} <= found.keys():
            group, single = tensors[found["group_scale"]], [tensors[found[r]] for r in found if r != "group_scale"]
            fits = (group.dtype, group.shape) == (
                "F8_E4M3",
                (rows, columns // nvfp4.GROUP),
            ) and not columns % nvfp4.GROUP
            if not fits or any((scale.dtype, scale.numel) != ("F32", 1) for scale in single):
                raise SourceError(
                    f"NVFP4 {[rows, columns]} of modelopt needs weight_scale F8_E4M3 [{rows}, {columns}/16], "
                    f"weight_scale_2 and input_scale F32 [1]; found {group.dtype} {list(group.shape)} and "
                    f"{', '.join(f'{scale.dtype} {list(scale.shape)}' for scale in single)}"
                )
            return StoredFormat("modelopt_nvfp4", (rows, columns), found)
        int8 = header.dtype == "I8" and "group_scale" in found
        why = (
            "is stored as INT8, which this project cannot dequantize"
            if int8
            else "has companions that match neither MXFP4 nor NVFP4"
        )
        raise SourceError(f"{header.dtype} weight {why}; {REMEDY}")

    def _int4(self, header: TensorHeader) -> StoredFormat:
        """compressed-tensors' pack-quantized with 4 bits: eight values of a row in an int32, the first in the low bits,
        each with an offset of 8; scales `[M, K/group]`, optionally zero points packed along the rows and a group index
        for each column."""
        tensors, (rows, columns) = self.checkpoint.tensors, (header.shape[0], header.shape[1] * INT4_PACKED)
        bits = {weights.get("num_bits") for weights in _weights_arguments(self.checkpoint.config, "int")}
        if bits != {4}:
            said = (
                f"num_bits {', '.join(map(str, bits))}"
                if bits
                else "no config group of integers, which would give num_bits"
            )
            raise SourceError(f"pack-quantized, and config.json has {said}; only num_bits 4 is supported; {REMEDY}")
        companions = self._companions(header, {"group_scale": "weight_scale"}) | self._found(
            header.name, {"shape": "weight_shape", "zero_point": "weight_zero_point", "group_index": "weight_g_idx"}
        )
        scale = tensors[companions["group_scale"]]
        groups = scale.shape[1] if len(scale.shape) == 2 else 0
        wanted = {"zero_point": (-(-rows // INT4_PACKED), groups), "group_index": (columns,)}
        misfits = [tensors[companions[r]] for r in wanted if r in companions and (
            tensors[companions[r]].shape != wanted[r] or tensors[companions[r]].dtype not in ("I32", "I64"))]  # fmt: skip
        if not groups or scale.shape[0] != rows or columns % groups or scale.dtype not in ("F32", "BF16", "F16"):
            misfits.append(scale)
        if misfits:
            raise SourceError(
                f"INT4 {[rows, columns]} needs scales [{rows}, groups] that divide it, zero points "
                f"[{rows}/8, groups] and column groups [{columns}] of int32; "
                f"{', '.join(f'{bad.name} is {bad.dtype} {list(bad.shape)}' for bad in misfits)}"
            )
        return StoredFormat("int4", (rows, columns), companions)


def _weights_arguments(config: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The `weights` of compressed-tensors' config groups whose type is `kind`."""
    groups = declared_quantization(config).get("config_groups") or {}
    found = [group.get("weights") or {} for group in groups.values()]
    return [weights for weights in found if weights.get("type") == kind]


def _configured_tile(config: dict[str, Any]) -> tuple[int, int] | None:
    """The tile that config.json names: transformers' `weight_block_size`, compressed-tensors' `block_structure`."""
    size = declared_quantization(config).get("weight_block_size")
    sizes = [size] if size else [weights.get("block_structure") for weights in _weights_arguments(config, "float")]
    return next(((int(size[0]), int(size[1])) for size in sizes if isinstance(size, list)), None)


def _grid(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))


def _row_group(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int] | None:
    """A one-row tile if each row has several scales, each for a power-of-two number of columns; else None.
    DeepSeek-V4.1's Engram tables (`engram.embed.weight` `[rows, 256]`, scales `[rows, 8]`, beside tiles of 32x32)."""
    if len(grid) != 2 or grid[0] != shape[0] or grid[1] < 2:
        return None
    return next(((1, side) for side in _SIDES if side * grid[1] == shape[1]), None)


def _tile_of(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int] | None:
    """The tile of a weight whose config names none: 128x128 if that fits, otherwise the only pair of powers of two that
    cuts the weight into this grid of scales; None if there is no such pair or more than one."""
    if len(grid) != 2 or grid == _grid(shape, (128, 128)):
        return (128, 128)
    sides = [{t for t in _SIDES if -(-n // t) == parts} for n, parts in zip(shape, grid, strict=True)]
    rows, columns = ({128} if 128 in found else found for found in sides)
    return (rows.pop(), columns.pop()) if len(rows) == len(columns) == 1 else None
