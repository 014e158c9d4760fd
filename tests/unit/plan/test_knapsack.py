"""The multiple-choice knapsack finds the best choice, within the size, and a bound that none beats."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from calibration.plan import knapsack
from calibration.plan.knapsack import Option, choose


def cases(count: int) -> list[tuple[list[list[Option]], int]]:
    rng = random.Random(7)
    made = []
    for _ in range(count):
        items = [
            [(rng.randint(1, 30), rng.random()) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 6))
        ]
        made.append((items, rng.randint(1, 30 * len(items))))
    return made


def test_it_is_as_good_as_trying_every_choice() -> None:
    feasible = 0
    for items, limit in cases(400):
        sums = [[sum(part) for part in zip(*choice, strict=True)] for choice in itertools.product(*items)]
        within = [error for size, error in sums if size <= limit]
        if not within:
            with pytest.raises(ValueError, match="more than"):
                choose(items, limit)
            continue
        feasible += 1
        found = choose(items, limit)
        chosen = [options[o] for options, o in zip(items, found.options, strict=True)]
        assert found.size == sum(size for size, _ in chosen) <= limit
        assert found.error == pytest.approx(sum(error for _, error in chosen)) == pytest.approx(min(within))
        assert found.bound <= min(within) + 1e-12
    assert feasible > 200


def test_a_few_hundred_units_take_less_than_seconds_and_the_bound_is_near() -> None:
    rng = random.Random(1)
    items: list[list[Option]] = []
    for _ in range(400):
        size = rng.choice([9_000_000, 2_000_000, 350_000])
        items.append([(size, rng.expovariate(1)), (2 * size, 0.05 * rng.random()), (4 * size, 0.0)])
    began = time.process_time()
    found = choose(items, int(1.4 * sum(options[0][0] for options in items)))
    assert time.process_time() - began < 5
    assert found.bound <= found.error <= 1.01 * found.bound


def test_cut_to_few_states_it_is_still_within_the_size_and_no_worse_than_greedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knapsack, "MOST_STATES", 2)
    for items, limit in cases(100):
        with_limit = sum(min(size for size, _ in options) for options in items) <= limit
        if with_limit:
            found = choose(items, limit)
            assert found.size <= limit and found.error >= found.bound - 1e-12
