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
