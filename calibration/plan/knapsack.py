"""The multiple-choice knapsack: one option of every item, so that the errors add up to the least within a size.

Exact by dominance (Nemhauser and Ullmann, 1969) with the bound of the linear relaxation, whose solution is the walk along the
convex hulls in the order of error saved per byte (Sinha and Zoltners, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: Partial choices that are kept after an item. Beyond, those with the best bounds stay, and the result may not be the best.
MOST_STATES = 200_000

#: (size in bytes, error) of an option.
Option = tuple[int, float]


@dataclass(frozen=True)
class Choice:
    """The index of every item's option, their size and error together, and a bound: no choice has less error."""

    options: tuple[int, ...]
    size: int
    error: float
    bound: float


@dataclass(frozen=True)
class _Step:
    """From one option of an item to the next on its convex hull."""

    item: int
    option: int
    size: int
    saved: float


def choose(items: Sequence[Sequence[Option]], limit: int) -> Choice:
    """The choice with the least error of at most `limit` bytes. Raises ValueError if even the smallest is larger."""
    smallest = [min(range(len(options)), key=lambda o: (options[o][0], options[o][1])) for options in items]
    least = sum(options[o][0] for options, o in zip(items, smallest, strict=True))
    if least > limit:
        raise ValueError(f"the smallest choice has {least:,} bytes, more than {limit:,}")
    steps = sorted((step for item, options in enumerate(items) for step in _hull_steps(item, options)),
                   key=lambda step: -step.saved / step.size)  # fmt: skip
    greedy = _greedy(smallest, steps, limit - least)
    best = _exact(items, smallest, steps, limit, _error(items, greedy))
    found = greedy if best is None else best
    start = _error(items, smallest)
    bound = start - float(_savings(steps, 0)(np.array([limit - least], dtype=np.float64))[0])
    size = sum(options[o][0] for options, o in zip(items, found, strict=True))
    return Choice(tuple(found), size, _error(items, found), bound)


def _error(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return float(sum(options[o][1] for options, o in zip(items, chosen, strict=True)))


def _hull_steps(item: int, options: Sequence[Option]) -> list[_Step]:
    """The lower convex hull of (size, error), from the smallest option on."""
    hull: list[int] = []
    for option in sorted(range(len(options)), key=lambda o: options[o]):
        size, error = options[option]
        if hull and error >= options[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (a, e), (b, f) = options[hull[-2]], options[hull[-1]]
            if (e - f) * (size - b) > (f - error) * (b - a):
                break
            hull.pop()
        hull.append(option)
    return [
        _Step(item, new, options[new][0] - options[old][0], options[old][1] - options[new][1])
        for old, new in pairwise(hull)
    ]


def _greedy(smallest: Sequence[int], steps: Sequence[_Step], room: int) -> list[int]:
    """Takes the steps in order as long as they fit; an item whose step does not fit gets no later one."""
    chosen, full = list(smallest), set[int]()
    for step in steps:
        if step.item in full or step.size > room:
            full.add(step.item)
            continue
        chosen[step.item], room = step.option, room - step.size
    return chosen


class _savings:
    """The error that the relaxation saves with the items from `first` on, as a function of the room in bytes."""

    def __init__(self, steps: Sequence[_Step], first: int) -> None:
        later = [step for step in steps if step.item >= first]
        self.sizes = np.cumsum([0.0, *(step.size for step in later)])
        self.saved = np.cumsum([0.0, *(step.saved for step in later)])

    def __call__(self, room: np.ndarray) -> np.ndarray:
        made: np.ndarray = np.interp(room, self.sizes, self.saved)
        return made


def _exact(
    items: Sequence[Sequence[Option]], smallest: Sequence[int], steps: Sequence[_Step], limit: int, known: float
) -> list[int] | None:
    """The best choice if it is better than one with the error `known`; None if none is."""
    after = np.cumsum([(0, 0.0), *(items[i][smallest[i]] for i in reversed(range(len(items))))], axis=0)[::-1]
    sizes, errors = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for number, options in enumerate(items):
        size = np.concatenate([sizes + option[0] for option in options])
        error = np.concatenate([errors + option[1] for option in options])
        parent = np.tile(np.arange(len(sizes)), len(options))
        taken = np.repeat(np.arange(len(options)), len(sizes))
        rest_size, rest_error = int(after[number + 1][0]), float(after[number + 1][1])
        room = limit - size - rest_size
        bound = error + rest_error - _savings(steps, number + 1)(np.maximum(room, 0).astype(np.float64))
        # A choice as good as the known one is of no use; sums in another order differ in their last bits.
        alive = np.flatnonzero((room >= 0) & (bound < known * (1 - 1e-12)))
        alive = alive[np.lexsort((error[alive], size[alive]))]
        alive = alive[_falls(error[alive])]
        if len(alive) > MOST_STATES:
            alive = np.sort(alive[np.argsort(bound[alive], kind="stable")[:MOST_STATES]])
            alive = alive[np.lexsort((error[alive], size[alive]))]
        if not len(alive):
            return None
        sizes, errors = size[alive], error[alive]
        trail.append((parent[alive], taken[alive]))
    state, chosen = int(np.argmin(errors)), list[int]()
    for parents, options_taken in reversed(trail):
        chosen.append(int(options_taken[state]))
        state = int(parents[state])
    return chosen[::-1]


def _falls(errors: np.ndarray) -> np.ndarray:
    """Which values are smaller than all before."""
    least = np.minimum.accumulate(errors)
    falls = np.ones(len(errors), dtype=bool)
    falls[1:] = errors[1:] < least[:-1]
    return falls
