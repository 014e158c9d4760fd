"""Finds the extremes that llm-compressor's min/max observers keep, in fewer passes over the values than torch needs, and
in fewer calls.

Only the function that finds the extremes is replaced; what an observer does with them stays llm-compressor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.observers import Observer, min_max
from llmcompressor.observers.min_max import StaticMinMaxObserver

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


class Collected:
    """The extremes of what many observers see, collected call by call; the observers get them at once.

    The call of an observer costs as much Python as a product of 64 tokens, and a block has thousands of them a batch.
    `groups` holds for each number the observers that see the same values, all of them such that `collects` says yes.
    """

    def __init__(self, groups: Sequence[Sequence[Observer]]) -> None:
        self.groups = groups
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Adds the extremes [n] of one call by number: (inf, -inf) if nothing was seen."""
        if self._seen is not None:
            low, high = torch.minimum(self._seen[0], low), torch.maximum(self._seen[1], high)
        self._seen = low, high

    def hand_over(self) -> None:
        """Lets the observers see what was collected since the last call."""
        if self._seen is None:
            return
        pairs, self._seen = torch.stack(self._seen, dim=1), None
        nothing = (pairs[:, 0] == torch.inf) & (pairs[:, 1] == -torch.inf)
        for group, pair, skip in zip(self.groups, pairs, nothing.tolist(), strict=True):
            for observer in () if skip else group:
                observer.update_statistics_from_observed(pair[None])


def collects(observer: Observer) -> bool:
    """Whether the state of an input observer of [T, D] is the smallest and the largest of all values, in any order."""
    plain = type(observer) is StaticMinMaxObserver and not observer.fusion_handler.is_fused
    return plain and observer.base_name == "input" and observer.args.strategy == "tensor_group"


def row_extremes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of each row: [T, D] -> [T], [T], in the values' dtype."""
    if values.shape[1] % GROUP == 0 and (found := _extremes(values.view(1, len(values), -1, GROUP))) is not None:
        return found[0].amin(1), found[1].amax(1)
    return values.amin(1), values.amax(1)
