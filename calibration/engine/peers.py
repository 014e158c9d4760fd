"""Experts that saw too few tokens, or only zeros, take the input statistics of their peers in the block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn

from calibration.engine.experts import INPUT_SHARING, MIN_MAX


def fill_from_peers(experts: LinearExperts2D, tokens: dict[int, int], least: int) -> list[int]:
    """Widens the input statistics of experts with fewer than `least` routed tokens to the extremes of their peers.

    For routed-only calibration. gate/up and down are handled separately. Peers are the experts with at least `least`
    tokens, or, if there are none, all experts with statistics. Must run before the scales are computed. Returns the
    numbers of the experts that were filled.
    """
    starving = [number for number in range(experts.num_experts) if tokens.get(number, 0) < max(least, 1)]
    filled = set()
    for observers in _input_observers(experts):
        seen = {number: [o for o in group if o.has_statistics] for number, group in observers.items()}
        donors = [o for n, group in seen.items() if n not in starving for o in group]
        donors = donors or [o for group in seen.values() for o in group]
        filled.update(_take_extremes(observers, starving, donors))
    return sorted(filled)


def fill_dead_experts(experts: LinearExperts2D) -> list[int]:
    """Gives experts whose inputs were zero throughout (the down projection of a pruned expert) the extremes of their peers.

    compressed-tensors gives such inputs the scale 1.0, which admits 2688; if a block's experts share their input scale,
    all of them would get it. Must run before the scales are computed. Returns the numbers of the experts that were
    filled.
    """
    filled = set()
    for observers in _input_observers(experts):
        seen = {n: [o for o in group if o.has_statistics] for n, group in observers.items()}
        dead = [
            n for n, group in seen.items() if group and not any(o.min_vals.any() or o.max_vals.any() for o in group)
        ]
        filled.update(_take_extremes(observers, dead, [o for n, group in seen.items() if n not in dead for o in group]))
    return sorted(filled)


def _input_observers(experts: LinearExperts2D) -> Iterator[dict[int, list[Any]]]:
    """Yields the input observers by expert number, first those of gate/up, then those of down."""
    for leaves in INPUT_SHARING:
        yield {
            number: [o for leaf in leaves if isinstance(o := _input_observer(experts[number], leaf), MIN_MAX)]
            for number in range(experts.num_experts)
        }


def _take_extremes(observers: dict[int, list[Any]], numbers: Iterable[int], donors: list[Any]) -> list[int]:
    """Widens the extremes of the experts `numbers` to those of all `donors`. Returns the numbers that were widened."""
    if not donors:
        return []
    low = torch.stack([observer.min_vals for observer in donors]).amin(0)
    high = torch.stack([observer.max_vals for observer in donors]).amax(0)
    filled = []
    for number in numbers:
        for observer in observers[number]:
            own = observer.has_statistics
            observer.min_vals = torch.minimum(low, observer.min_vals) if own else low.clone()
            observer.max_vals = torch.maximum(high, observer.max_vals) if own else high.clone()
            filled.append(number)
    return filled


def _input_observer(expert: nn.Module, leaf: str) -> nn.Module | None:
    return getattr(getattr(expert, leaf, None), "input_observer", None)
