"""Computes statistics of stored weights and quantizes them to NVFP4, stripe by stripe; the C code needs no dequantized
copy.

A stripe is some whole rows of one stored weight: uint8 `[rows, bytes of a row]` and its scale companion. The output
bytes equal those of compressed-tensors in float32 with the same global scale: code = e4m3(gs * (amax / 6)), 0 becomes
0.125; effective = code / gs; v = x / effective; ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from calibration.checkpoint import native, nvfp4
from calibration.checkpoint.dequantize import MXFP4_GROUP, StoredFormat, dequantize, is_finite
from calibration.checkpoint.index import TORCH
from calibration.checkpoint.nvfp4 import GROUP, RANGE

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

#: float32 values of the 256 E4M3 and E8M0 codes (0x7f, 0xff of E4M3 and 0xff of E8M0 are NaN).
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
E8M0 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32).numpy()
_E2M1 = np.array(nvfp4.E2M1, np.float32)
#: E4M3 codes of 2^-9 ... 2^8, and the largest of these exponents.
_POWERS = torch.exp2(torch.arange(-9.0, 9.0)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
LARGEST_POWER, POWERS = 8, len(_POWERS)
#: Rows that torch dequantizes at a time; a multiple of every common tile height.
_TORCH_ROWS = 128
_E8M0_BIAS, E8M0_NAN = 127, 0xFF


class NotFinite(ValueError):
    """Raised if a weight or its scale is NaN or Inf, or a scale is negative; the caller adds the tensor's name."""


@dataclass
class Stripe:
    """Whole rows of a stored weight. `codes` is uint8 `[rows, row bytes]`; `scales` is float32 `[tile rows, tile
    columns]` for FP8 tiles (the stripe begins at a tile), uint8 E8M0 codes `[rows, K/32]` for MXFP4, otherwise None;
    `companions` are those of every other format, as stored, by role, cut to the stripe's rows if they have rows. `amax`
    fills `maxima`, so that `quantize` need not scan FP8 codes again; `moved` holds the codes on the GPU."""

    stored: StoredFormat
    dtype: str
    codes: Bytes
    scales: Floats | Bytes | None = None
    maxima: Bytes | None = None
    moved: torch.Tensor | None = None
    companions: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: StoredFormat, dtype: str, codes: Bytes, companions: dict[str, torch.Tensor]) -> Stripe:
        """The stripe of `codes` and its scale companions as stored, by role, cut to the stripe's rows."""
        if stored.kind == "fp8_tiles":
            return cls(stored, dtype, codes, np.ascontiguousarray(companions["tile_scale"].to(torch.float32).numpy()))
        if stored.kind == "mxfp4":
            return cls(stored, dtype, codes, companions["group_scale"].view(torch.uint8).numpy())
        return cls(stored, dtype, codes, companions=companions)

    @property
    def rows(self) -> int:
        return int(self.codes.shape[0])

    @property
    def columns(self) -> int:
        return self.stored.shape[1]

    @property
    def compiled(self) -> bool:
        """Whether the C code handles the stripe: it supports this format (torch supports all) and there is no GPU."""
        if native.level() == "cuda" or not native.compiled():
            return False
        if self.stored.kind == "fp8_tiles":
            return self.stored.tile is not None and self.stored.tile[1] % GROUP == 0
        return self.stored.kind == "mxfp4" or (self.stored.kind == "plain" and self.dtype in native.FLOATS)


def global_scale(amax: float) -> np.float32:
    """The weight global scale for a largest magnitude, as compressed-tensors' generate_gparam computes it: the float32
    reciprocal of `amax` times 2688; 1.0 if that overflows (all weights zero)."""
    with np.errstate(over="ignore"):
        scale = np.float32(1) / np.float32(max(amax, float(np.finfo(np.float32).tiny))) * np.float32(RANGE)
    return scale if np.isfinite(scale) else np.float32(1)


def amax(stripe: Stripe) -> float:
    """Largest magnitude of the stripe's values, exact in float32. Raises NotFinite."""
    check_scales(stripe)
    if not stripe.compiled:
        largest = max(float(part.abs().amax()) for _, part in parts(stripe))
    elif stripe.stored.kind == "fp8_tiles":
        largest = _fp8_amax(stripe)
    elif stripe.stored.kind == "mxfp4":
        assert stripe.scales is not None
        maxima = _mxfp4_maxima(stripe)
        # 2^127 * 6 overflows to Inf, which is refused below.
        with np.errstate(over="ignore"):
            largest = float((_E2M1[maxima] * E8M0[stripe.scales.reshape(-1)]).max(initial=0))
    else:
        bits = int(native.call("float_amax", native.FLOATS[stripe.dtype], stripe.codes.ctypes.data,
                               stripe.rows * stripe.columns))  # fmt: skip
        largest = float(torch.tensor([bits], dtype=torch.uint32).view(torch.float32)) if stripe.dtype == "F32" else float(
            torch.tensor([bits], dtype=torch.uint16).view(TORCH[stripe.dtype])
        )  # fmt: skip
    if not np.isfinite(largest):
        raise NotFinite("holds NaN or Inf, or its values overflow float32")
    return largest


