"""NVFP4 and block-FP8 arithmetic in plain torch, written from the formats' definitions.

Deliberately shares no code with `calibration.checkpoint`, compressed-tensors or vLLM: it is what they are compared to.
"""

from __future__ import annotations

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
"""The eight magnitudes of E2M1 by code; bit 3 of a nibble is the sign."""

GROUP = 16
E4M3_MAX = 448.0


def e2m1_round(v: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 value, ties to the even code, clamped to 6.

    The spacing is 0.5 below 2, 1 below 4, 2 above, so rounding to even multiples of the spacing is ties-to-even.
    """
    magnitude = v.abs().clamp(max=6.0)
    fine, middle, coarse = torch.round(magnitude * 2) / 2, torch.round(magnitude), torch.round(magnitude / 2) * 2
    rounded = torch.where(magnitude <= 2.0, fine, torch.where(magnitude <= 4.0, middle, coarse))
    return torch.copysign(rounded, v)


def group_codes(x: torch.Tensor, divisor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Group scales and scaled values of `x [..., K]` under a global scale (a divisor).

    Returns the E4M3 group scales `[..., K/16]` and the E2M1-rounded values `[..., K]`, both float64.
    """
    grouped = x.double().unflatten(-1, (-1, GROUP))
    scaled = (grouped.abs().amax(-1) / 6.0 * divisor).clamp(max=E4M3_MAX)
    stored = scaled.float().to(torch.float8_e4m3fn).double()
    effective = (stored / divisor).unsqueeze(-1)
    values = torch.where(effective > 0, grouped / effective, torch.zeros_like(grouped))
    return stored, e2m1_round(values).flatten(-2)


def fake_quantize(x: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Dynamic NVFP4 activation quantization: `x [..., K]` quantized with the input global scale and back, float64."""
    stored, values = group_codes(x, divisor)
    return values * (stored / divisor).repeat_interleave(GROUP, -1)


def dequantize(packed: torch.Tensor, group_scale: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Float64 weight `[M, K]` from `weight_packed [M, K/2]` uint8, `weight_scale [M, K/16]` E4M3, global scale `[1]`."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2).long()
    values = torch.where(nibbles >= 8, -E2M1[nibbles & 7], E2M1[nibbles & 7])
    return values * (group_scale.double() / divisor.double()).repeat_interleave(GROUP, -1)


def quantize(weight: torch.Tensor, divisor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round-to-nearest `weight [M, K]` into `(weight_packed, weight_scale)` under a global scale."""
    stored, values = group_codes(weight, divisor)
    codes = torch.bucketize(values.abs(), E2M1).to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), stored.to(torch.float8_e4m3fn)


def block_fp8_dequantize(codes: torch.Tensor, scale: torch.Tensor, tile: int = 128) -> torch.Tensor:
    """Float64 weight `[M, K]` from E4M3 codes and one scale per tile, `[ceil(M/128), ceil(K/128)]`."""
    row = torch.arange(codes.shape[0]) // tile
    column = torch.arange(codes.shape[1]) // tile
    return codes.double() * scale.double()[row][:, column]
