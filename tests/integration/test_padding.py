"""What a batch is padded with, and how rows are put into batches, changes nothing that the engine makes of the rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from calibration.data.padding import without_padding
from tests.integration.engine_runs import (
    TARGETS,
    Run,
    batches,
    differing,
    even_products,
    family,
    loader,
    ours,
    recipe,
    skeleton,
)
from tests.uneven import ROUNDED


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
    in the first block, after which a Hessian summed in another order has moved weights. Where a row's product depends on
    the number of rows, roundings add up after the first block: one token in a hundred may take another expert, and the
    extremes of one in a hundred layers be up to six roundings away."""
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
    alike = [result for result in single.results if kind != "GPTQModifier" or result.block == 0]
    assert alike
    drifts, moved, far = not even_products(one), 0, []
    for result in alike:
        mine, theirs = Counter(result.tokens_per_expert), Counter(counted.get(result.block, {}))
        if not (drifts and result.block):
            assert mine == theirs
        moved += (mine - theirs).total()
        for module in result.modules:
            scale = f"{module}.input_global_scale"
            away = abs(float(single.scales[scale] / one.scales[scale]) - 1)
            if away > ROUNDED:
                assert drifts and result.block and away <= 2 * ROUNDED, (scale, away)
                far.append(scale)
    print(f"{moved} tokens with another expert, {len(far)} extremes more than three roundings away")
    assert moved <= 0.01 * sum(sum(counts.values()) for counts in counted.values())
    assert len(far) <= 0.01 * sum(len(result.modules) for result in alike)