def quantize(stripe: Stripe, scale: np.float32, packed: Bytes, group_scales: Bytes) -> None:
    """Quantizes with global scale `scale` into `packed` uint8 `[rows, K/2]` and `group_scales` uint8 (E4M3) `[rows,
    K/16]`, both C-contiguous. `amax` must have processed the stripe before."""
    if not stripe.compiled:
        _torch_quantize(stripe, scale, packed, group_scales)
        return
    codes, out, scales = stripe.codes.ctypes.data, packed.ctypes.data, group_scales.ctypes.data
    if stripe.stored.kind == "fp8_tiles":
        assert stripe.stored.tile is not None and stripe.scales is not None
        if stripe.maxima is None:
            _fp8_amax(stripe)
        assert stripe.maxima is not None
        native.call("fp8_quantize", codes, stripe.rows, stripe.columns, stripe.maxima.ctypes.data,
                    stripe.scales.ctypes.data, *stripe.stored.tile, float(scale), out, scales)  # fmt: skip
    elif stripe.stored.kind == "mxfp4":
        assert stripe.scales is not None
        values = np.ascontiguousarray(E8M0[stripe.scales])
        native.call("mxfp4_quantize", codes, values.ctypes.data, values.size, float(scale), out, scales)
    else:
        groups = stripe.rows * stripe.columns // GROUP
        native.call("float_quantize", native.FLOATS[stripe.dtype], codes, groups, float(scale), out, scales)


def exponents(stripe: Stripe) -> tuple[int, int] | None:
    """Smallest and largest power-of-two exponent among the group scales of an MXFP4 stripe, ignoring all-zero groups;
    None if all values are zero. Raises NotFinite."""
    assert stripe.scales is not None
    scales = stripe.scales.view(np.uint8)
    span = scale_exponents(scales)
    if fits_e4m3(span):
        return span
    used = scales.reshape(-1)[_mxfp4_maxima(stripe) > 0]
    return scale_exponents(used) if used.size else None


def scale_exponents(scales: Bytes) -> tuple[int, int]:
    """Smallest and largest power-of-two exponent among E8M0 codes. Raises NotFinite."""
    if bool((scales == E8M0_NAN).any()):
        raise NotFinite("has a NaN among its group scales")
    return int(scales.min()) - _E8M0_BIAS, int(scales.max()) - _E8M0_BIAS


def fits_e4m3(span: tuple[int, int]) -> bool:
    """Whether E4M3 represents all powers of two of a span under one global scale."""
    return span[1] - span[0] < POWERS


def common_lossless_scale(spans: Iterable[tuple[int, int] | None]) -> np.float32 | None:
    """The `lossless_scale` of several weights together, from the `exponents` of each; 1.0 if all weights are zero."""
    found = [span for span in spans if span is not None]
    return lossless_scale(min(s[0] for s in found), max(s[1] for s in found)) if found else np.float32(1)


def lossless_scale(low: int, high: int) -> np.float32 | None:
    """The power-of-two global scale that makes every 2^low ... 2^high an exact E4M3 group scale, or None: E4M3
    represents 2^-9 ... 2^8, and the global scale must be a normal float32."""
    exponent = LARGEST_POWER - high
    if not fits_e4m3((low, high)) or not -126 <= exponent <= 127:
        return None
    return np.float32(2.0**exponent)


