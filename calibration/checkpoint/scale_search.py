"""Chooses NVFP4 group scales by the error that they leave, instead of by the largest magnitude of their group.

A group's candidates are neighboring E4M3 codes: those from about 0.75 to 1.5 times amax / 6, as stored, so that the error is
that of the bytes on disk. The result depends on neither thread count nor device: every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.checkpoint.nvfp4 import GROUP

#: Distances in E4M3 codes from the code of amax / 6; a step is 6 to 12 %. The first of equal errors wins.
NEIGHBORS = (0, -1, 1, -2, 2, -3, 3, 4, 5)
#: E4M3 codes of the largest finite scale and of the smallest normal one: below that, steps are coarse.
_LARGEST, _SMALLEST = 126, 8
#: Rounds float32 to halves, and (Veltkamp) to two significant bits.
_HALVES, _TWO_BITS = 1.5 * 2.0**22, 2.0**22 + 1
#: Weights per step: a step's working set fits a core's cache, and a GPU's memory.
_STEP, _GPU_STEP = 1 << 16, 1 << 26


def search_group_scales(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    global_scale: torch.Tensor,
    neighbors: Sequence[int] = NEIGHBORS,
) -> torch.Tensor:
    """E4M3 group scales `[M, K/16]` of a weight `[M, K]` under the global scale `[1]` (float32, a divisor).

    Each has the least sum, over its group, of `importance` (float32 `[K]`, not negative; None: all equal) times the squared
    rounding error, among the codes at distance `neighbors` from that of amax / 6.
    """
    rows, columns = weight.shape
    shape = (columns // GROUP, GROUP)
    weights = None if importance is None else (importance / importance.amax().clamp_min(1e-30)).view(shape)
    glob = global_scale.to(torch.float32).reshape(1)
    six = torch.tensor([6.0], device=weight.device)
    table = (
        torch.arange(128, dtype=torch.uint8, device=weight.device).view(torch.float8_e4m3fn).to(torch.float32) / glob
    )
    found = torch.empty(rows, shape[0], dtype=torch.uint8, device=weight.device)
    step = max(1, (_STEP if weight.device.type == "cpu" else _GPU_STEP) // columns)
    for begin in range(0, rows, step):
        magnitudes = weight[begin : begin + step].to(torch.float32).abs().view(-1, *shape)
        nearest = (glob * (magnitudes.amax(-1) / six)).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).int()
        best, least = nearest.clamp(1, _LARGEST), None
        for distance in neighbors:
            code = (nearest + distance).clamp(1, _LARGEST)
            # Steps between subnormal codes are up to a factor of two: a group as small as that keeps its code.
            code = torch.where(nearest < _SMALLEST, best, code)
            error = _error(magnitudes, table[code].unsqueeze(-1), weights)
            if least is None:
                best, least = code, error
            else:
                better = error < least
                best, least = torch.where(better, code, best), torch.where(better, error, least)
        found[begin : begin + step] = best.to(torch.uint8)
    return found.view(torch.float8_e4m3fn)


def _error(magnitudes: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Weighted squared error of E2M1 rounding: magnitudes `[..., G, 16]`, scale `[..., G, 1]` -> `[..., G]`.

    E2M1 has halves below 1 and two significant bits from there to 6: at every value the coarser of both grids.
    """
    value = magnitudes / scale
    halves = value.add(_HALVES).sub_(_HALVES).sub_(value).abs_()
    wide = value * _TWO_BITS
    bits = wide.sub_(wide - value).clamp_(max=6.0).sub_(value).abs_()
    error = torch.maximum(halves, bits).mul_(scale).square_()
    if weights is not None:
        error.mul_(weights)
    # A sum whose order no library chooses.
    width = GROUP
    while width > 1:
        width //= 2
        error = error[..., :width] + error[..., width:]
    return error.squeeze(-1)
