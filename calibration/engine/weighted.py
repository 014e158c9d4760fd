"""Observers of weights that choose group scales by the error they leave; `weight_observer` names them in a recipe.

`nvfp4_weighted` weighs a weight's rounding error by the mean square of the input channel that it meets, as llm-compressor's
imatrix observers do. It differs in three ways: experts that share an input share one vector; the search knows that scales are
stored in E4M3; and the sums are exact, so that neither the order of samples nor the number of ranks changes a byte.
`nvfp4_four_six` needs no inputs: it chooses between amax / 6 and amax / 4 (arXiv 2512.02010).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import QuantizationStrategy
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.observers import Observer
from llmcompressor.observers.base import QParamsDict
from llmcompressor.observers.min_max import MemorylessMinMaxObserver
from torch import nn
from torch.utils.hooks import RemovableHandle

from calibration.checkpoint.scale_search import NEIGHBORS, search_group_scales
from calibration.runs.ranks import Ranks

#: Group scales may grow by this factor over amax / 6, so the global scale leaves room for it below E4M3's largest value.
_ROOM = 1.5
#: A sum of squares is kept in multiples of 2^10, and the rest in multiples of 2^-40: integers add up exactly.
_COARSE, _FINE, _LARGEST = 2.0**10, 2.0**40, 2.0**60


class Importance:
    """The sum of squares of every input channel over all tokens. Exact: it depends on the batches, not on their order."""

    #: The tensor summed last, its version and its sums: q, k and v see one after the other.
    _last: ClassVar[tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None] = None

    def __init__(self) -> None:
        #: int64 `[2, K]`: multiples of 2^10 and of 2^-40.
        self.sums: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Adds the tokens of `inputs [..., K]`."""
        if not inputs.numel():
            return
        last = Importance._last
        if last is not None and last[0]() is inputs and last[1] == inputs._version:
            parts = last[2]
        else:
            parts = _sums_of_squares(inputs)
            Importance._last = weakref.ref(inputs), inputs._version, parts
        # Its own tensor: ranks add theirs in place.
        self.sums = parts.clone() if self.sums is None else self.sums + parts

    def vector(self) -> torch.Tensor | None:
        """Float32 `[K]`, up to a common factor; None if no token came or every input was zero."""
        if self.sums is None or not self.sums.any():
            return None
        coarse, fine = self.sums.to(torch.float64)
        vector: torch.Tensor = (coarse * _COARSE + fine / _FINE).to(torch.float32)
        return vector


def _sums_of_squares(inputs: torch.Tensor) -> torch.Tensor:
    square = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32).square()
    total = square.sum(0).to(torch.float64).clamp_(max=_LARGEST)
    coarse = (total / _COARSE).floor_()
    return torch.stack([coarse, ((total - coarse * _COARSE) * _FINE).round_()]).to(torch.int64)


class SearchingObserver(MemorylessMinMaxObserver):  # type: ignore[misc]
    """The base: keeps the observed weight until its scales are asked for, then searches them. Weights without group scales
    (FP8_BLOCK) get the scales of their extremes."""

    neighbors: Sequence[int] = NEIGHBORS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weight: torch.Tensor | None = None

    def update_statistics_from_observed(self, observed: torch.Tensor) -> None:
        """`observed`: the weight, as `[1, M, K/16, 16]` if it is to be NVFP4."""
        super().update_statistics_from_observed(observed)
        self._weight = observed if self.args.strategy == QuantizationStrategy.TENSOR_GROUP else None

    def get_global_scale(self) -> torch.Tensor | None:
        """2688 / (1.5 amax) of the fused group, `[1]`; None for weights without group scales."""
        scale = super().get_global_scale()
        widened: torch.Tensor | None = None if scale is None else scale / _ROOM
        return widened

    def get_qparams(self) -> QParamsDict:
        """As llm-compressor's, with the group scales searched."""
        weight, self._weight = self._weight, None
        found: QParamsDict = super().get_qparams()
        if weight is None:
            return found
        scales = search_group_scales(weight.flatten(2)[0], self._importance(), found["global_scale"], self.neighbors)
        found["scale"] = scales.to(torch.float32).to(found["scale"].dtype)
        return found

    def _importance(self) -> torch.Tensor | None:
        return None


@Observer.register("nvfp4_four_six")
class FourSixObserver(SearchingObserver):
    """amax / 6, or amax / 4 if that leaves less squared error."""

    neighbors = (0, 5)


@Observer.register("nvfp4_mse")
class SquaredErrorObserver(SearchingObserver):
    """The scale of least squared error, from 0.75 to 1.5 times amax / 6."""


@Observer.register("nvfp4_weighted")
class WeightedObserver(SearchingObserver):
    """The scale of least squared error, each weight's error weighted by the mean square of its inputs. A layer that no token
    reached (a routed expert without all-experts calibration) weighs all alike."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Experts that share an input share one object.
        self.importance = Importance()
        self._hook: RemovableHandle | None = None

    def attach(self, module: nn.Module) -> None:
        """Sees the module's inputs from now on."""
        self.detach(module)
        self.importance = Importance()
        self._hook = module.register_forward_pre_hook(self.see)

    def detach(self, module: nn.Module) -> None:
        """Sees no more inputs."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def see(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """The forward hook."""
        if not HooksMixin._HOOKS_DISABLED:
            self.importance.add(arguments[0])

    def _importance(self) -> torch.Tensor | None:
        return self.importance.vector()


def weighted_observer(module: nn.Module) -> WeightedObserver | None:
    """The module's observer that weighs errors by importance, if it has one."""
    observer = getattr(module, "weight_observer", None)
    return observer if isinstance(observer, WeightedObserver) else None


def is_importance_hook(hook: object) -> bool:
    """Whether a forward hook is one that `WeightedObserver` attaches."""
    return isinstance(getattr(hook, "__self__", None), WeightedObserver)


def all_reduce_importance(ranks: Ranks, modules: Iterable[nn.Module]) -> None:
    """Sets the importance of every module to the sum over all ranks; exact, whatever the order."""
    found = [observer.importance for module in modules if (observer := weighted_observer(module)) is not None]
    found = list({id(importance): importance for importance in found}.values())
    if ranks.size == 1 or not found:
        return
    widths = ranks.all_gather("importance", [None if i.sums is None else i.sums.shape[1] for i in found])
    for importance, known in zip(found, zip(*widths, strict=True), strict=True):
        width = next((width for width in known if width is not None), None)
        if width is not None:
            if importance.sums is None:
                importance.sums = torch.zeros(2, width, dtype=torch.int64, device=ranks.device)
            ranks.all_reduce_sum(importance.sums)
