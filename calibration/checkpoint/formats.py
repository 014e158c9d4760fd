"""Stored formats: how a source keeps a weight (plain, FP8 tiles, MXFP4, NVFP4), found from headers; and undoing them.

Dequantization equals transformers' Fp8Dequantize (integrations/finegrained_fp8.py, 5.17) bit for bit: value and scale
are multiplied in float32 and rounded once to the wanted dtype.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Literal

import torch

from calibration.checkpoint import native, nvfp4
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import TORCH, Checkpoint
from recipes.errors import SourceError, collapsed

Kind = Literal["plain", "fp8_tiles", "mxfp4", "nvfp4", "modelopt_nvfp4"]

FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
MXFP4_GROUP = 32
#: Codes of larger weights get memory of their own; an expert of DeepSeek-V4-Pro takes 22 MB.
_CODE_BYTES = 64 << 20
#: Scale companions of an E4M3 weight, by their suffix behind the module name: DeepSeek-V4's, DeepSeek-V3's and
#: compressed-tensors' (FP8_BLOCK) spelling.
TILE_SCALES = ("scale", "weight_scale_inv", "weight_scale")
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StoredFormat:
    """How one weight is stored. `companions` maps a role (group_scale, global_scale, input_scale, tile_scale) to a
    tensor name; `shape` is the logical `[M, K]`; `tile` the FP8 tile (rows, columns)."""

    kind: Kind
    shape: tuple[int, ...]
    companions: dict[str, str] = field(default_factory=dict)
    tile: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """For tables: `FP8 tiles 128x128`, `MXFP4`, ..."""
        if self.kind == "fp8_tiles" and self.tile:
            return f"FP8 tiles {self.tile[0]}x{self.tile[1]}"
        return {"plain": "plain", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "modelopt_nvfp4": "NVFP4 (modelopt)"}[self.kind]


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
        complete and fitting set of companions."""
        self.checkpoint = checkpoint
        self._memory = threading.local()
        self._formats: dict[str, StoredFormat] = {}
        self._tile = _configured_tile(checkpoint.config)
        problems: list[str] = []
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
            scales = {role: self.checkpoint.read(scale) for role, scale in stored.companions.items()}
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
        tensors, module = self.checkpoint.tensors, module_of(name)
        where = f"{self.checkpoint.path(name)}: {name}"
        if header.dtype == "F8_E4M3" and len(header.shape) == 2 and name.endswith(".weight"):
            tile_scale = next((f"{module}.{s}" for s in TILE_SCALES if f"{module}.{s}" in tensors), None)
            if tile_scale is None:
                raise SourceError(
                    f"{where}: F8_E4M3 weight without a scale (.scale, .weight_scale_inv or .weight_scale)"
                )
            self._check_grid(where, header.shape, tensors[tile_scale])
            return StoredFormat("fp8_tiles", header.shape, {"tile_scale": tile_scale}, self._tile)
        if header.dtype in ("I8", "U8") and name.endswith(".weight") and len(header.shape) == 2:
            shape = (header.shape[0], header.shape[1] * 2)
            scale = tensors.get(f"{module}.scale")
            if scale is not None and scale.dtype == "F8_E8M0":
                if scale.shape != (shape[0], shape[1] // MXFP4_GROUP) or shape[1] % MXFP4_GROUP:
                    raise SourceError(
                        f"{where}: MXFP4 {list(shape)} needs group scales [{shape[0]}, {shape[1]}/32], "
                        f"{scale.name} has {list(scale.shape)}"
                    )
                return StoredFormat("mxfp4", shape, {"group_scale": scale.name})
            group, glob = tensors.get(f"{module}.weight_scale"), tensors.get(f"{module}.weight_scale_2")
            if group is not None and glob is not None:
                companions = {"group_scale": group.name, "global_scale": glob.name}
                if f"{module}.input_scale" in tensors:
                    companions["input_scale"] = f"{module}.input_scale"
                return StoredFormat("modelopt_nvfp4", shape, companions)
            raise SourceError(f"{where}: {header.dtype} weight whose companions match neither MXFP4 nor NVFP4")
        if name.endswith(".weight_packed") and header.dtype == "U8" and len(header.shape) == 2:
            shape = (header.shape[0], header.shape[1] * 2)
            wanted = {"group_scale": "weight_scale", "global_scale": "weight_global_scale"}
            missing = [suffix for suffix in wanted.values() if f"{module}.{suffix}" not in tensors]
            if missing:
                raise SourceError(f"{where}: NVFP4 weight without {', '.join(missing)}")
            companions = {role: f"{module}.{suffix}" for role, suffix in wanted.items()}
            if f"{module}.input_global_scale" in tensors:
                companions["input_scale"] = f"{module}.input_global_scale"
            return StoredFormat("nvfp4", shape, companions)
        return StoredFormat("plain", header.shape)

    def _check_grid(self, where: str, shape: tuple[int, ...], scale: TensorHeader) -> None:
        grid = tuple(math.ceil(n / t) for n, t in zip(shape, self._tile, strict=True))
        if scale.shape != grid:
            raise SourceError(
                f"{where}: F8_E4M3 {list(shape)} in tiles of {list(self._tile)} needs {list(grid)} scales, "
                f"{scale.name} has {list(scale.shape)}; check weight_block_size in config.json"
            )


def dequantize(
    stored: StoredFormat,
    tensor: torch.Tensor,
    scales: dict[str, torch.Tensor],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Undoes a stored format on the tensor's device: float `[M, K]` of `dtype`, one rounding from float32; into `out`,
    where one is given (contiguous, of that shape and dtype)."""
    if tensor.device.type == "cpu" and dtype == torch.bfloat16 and native.compiled() and tensor.is_contiguous():
        # Of a weight that is cut into stripes the tensor is some rows.
        into = torch.empty((tensor.shape[0], stored.shape[-1]), dtype=dtype) if out is None else out
        if _dequantize_compiled(stored, tensor, scales, into):
            return into
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
        return _scaled(tensor, effective, nvfp4.GROUP).to(dtype)
    return tensor.to(dtype)


def _scaled(packed: torch.Tensor, group_scale: torch.Tensor, group: int) -> torch.Tensor:
    values = nvfp4.unpack(packed)
    return (values.reshape(values.shape[0], -1, group) * group_scale.unsqueeze(-1)).reshape(values.shape)


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


def _configured_tile(config: dict[str, object]) -> tuple[int, int]:
    quantization = config.get("quantization_config")
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]), int(size[1])
    return 128, 128
