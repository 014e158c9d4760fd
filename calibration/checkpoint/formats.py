"""Stored formats: how a source keeps a weight, found from headers; and undoing them.

Each is dequantized as the library that made it does, bit for bit:
FP8 tiles, MXFP4: value times scale in float32, rounded once to the wanted dtype (transformers 5.17's Fp8Dequantize,
integrations/finegrained_fp8.py). FP8 per tensor and per channel, INT4: in the scale's dtype, then rounded to the wanted one
(compressed_tensors 0.19's quantization/lifecycle/forward_helpers.py, _dequantize; packing in
compressors/pack_quantized/helpers.py). modelopt's NVFP4: E2M1 times the float32 product of both scales, element 0 in the low
nibble (Model-Optimizer's modelopt/torch/quantization/qtensor/nvfp4_tensor.py, dequantize).
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from calibration.checkpoint import native, nvfp4
from calibration.checkpoint.dialect import COMPRESSED_TENSORS, NVIDIA
from calibration.checkpoint.foreign import REMEDY, foreign_formats
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import TORCH, Checkpoint
from recipes.errors import SourceError, collapsed

Kind = Literal["plain", "fp8_tiles", "fp8_tensor", "fp8_channel", "mxfp4", "int4", "nvfp4", "modelopt_nvfp4"]

FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
MXFP4_GROUP = 32
#: Codes of larger weights get memory of their own; an expert of DeepSeek-V4-Pro takes 22 MB.
_CODE_BYTES = 64 << 20
#: Scale companions of an E4M3 weight, by their suffix behind the module name: DeepSeek-V4's, DeepSeek-V3's and
#: compressed-tensors' spelling (FP8_BLOCK, per tensor, per channel; modelopt's and fbgemm's too).
FP8_SCALES = ("scale", "weight_scale_inv", "weight_scale")
#: INT4 values in an int32; where zero points are packed too, they are so along the rows.
_INT4_PACKED = 8
#: Roles of companions that no value depends on: what activations were quantized with, and a shape that headers tell.
_VALUELESS = frozenset({"input_scale", "input_bound", "shape"})
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Sides of a tile that is not named.
_SIDES = (16, 32, 64, 128, 256, 512)
_LABELS = {
    "plain": "plain", "fp8_tensor": "FP8 per tensor", "fp8_channel": "FP8 per channel", "mxfp4": "MXFP4", "int4": "INT4",
    "nvfp4": "NVFP4", "modelopt_nvfp4": "NVFP4 (modelopt)",
}  # fmt: skip


@dataclass(frozen=True)
class StoredFormat:
    """How one weight is stored. `companions` maps a role (group_scale, global_scale, input_scale, tile_scale,
    channel_scale, tensor_scale, zero_point, group_index, shape, input_bound) to a tensor name; `shape` is the logical
    `[M, K]`; `tile` the FP8 tile (rows, columns)."""

    kind: Kind
    shape: tuple[int, ...]
    companions: dict[str, str] = field(default_factory=dict)
    tile: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """For tables: `FP8 tiles 128x128`, `MXFP4`, ..."""
        return f"FP8 tiles {self.tile[0]}x{self.tile[1]}" if self.tile else _LABELS[self.kind]

    @property
    def scales(self) -> dict[str, str]:
        """The companions that the values depend on."""
        return {role: name for role, name in self.companions.items() if role not in _VALUELESS}

    def companion_rows(self, role: str, begin: int, end: int) -> tuple[int, int] | None:
        """Rows [first, last) of a companion that belong to the weight's rows [begin, end), which begin at a tile and at a
        multiple of 8; None: the whole companion does."""
        height = {"group_scale": 1, "channel_scale": 1, "zero_point": _INT4_PACKED}.get(role)
        if role == "tile_scale" and self.tile is not None:
            height = self.tile[0]
        return None if height is None else (begin // height, -(-end // height))


def module_of(tensor: str) -> str:
    """Module name of a tensor name: `layers.0.attn.wq_a.weight` -> `layers.0.attn.wq_a`."""
    return tensor.rpartition(".")[0]


def logical_name(tensor: str) -> str:
    """The name under which a tensor stands in any stored format: a packed weight is a weight."""
    return f"{module_of(tensor)}.weight" if tensor.endswith(".weight_packed") else tensor


class Formats:
    """The stored format of every tensor of a checkpoint, and reading through it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Finds every format from the headers. Raises SourceError, all at once, for low-bit weights without a
        complete and fitting set of companions, and for formats that are not undone here, by their names."""
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
                problems += error.problems
        if problems:
            raise SourceError(collapsed(problems))
        self.companions = {scale for stored in self._formats.values() for scale in stored.companions.values()}

    def of(self, name: str) -> StoredFormat:
        """The stored format of tensor `name`."""
        return self._formats[name]

    @property
    def parameters(self) -> int:
        """Logical values in all tensors but the scale companions."""
        return sum(math.prod(found.shape) for name, found in self._formats.items() if name not in self.companions)

    def read(
        self, name: str, dtype: torch.dtype | None = torch.bfloat16, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tensor `name` in `dtype`, its stored format undone; `dtype=None` leaves plain tensors as stored and gives
        BF16 for the others. Integer tensors are never cast. The tensor is the caller's own; values
        that are not integers lie in `out`, where one is given (of the logical shape and of `dtype`). Raises SourceError
        for NaN or Inf, by tensor name."""
        stored, kept = self._formats[name], TORCH[self.checkpoint.tensors[name].dtype]
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
        """The codes of a weight, in memory of this thread that the next call overwrites: fresh pages for every weight cost a
        third of the time that undoing FP8 takes."""
        header = self.checkpoint.tensors[name]
        if header.nbytes > _CODE_BYTES:
            return self.checkpoint.read(name)
        if not hasattr(self._memory, "codes"):
            self._memory.codes = torch.empty(_CODE_BYTES, dtype=torch.uint8)
        codes: torch.Tensor = self._memory.codes[: header.nbytes].view(TORCH[header.dtype]).view(header.shape)
        return self.checkpoint.read(name, codes)

    def _detect(self, name: str, header: TensorHeader) -> StoredFormat:
        if len(header.shape) != 2:
            return StoredFormat("plain", header.shape)
        where = f"{self.checkpoint.path(name)}: {name}"
        if name.endswith(".weight") and header.dtype == "F8_E4M3":
            return self._fp8(where, header)
        if name.endswith(".weight") and header.dtype in ("I8", "U8"):
            return self._four_bits(where, header)
        if name.endswith(".weight_packed") and header.dtype == "U8":
            shape = (header.shape[0], header.shape[1] * 2)
            companions = self._companions(where, module_of(name), COMPRESSED_TENSORS.companions)
            found = self._found(name, {"input_scale": COMPRESSED_TENSORS.input_scale})
            return StoredFormat("nvfp4", shape, companions | found)
        if name.endswith(".weight_packed") and header.dtype == "I32":
            return self._int4(where, header)
        return StoredFormat("plain", header.shape)

    def _found(self, name: str, leaves: dict[str, str]) -> dict[str, str]:
        """Role -> tensor name of those companions that the checkpoint has, beside tensor `name`."""
        found = {role: f"{module_of(name)}.{leaf}" for role, leaf in leaves.items()}
        return {role: companion for role, companion in found.items() if companion in self.checkpoint.tensors}

    def _companions(self, where: str, module: str, leaves: dict[str, str]) -> dict[str, str]:
        missing = [leaf for leaf in leaves.values() if f"{module}.{leaf}" not in self.checkpoint.tensors]
        if missing:
            raise SourceError(f"{where}: low-bit weight without {', '.join(missing)}; get a whole copy")
        return {role: f"{module}.{leaf}" for role, leaf in leaves.items()}

    def _fp8(self, where: str, header: TensorHeader) -> StoredFormat:
        tensors, shape = self.checkpoint.tensors, header.shape
        spelled = (f"{module_of(header.name)}.{leaf}" for leaf in FP8_SCALES)
        scale = next((tensors[name] for name in spelled if name in tensors), None)
        if scale is None:
            raise SourceError(f"{where}: F8_E4M3 weight without a scale (.scale, .weight_scale_inv or .weight_scale)")
        further = self._found(header.name, {"input_scale": "input_scale", "input_bound": "input_scale_ub"})
        # Tables whose rows are looked up one by one have a scale for each part of a row, whatever tile the others have.
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
            f"{where}: F8_E4M3 {list(shape)} in tiles of {list(declared)} needs {list(_grid(shape, declared))} scales, per "
            f"channel [{shape[0]}, 1], per tensor [1], in F32, BF16 or F16; {scale.name} is {scale.dtype} "
            f"{list(scale.shape)}; check weight_block_size in config.json"
        )

    def _four_bits(self, where: str, header: TensorHeader) -> StoredFormat:
        """A weight of bytes that each hold two E2M1 codes."""
        tensors, (rows, columns) = self.checkpoint.tensors, (header.shape[0], header.shape[1] * 2)
        leaves = {"mxfp4": "scale", **NVIDIA.companions, "input_scale": NVIDIA.input_scale}
        found = self._found(header.name, leaves)
        mxfp4 = tensors.get(found.pop("mxfp4", ""))
        if mxfp4 is not None and mxfp4.dtype == "F8_E8M0":
            if mxfp4.shape != (rows, columns // MXFP4_GROUP) or columns % MXFP4_GROUP:
                raise SourceError(
                    f"{where}: MXFP4 {[rows, columns]} needs group scales [{rows}, {columns}/32], {mxfp4.name} has "
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
                    f"{where}: NVFP4 {[rows, columns]} of modelopt needs weight_scale F8_E4M3 [{rows}, {columns}/16], "
                    f"weight_scale_2 and input_scale F32 [1]; found {group.dtype} {list(group.shape)} and "
                    f"{', '.join(f'{scale.dtype} {list(scale.shape)}' for scale in single)}"
                )
            return StoredFormat("modelopt_nvfp4", (rows, columns), found)
        int8 = header.dtype == "I8" and "group_scale" in found
        why = (
            "is stored as INT8, which is not undone here"
            if int8
            else "has companions that match neither MXFP4 nor NVFP4"
        )
        raise SourceError(f"{where}: {header.dtype} weight {why}; {REMEDY}")

    def _int4(self, where: str, header: TensorHeader) -> StoredFormat:
        """compressed-tensors' pack-quantized with 4 bits: eight values of a row in an int32, the first in the low bits, each
        8 too large; scales `[M, K/group]`, perhaps zero points packed along the rows and a group for each column."""
        tensors, (rows, columns) = self.checkpoint.tensors, (header.shape[0], header.shape[1] * _INT4_PACKED)
        bits = {weights.get("num_bits") for weights in _weights_arguments(self.checkpoint.config, "int")}
        if bits != {4}:
            said = (
                f"num_bits {', '.join(map(str, bits))}"
                if bits
                else "no config group of integers, which would tell num_bits"
            )
            raise SourceError(
                f"{where}: pack-quantized, and config.json has {said}; num_bits 4 alone is undone here; {REMEDY}"
            )
        companions = self._companions(where, module_of(header.name), {"group_scale": "weight_scale"}) | self._found(
            header.name, {"shape": "weight_shape", "zero_point": "weight_zero_point", "group_index": "weight_g_idx"}
        )
        scale = tensors[companions["group_scale"]]
        groups = scale.shape[1] if len(scale.shape) == 2 else 0
        wanted = {"zero_point": (-(-rows // _INT4_PACKED), groups), "group_index": (columns,)}
        misfits = [tensors[companions[r]] for r in wanted if r in companions and (
            tensors[companions[r]].shape != wanted[r] or tensors[companions[r]].dtype not in ("I32", "I64"))]  # fmt: skip
        if not groups or scale.shape[0] != rows or columns % groups or scale.dtype not in ("F32", "BF16", "F16"):
            misfits.append(scale)
        if misfits:
            raise SourceError(
                f"{where}: INT4 {[rows, columns]} needs scales [{rows}, groups] that divide it, zero points "
                f"[{rows}/8, groups] and column groups [{columns}] of int32; "
                f"{', '.join(f'{bad.name} is {bad.dtype} {list(bad.shape)}' for bad in misfits)}"
            )
        return StoredFormat("int4", (rows, columns), companions)


def dequantize(
    stored: StoredFormat,
    tensor: torch.Tensor,
    scales: dict[str, torch.Tensor],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Undoes a stored format on the tensor's device: float `[M, K]` of `dtype`, one rounding from float32; into `out`,
    where one is given (contiguous, of that shape and dtype). The result is the caller's own memory: a plain tensor is
    copied even where it has the dtype, since `tensor` may be the file's memory map."""
    if tensor.device.type == "cpu" and dtype == torch.bfloat16 and native.compiled() and tensor.is_contiguous():
        # Of a weight that is cut into stripes the tensor is some rows.
        into = torch.empty((tensor.shape[0], stored.shape[-1]), dtype=dtype) if out is None else out
        if _dequantize_compiled(stored, tensor, scales, into):
            return into
    if stored.kind == "plain" and out is not None:
        return out.copy_(tensor)
    value = _dequantize(stored, tensor, scales, dtype)
    return value if out is None else out.copy_(value)


def _dequantize_compiled(
    stored: StoredFormat, tensor: torch.Tensor, scales: dict[str, torch.Tensor], out: torch.Tensor
) -> bool:
    """Fills `out` `[M, K]` (BF16) where C knows the stored format."""
    codes, into = tensor.data_ptr(), out.data_ptr()
    if stored.kind == "fp8_tiles" and stored.tile is not None:
        grid = scales["tile_scale"].to(torch.float32).contiguous()
        native.call("fp8_to_bf16", codes, *tensor.shape, grid.data_ptr(), *stored.tile, into)
    elif stored.kind == "mxfp4":
        scale = scales["group_scale"].to(torch.float32).contiguous()
        native.call("mxfp4_to_bf16", codes, scale.data_ptr(), scale.numel(), into)
    else:
        return False
    return True


def _dequantize(
    stored: StoredFormat, tensor: torch.Tensor, scales: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    if stored.kind == "fp8_tiles":
        assert stored.tile is not None
        grid = scales["tile_scale"].to(torch.float32)
        rows, columns = tensor.shape
        expanded = grid.repeat_interleave(stored.tile[0], 0)[:rows].repeat_interleave(stored.tile[1], 1)[:, :columns]
        return (tensor.to(torch.float32) * expanded).to(dtype)
    if stored.kind == "mxfp4":
        # float8_e8m0fnu -> float32 already is 2^(e-127): the exponent must not be applied again.
        return _scaled(tensor, scales["group_scale"].to(torch.float32), MXFP4_GROUP).to(dtype)
    if stored.kind == "nvfp4":
        return nvfp4.dequantize(tensor, scales["group_scale"], scales["global_scale"]).to(dtype)
    if stored.kind == "modelopt_nvfp4":
        # modelopt's weight_scale_2 is the inverse of compressed-tensors' global scale.
        effective = scales["group_scale"].to(torch.float32) * scales["global_scale"].to(torch.float32)
        return _scaled(tensor.view(torch.uint8), effective, nvfp4.GROUP).to(dtype)
    if stored.kind in ("fp8_tensor", "fp8_channel"):
        scale = scales["tensor_scale" if stored.kind == "fp8_tensor" else "channel_scale"].reshape(-1, 1)
        return (tensor.to(scale.dtype) * scale).to(dtype)
    if stored.kind == "int4":
        return _int4_values(tensor, scales).to(dtype)
    return tensor.to(dtype, copy=True)


def _int4_values(packed: torch.Tensor, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    """int32 `[M, K/8]` -> `[M, K]` in the scale's dtype. A column whose group is none becomes NaN."""
    scale, shifts = scales["group_scale"], torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    offset = 1 << 3
    rows, columns = packed.shape[0], packed.shape[1] * _INT4_PACKED
    codes = ((packed.unsqueeze(-1) >> shifts & 0xF) - offset).reshape(rows, columns).to(scale.dtype)
    zero = None
    if "zero_point" in scales:
        zero = (scales["zero_point"].unsqueeze(1) >> shifts.unsqueeze(-1) & 0xF) - offset
        zero = zero.reshape(-1, scale.shape[1])[:rows].to(scale.dtype)
    group = scales.get("group_index")
    if group is not None and not bool((group == -1).all()):  # -1 throughout: no order was chosen
        known, at = (group >= 0) & (group < scale.shape[1]), group.clamp(0, scale.shape[1] - 1).long()
        codes = codes - zero[:, at] if zero is not None else codes
        return codes * torch.where(known, scale[:, at], torch.nan)
    grouped = codes.reshape(rows, scale.shape[1], -1)
    grouped = grouped - zero.unsqueeze(-1) if zero is not None else grouped
    return (grouped * scale.unsqueeze(-1)).reshape(rows, columns)


def _scaled(packed: torch.Tensor, group_scale: torch.Tensor, group: int) -> torch.Tensor:
    values = nvfp4.unpack(packed)
    return (values.reshape(values.shape[0], -1, group) * group_scale.unsqueeze(-1)).reshape(values.shape)


def cast_dtype(written: str, plain: torch.dtype) -> torch.dtype:
    """The dtype in which a cast makes an output tensor of safetensors dtype `written`: tile scales in their own, everything
    else in the recipe's `plain` one."""
    return TORCH[written] if written in ("F32", "F8_E8M0") else plain


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf. Both show in the extremes, which cost a twentieth of torch.isfinite."""
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = torch.aminmax(value.to(torch.float32) if value.element_size() == 1 else value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def is_positive(scale: torch.Tensor) -> bool:
    """Whether all values are finite and above zero."""
    if not scale.numel():
        return True
    low, high = torch.aminmax(scale.to(torch.float32))
    return bool((low > 0) & torch.isfinite(high))


def check_finite(value: torch.Tensor, where: str) -> None:
    """Raises SourceError naming `where` and the first bad position when a floating tensor holds NaN or Inf."""
    if is_finite(value):
        return
    bad = (~torch.isfinite(value.to(torch.float32))).nonzero()
    raise SourceError(
        f"{where}: {len(bad)} of {value.numel()} values are NaN or Inf, the first at {bad[0].tolist()}; "
        "the source is damaged or was made with an overflow: get a whole copy"
    )


def _weights_arguments(config: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The `weights` of compressed-tensors' config groups whose type is `kind`."""
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    found = [group.get("weights") or {} for group in groups.values()]
    return [weights for weights in found if weights.get("type") == kind]


def _configured_tile(config: dict[str, Any]) -> tuple[int, int] | None:
    """The tile that config.json names: transformers' `weight_block_size`, compressed-tensors' `block_structure`."""
    size = (config.get("quantization_config") or {}).get("weight_block_size")
    sizes = [size] if size else [weights.get("block_structure") for weights in _weights_arguments(config, "float")]
    return next(((int(size[0]), int(size[1])) for size in sizes if isinstance(size, list)), None)


def _grid(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))


def _row_group(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int] | None:
    """A tile of one row, where each row has several scales, for groups of a power of two of columns; None elsewhere.
    DeepSeek-V4.1's Engram tables (`engram.embed.weight` `[rows, 256]`, scales `[rows, 8]`, beside tiles of 32x32)."""
    if len(grid) != 2 or grid[0] != shape[0] or grid[1] < 2:
        return None
    return next(((1, side) for side in _SIDES if side * grid[1] == shape[1]), None)


def _tile_of(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int] | None:
    """The tile of a weight whose config names none: 128x128 where that fits, otherwise the one pair of powers of two that
    cuts the weight into this grid of scales; None where there are none or several."""
    if len(grid) != 2 or grid == _grid(shape, (128, 128)):
        return (128, 128)
    sides = [{t for t in _SIDES if -(-n // t) == parts} for n, parts in zip(shape, grid, strict=True)]
    rows, columns = ({128} if 128 in found else found for found in sides)
    return (rows.pop(), columns.pop()) if len(rows) == len(columns) == 1 else None
