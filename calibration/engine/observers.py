"""Finds the extremes that llm-compressor's min/max observers keep, in fewer passes over the values than torch needs.

Only the function that finds the extremes is replaced; what an observer does with them stays llm-compressor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.observers import min_max

from calibration.checkpoint import native
from calibration.checkpoint.nvfp4 import GROUP

Extremes = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def fast_extremes() -> Iterator[None]:
    """Inside, the observers static_minmax, minmax and memoryless_minmax find the same extremes faster."""
    stock: Extremes = min_max._get_min_max

    def extremes(observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = _extremes(observed)
        return stock(observed) if found is None else found

    with patch_attr(min_max, "_get_min_max", extremes):
        yield


def _extremes(observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`observed` is `[observations, *shape of the scale, group]`: smallest and largest over its first and last
    dimension, as `torch.amin` and `torch.amax` with `dim=(0, -1)`. None if there is no faster way."""
    if observed.ndim == 2:
        low, high = torch.aminmax(observed)
        return low, high
    if observed.shape[0] > 1:
        # Rows first, so that neighbors in memory are reduced side by side.
        return observed.amin(0).amin(-1), observed.amax(0).amax(-1)
    dtype = native.TORCH_FLOATS.get(observed.dtype)
    fits = observed.shape[-1] == GROUP and observed.is_contiguous() and observed.device.type == "cpu"
    if dtype is None or not fits or not native.compiled():
        return None
    low, high = (torch.empty(observed.shape[1:-1], dtype=observed.dtype) for _ in range(2))
    native.call("float_extremes", dtype, observed.data_ptr(), low.numel(), low.data_ptr(), high.data_ptr())
    return low, high
