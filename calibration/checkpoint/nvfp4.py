"""NVFP4 arithmetic in plain torch: pack, unpack, dequantize. Bit-identical to compressed-tensors.

A weight `[M, K]` is cut into groups of 16 along K. With the global scale `g` (float32, a divisor: 448 * 6 / amax) and
the group scale `s` (float8_e4m3fn), a value is stored as the E2M1 code nearest to `x / (s / g)`, ties to even.
Source: compressed_tensors.quantization.lifecycle.forward_helpers._quantize, compressors/nvfp4/helpers.py (0.19).
"""

from __future__ import annotations

import ctypes

import torch

from calibration.checkpoint import native

GROUP = 16
#: Values of the E2M1 codes 0..15; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: Largest E4M3 times largest E2M1 value: the numerator of a global scale.
RANGE = 448.0 * 6.0

#: Rows per step, so that the working set of a step fits a core's cache.
_ROWS = 64


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """E2M1 code (uint8, 0..15) nearest to each float32 value, ties to even, saturating at +-6.

    The grid is uniform in three pieces, so that the magnitude code is the smallest of three round-to-nearest-even
    results.
    """
    magnitude = values.abs()
    codes = torch.round(magnitude * 2)
    torch.minimum(codes, torch.round(magnitude).add_(2), out=codes)
    torch.minimum(codes, torch.round(magnitude.mul_(0.5)).add_(4), out=codes)
    codes = codes.clamp_(max=7).to(torch.uint8)
    return codes | (values < 0).to(torch.uint8).mul_(8)


def paired(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes uint8 `[M, K]` -> packed `[M, K/2]`: element 0 of a pair in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def pack(weight: torch.Tensor, group_scale: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Packs a weight: `[M, K]` float, group scale `[M, K/16]`, global scale `[1]` -> uint8 `[M, K/2]` and the relative
    error `|dequantized - weight| / |weight|` (Frobenius norms).

    Raises ValueError if K is not a multiple of 16.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(f"K = {columns} is not a multiple of {GROUP}")
    effective = group_scale.to(torch.float32) / global_scale.to(torch.float32)
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    if native.compiled() and weight.device.type == "cpu" and weight.dtype in native.TORCH_FLOATS:
        return packed, _pack_compiled(weight.contiguous(), effective.contiguous(), packed)
    values = torch.tensor(E2M1, dtype=torch.float32, device=weight.device)
    error = torch.zeros((), dtype=torch.float64, device=weight.device)
    norm = torch.zeros_like(error)
    step = _ROWS if weight.device.type == "cpu" else rows
    for begin in range(0, rows, step):
        stripe = weight[begin : begin + step].to(torch.float32).reshape(-1, columns // GROUP, GROUP)
        scale = effective[begin : begin + step].unsqueeze(-1)
        codes = e2m1_codes(stripe / scale)
        error += (values[codes.int()] * scale - stripe).square().sum(dtype=torch.float64)
        norm += stripe.square().sum(dtype=torch.float64)
        packed[begin : begin + step] = paired(codes.flatten(-2))
    return packed, float((error / norm.clamp_min(1e-300)).sqrt())


def _pack_compiled(weight: torch.Tensor, effective: torch.Tensor, packed: torch.Tensor) -> float:
    sums = (ctypes.c_double * 2)()
    dtype, groups = native.TORCH_FLOATS[weight.dtype], weight.numel() // GROUP
    native.call(
        "pack_scaled", dtype, weight.data_ptr(), groups, effective.data_ptr(), packed.data_ptr(), ctypes.addressof(sums)
    )
    return float((sums[0] / max(sums[1], 1e-300)) ** 0.5)


def observed_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """The weight global scale float32 `[1]` that compressed-tensors computes (generate_gparam) for the largest magnitude `[1]`
    of a fused group, in the dtype of `amax`: that of the weight in the model."""
    scale = RANGE / amax.clamp(min=torch.finfo(amax.dtype).tiny)
    return torch.nan_to_num(scale, nan=1.0, posinf=1.0, neginf=1.0).to(torch.float32)


def observed_group_scales(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """The group scales float8_e4m3fn `[M, K/16]` that compressed-tensors computes (calculate_qparams) from the extremes of
    every group of a weight `[M, K]`; `global_scale` float32 `[1]`. Magnitudes and their sixths have the weight's dtype."""
    largest = weight.reshape(weight.shape[0], -1, GROUP).abs().amax(-1)
    scale = global_scale * (largest / torch.tensor(E2M1[7], dtype=weight.dtype, device=weight.device))
    rounded = scale.clamp(max=RANGE / E2M1[7]).to(torch.float8_e4m3fn)
    return torch.where(rounded.to(torch.float32) == 0, torch.tensor(0.125), rounded.to(torch.float32)).to(rounded.dtype)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 `[M, K/2]` -> the E2M1 values as float32 `[M, K]`."""
    values = torch.tensor(E2M1, dtype=torch.float32, device=packed.device)
    bytes_ = packed.view(torch.uint8)
    codes = torch.stack((bytes_ & 0xF, bytes_ >> 4), dim=-1).flatten(-2)
    return values[codes.int()]


def dequantize(packed: torch.Tensor, group_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Packed weight `[M, K/2]`, group scale `[M, K/16]`, global scale `[1]` -> float32 `[M, K]`."""
    effective = group_scale.to(torch.float32) / global_scale.to(torch.float32)
    values = unpack(packed)
    return (values.reshape(*effective.shape, GROUP) * effective.unsqueeze(-1)).reshape(values.shape)


def quantize_dequantize(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """`x [..., K]` to NVFP4 and back, in its dtype: a dynamic E4M3 group scale per 16 values under the global scale `[1]`, E2M1
    values, ties to even. Equal to compressed-tensors' fake_quantize in float32."""
    flat = x.reshape(-1, x.shape[-1])
    largest = flat.to(torch.float32).view(flat.shape[0], flat.shape[1] // GROUP, GROUP).abs().amax(-1)
    scale = (global_scale * (largest / 6)).clamp(max=RANGE / 6).to(torch.float8_e4m3fn)
    # A group below E4M3's smallest value takes 0.125, as the packed weights do.
    scale = torch.where(scale.to(torch.float32) == 0, 0.125, scale.to(torch.float32)).to(torch.float8_e4m3fn)
    packed, _ = pack(flat, scale, global_scale)
    return dequantize(packed, scale, global_scale).to(x.dtype).reshape(x.shape)