def respell(stripe: Stripe, scale: np.float32, packed: Bytes, group_scales: Bytes) -> None:
    """Converts MXFP4 to NVFP4 without loss: copies codes, writes each E8M0 scale twice as E4M3 under `scale` (see
    lossless_scale)."""
    assert stripe.scales is not None
    shift = int(np.log2(scale)) - _E8M0_BIAS - (LARGEST_POWER - POWERS + 1)
    # A group of zeros may have any scale; it gets the nearest one in E4M3.
    table = _POWERS[np.clip(np.arange(256) + shift, 0, POWERS - 1)]
    packed[:] = stripe.codes
    spelled = group_scales.reshape(stripe.rows, -1, MXFP4_GROUP // GROUP)
    spelled[:] = table[stripe.scales][..., None]


def check_scales(stripe: Stripe) -> None:
    """Raises NotFinite if a scale companion is NaN, Inf or negative."""
    if stripe.stored.kind == "mxfp4":
        assert stripe.scales is not None
        if bool((stripe.scales == E8M0_NAN).any()):
            raise NotFinite("has a NaN among its group scales")
    elif stripe.scales is not None and not bool(((stripe.scales >= 0) & np.isfinite(stripe.scales)).all()):
        raise NotFinite("has a negative or non-finite scale")
    floating = (scale.to(torch.float32) for scale in stripe.companions.values() if scale.is_floating_point())
    if not all(bool(((scale >= 0) & torch.isfinite(scale)).all()) for scale in floating):
        raise NotFinite("has a negative or non-finite scale")


def finite(dtype: str, data: Bytes) -> bool:
    """Whether all values are finite; integers always are. `data` is flat and contains whole elements."""
    if not data.size:
        return True
    if native.compiled() and dtype in native.FLOATS:
        bits = native.call("float_amax", native.FLOATS[dtype], data.ctypes.data, data.nbytes // TORCH[dtype].itemsize)
        return bits < {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}[dtype]
    if native.compiled() and dtype == "F8_E4M3" and data.size % GROUP == 0:
        return bool((_group_maxima(data) != 0x7F).all())
    if dtype not in TORCH or not TORCH[dtype].is_floating_point:
        return True
    return is_finite(torch.from_numpy(data).view(TORCH[dtype]))


def _fp8_amax(stripe: Stripe) -> float:
    assert stripe.stored.tile is not None and stripe.scales is not None
    stripe.maxima = _group_maxima(stripe.codes)
    groups, (tile_rows, tile_columns) = stripe.columns // GROUP, stripe.stored.tile
    row = np.empty(groups, np.uint8)
    return native.call("fp8_amax", stripe.maxima.ctypes.data, stripe.rows, groups, stripe.scales.ctypes.data,
                       tile_rows, tile_columns // GROUP, row.ctypes.data)  # fmt: skip


def _group_maxima(codes: Bytes) -> Bytes:
    maxima = np.empty(codes.size // GROUP, np.uint8)
    native.call("fp8_maxima", codes.ctypes.data, maxima.size, maxima.ctypes.data)
    return maxima


def _mxfp4_maxima(stripe: Stripe) -> Bytes:
    """Largest magnitude code 0..7 of every group of 32, flat."""
    groups = stripe.codes.size // (MXFP4_GROUP // 2)
    if native.compiled():
        maxima = np.empty(groups, np.uint8)
        native.call("mxfp4_maxima", stripe.codes.ctypes.data, groups, maxima.ctypes.data)
        return maxima
    grouped = stripe.codes.reshape(groups, -1)
    both: Bytes = np.maximum(grouped & 7, grouped >> 4 & 7).max(axis=1)
    return both


def parts(stripe: Stripe) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first row, float32 values) in steps that fit the cache; at level cuda all rows at once, dequantized on
    the GPU, to which their bytes are copied once."""
    tile_rows = stripe.stored.tile[0] if stripe.stored.tile else 1
    step = stripe.rows if native.level() == "cuda" else math.lcm(_TORCH_ROWS, tile_rows)
    if stripe.moved is None:
        stripe.moved = torch.from_numpy(stripe.codes).to(native.device())
    for begin in range(0, stripe.rows, step):
        yield begin, _values(stripe, stripe.moved, begin, min(begin + step, stripe.rows))


def _values(stripe: Stripe, codes: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    scales: dict[str, torch.Tensor] = {}
    if stripe.stored.kind == "fp8_tiles":
        assert stripe.stored.tile is not None and stripe.scales is not None
        rows = stripe.stored.tile[0]
        grid = torch.from_numpy(stripe.scales[begin // rows : -(-end // rows)])
        scales = {"tile_scale": grid.to(codes.device)}
    elif stripe.stored.kind == "mxfp4":
        assert stripe.scales is not None
        scales = {"group_scale": torch.from_numpy(E8M0[stripe.scales[begin:end]]).to(codes.device)}
    for role, companion in stripe.companions.items():
        part = stripe.stored.companion_rows(role, begin, end)
        scales[role] = (companion if part is None else companion[slice(*part)]).to(codes.device)
    return dequantize(stripe.stored, codes[begin:end].view(TORCH[stripe.dtype]), scales, torch.float32)


def _torch_quantize(stripe: Stripe, scale: np.float32, packed: Bytes, group_scales: Bytes) -> None:
    # Both are on the values' device: CUDA divides by a number, or by a scalar on the CPU, by multiplying with the
    # reciprocal, up to 1 ulp off (ATen's BinaryDivTrueKernel.cu).
    glob = torch.tensor([scale], device=native.device())
    six = torch.tensor([6.0], device=native.device())
    for begin, values in parts(stripe):
        end = begin + values.shape[0]
        groups = values.reshape(values.shape[0], -1, GROUP)
        rounded = (glob * (groups.abs().amax(-1) / six)).clamp(max=448).to(torch.float8_e4m3fn).to(torch.float32)
        codes = torch.where(rounded == 0, 0.125, rounded)
        nibbles = nvfp4.e2m1_codes(groups / (codes / glob).unsqueeze(-1)).flatten(-2)
        packed[begin:end] = nvfp4.paired(nibbles).cpu().numpy()
        group_scales[begin:end] = codes.to(torch.float8_e4m3fn).view(torch.uint8).cpu().numpy()
