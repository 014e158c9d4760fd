"""What a batch is padded with, and how rows are put into batches, changes nothing that the engine makes of the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibration.data.padding import without_padding
from tests.integration.engine_runs import (
    TARGETS,
    Run,
    batches,
    differing,
    family,
    loader,
    ours,
    recipe,
    require_equal_but_for_rounding,
    skeleton,
)


def modifier(name: str, kind: str) -> list[dict[str, Any]]:
    return [{kind: {"config_groups": {"group": {"targets": [TARGETS[family(name)]], "scheme": "NVFP4"}}}}]


def padded(pad: int) -> list[dict[str, torch.Tensor]]:
    """Four rows of 40, 9, 23 and 9 tokens as one batch, and two of 40."""
    uneven, even = batches(count=2, size=4)
    even["attention_mask"][:] = 1
    for row, length in enumerate((40, 9, 23, 9)):
        uneven["attention_mask"][row, length:] = 0
        uneven["input_ids"][row, length:] = pad
    return [uneven, {key: value[:2] for key, value in even.items()}]


def run(name: str, kind: str, data: list[dict[str, torch.Tensor]], all_experts: bool) -> Run:
    chosen = recipe(name, modifier(name, kind), calibration={"dataset": "bundled", "all_experts": all_experts})
    return ours(chosen, skeleton(name), loader(data))


@pytest.mark.parametrize(
    ("name", "kind", "all_experts"),
    [
        ("llama", "QuantizationModifier", True),
        ("qwen3_moe", "QuantizationModifier", False),
        ("mixtral", "QuantizationModifier", True),
        ("fp8_mxfp4", "QuantizationModifier", True),
        ("llama", "GPTQModifier", True),
        ("mixtral", "GPTQModifier", False),
    ],
)
def test_the_pad_token_changes_no_bit(name: str, kind: str, all_experts: bool) -> None:
    """Scales and weights. One row at a time counts the same tokens and finds the same extremes, up to rounding: of GPTQ
    in the first block, after which a Hessian summed in another order has moved weights."""
    one, other = (run(name, kind, padded(pad), all_experts) for pad in (3, 250))
    assert one.parameters and differing(one.parameters, other.parameters) == []
    counted = one.summary.tokens_per_expert
    assert counted == other.summary.tokens_per_expert
    tokens = sum(int(batch["attention_mask"].sum()) for batch in padded(3))
    for counts in counted.values():
        assert sum(counts.values()) == tokens * one.source.model.config.num_experts_per_tok

    rows = [
        {key: value[row : row + 1] for key, value in batch.items()}
        for batch in without_padding(padded(3))
        for row in range(len(batch["input_ids"]))
    ]
    assert len(rows) == 6
    single = run(name, kind, rows, all_experts)
    blocks = {result.block for result in one.results if kind != "GPTQModifier" or result.block == 0}
    require_equal_but_for_rounding(one, single, blocks)
