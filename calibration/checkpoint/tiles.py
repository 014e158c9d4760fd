"""FP8_BLOCK arithmetic in plain torch: E4M3 codes and a scale for every tile of 128x128. Bit-identical to compressed-tensors
(0.19, quantization/utils/helpers.py, calculate_qparams; lifecycle/forward_helpers.py, _quantize)."""

from __future__ import annotations

import torch

TILE = 128
E4M3_MAX = 448.0


def quantize_tiles(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[M, K]` float -> E4M3 codes `[M, K]` and scales float32 `[ceil(M/128), ceil(K/128)]`, both computed in the dtype of
    `values`. The first row must be the first of a tile."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % TILE, 0, -rows % TILE))
    tiles = padded.reshape(padded.shape[0] // TILE, TILE, -1, TILE)
    largest = torch.max(tiles.amin((1, 3)).abs(), tiles.amax((1, 3)).abs())
    # A tensor, because CUDA divides by a number by multiplying with its reciprocal.
    grid = largest / torch.tensor(E4M3_MAX, dtype=values.dtype, device=values.device)
    grid = torch.where(grid == 0, torch.finfo(values.dtype).eps, grid)
    codes = (tiles / grid[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.reshape(padded.shape)[:rows, :columns].contiguous(), grid.to(torch.float32)


def dequantize_tiles(codes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Codes `[M, K]` and scales `[ceil(M/128), ceil(K/128)]` of `quantize_tiles` -> float32 `[M, K]`."""
    rows, columns = codes.shape
    scale = grid.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return codes.to(torch.float32) * scale


def quantize_dequantize_groups(x: torch.Tensor) -> torch.Tensor:
    """`x [..., K]` to E4M3 and back, in its dtype, one dynamic scale per token and 128 values: the inputs of FP8_BLOCK."""
    flat = x.to(torch.float32).reshape(-1, x.shape[-1])
    parts = []
    for part in torch.split(flat, TILE, -1):
        scale = part.abs().amax(-1, keepdim=True).clamp_min(1e-30) / E4M3_MAX
        parts.append((part / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale)
    return torch.cat(parts, -1).to(x.dtype).reshape(x.shape)
