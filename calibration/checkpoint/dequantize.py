"""Describes the stored format of one weight and dequantizes it.

Each format is dequantized bit for bit as by the library that wrote it: FP8 tiles, MXFP4: value times scale in float32,
rounded once to the wanted dtype (transformers 5.17's Fp8Dequantize, integrations/finegrained_fp8.py). FP8 per tensor
and per channel, INT4: in the scale's dtype, then rounded to the wanted one (compressed_tensors 0.19's
quantization/lifecycle/forward_helpers.py, _dequantize; packing in compressors/pack_quantized/helpers.py). modelopt's
NVFP4: E2M1 times the float32 product of both scales, element 0 in the low nibble (Model-Optimizer's
modelopt/torch/quantization/qtensor/nvfp4_tensor.py, dequantize).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from calibration.checkpoint import native, nvfp4
from calibration.checkpoint.index import TORCH
from recipes.errors import SourceError

Kind = Literal["plain", "fp8_tiles", "fp8_tensor", "fp8_channel", "mxfp4", "int4", "nvfp4", "modelopt_nvfp4"]

MXFP4_GROUP = 32
#: INT4 values in an int32; zero points, if packed too, are packed along the rows.
INT4_PACKED = 8
#: Dimensions of the MXFP4 codes of all experts of a block.
_STACKED = 4
#: Roles of companions that do not affect the values: how activations were quantized, and a shape that headers contain.
_VALUELESS = frozenset({"input_scale", "input_bound", "shape"})
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
        """Role -> tensor name of the companions that affect the values."""
        return {role: name for role, name in self.companions.items() if role not in _VALUELESS}

    def companion_rows(self, role: str, begin: int, end: int) -> tuple[int, int] | None:
        """Rows [first, last) of a companion that belong to the weight's rows [begin, end), where `begin` is a multiple
        of the tile height and of 8; None if the whole companion belongs to them."""
        height = {"group_scale": 1, "channel_scale": 1, "zero_point": INT4_PACKED}.get(role)
        if role == "tile_scale" and self.tile is not None:
            height = self.tile[0]
        return None if height is None else (begin // height, -(-end // height))


def dequantize(
    stored: StoredFormat,
    tensor: torch.Tensor,
    scales: dict[str, torch.Tensor],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantizes on the tensor's device to float `[M, K]` of `dtype`, with one rounding from float32, into `out` if it
    is given (contiguous, of that shape and dtype). The result never shares memory with `tensor`, which may be the
    file's memory map. MXFP4 of stacked experts, codes `[E, M, K/32, 16]` and scales uint8 `[E, M, K/32]`, becomes
    `[E, K, M]`, as such experts are stored plain."""
    if tensor.dim() == _STACKED:
        return _dequantize_stacked(tensor, scales["group_scale"], dtype, out)
    if tensor.device.type == "cpu" and dtype == torch.bfloat16 and native.compiled() and tensor.is_contiguous():
        # If the weight is processed in stripes, the tensor has only some of its rows.
        into = torch.empty((tensor.shape[0], stored.shape[-1]), dtype=dtype) if out is None else out
        if _dequantize_compiled(stored, tensor, scales, into):
            return into
    if stored.kind == "plain" and out is not None:
        return out.copy_(tensor)
    value = _dequantize(stored, tensor, scales, dtype)
    return value if out is None else out.copy_(value)


def _dequantize_stacked(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    experts, rows, groups, _ = codes.shape
    one = StoredFormat("mxfp4", (rows, groups * MXFP4_GROUP))
    made = torch.empty((experts, one.shape[1], rows), dtype=dtype, device=codes.device) if out is None else out
    for expert, value in enumerate(made):
        scale = {"group_scale": scales[expert].view(torch.float8_e8m0fnu)}
        value.copy_(dequantize(one, codes[expert].reshape(rows, -1), scale, dtype).t())
    return made


def _dequantize_compiled(
    stored: StoredFormat, tensor: torch.Tensor, scales: dict[str, torch.Tensor], out: torch.Tensor
) -> bool:
    """Fills `out` `[M, K]` (BF16) if the C code supports the stored format; returns whether it did."""
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
        # float8_e8m0fnu -> float32 is already 2^(e-127): the exponent must not be applied again.
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
    """int32 `[M, K/8]` -> `[M, K]` in the scale's dtype. A column without a group becomes NaN."""
    scale, shifts = scales["group_scale"], torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    offset = 1 << 3
    rows, columns = packed.shape[0], packed.shape[1] * INT4_PACKED
    codes = ((packed.unsqueeze(-1) >> shifts & 0xF) - offset).reshape(rows, columns).to(scale.dtype)
    zero = None
    if "zero_point" in scales:
        zero = (scales["zero_point"].unsqueeze(1) >> shifts.unsqueeze(-1) & 0xF) - offset
        zero = zero.reshape(-1, scale.shape[1])[:rows].to(scale.dtype)
    group = scales.get("group_index")
    if group is not None and not bool((group == -1).all()):  # all -1: columns were not reordered
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
    """The dtype in which a cast computes an output tensor of safetensors dtype `written`: tile scales keep theirs,
    everything else gets the recipe's `plain` dtype."""
    return TORCH[written] if written in ("F32", "F8_E8M0") else plain


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor contains neither NaN nor Inf. Both show in the extremes, which cost a twentieth of
    torch.isfinite; a block has thousands of small tensors, so Python judges the two numbers (9 us instead of 25)."""
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = torch.aminmax(value.to(torch.float32) if value.element_size() == 1 else value)
    return math.isfinite(low) and math.isfinite(high)


def is_positive(scale: torch.Tensor) -> bool:
    """Whether all values are finite and positive."""
    if not scale.numel():
        return True
    low, high = torch.aminmax(scale.to(torch.float32))
    return float(low) > 0 and math.isfinite(high)


def check_finite(value: torch.Tensor, where: str) -> None:
    """Raises SourceError that names `where` and the first bad position if a floating tensor contains NaN or Inf."""
    if is_finite(value):
        return
    bad = (~torch.isfinite(value.to(torch.float32))).nonzero()
    raise SourceError(
        f"{where}: {len(bad)} of {value.numel()} values are NaN or Inf, the first at {bad[0].tolist()}; "
        "the source is damaged or its values overflowed when it was made: get a whole copy"
    )
