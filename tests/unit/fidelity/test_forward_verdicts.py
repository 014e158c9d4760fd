"""The verdict of the chain of blocks: a low cosine is excused by rounding to nearest, within a margin."""

from __future__ import annotations

import pytest

from verify.fidelity.forward import BlockCosine, _judge_chain


@pytest.mark.parametrize(
    ("propagated", "rounded", "verdict"),
    [
        (0.95, None, "PASS"), (0.90, None, "FAIL"), (float("nan"), None, "FAIL"),
        (0.90, 0.94, "WARN"), (0.90, 0.96, "FAIL"), (0.90, 0.80, "WARN"), (float("nan"), 0.80, "FAIL"),
    ],
)  # fmt: skip
def test_a_chain_is_excused_by_what_rounding_to_nearest_costs(
    propagated: float, rounded: float | None, verdict: str
) -> None:
    found, figure = _judge_chain(BlockCosine(3, 0.99, propagated, 64, chain_rounded=rounded), 0.95)
    assert found == verdict and figure.startswith(f"{propagated:.4f} after block 3")
    assert ("rounded to nearest" in figure) == (rounded is not None)
