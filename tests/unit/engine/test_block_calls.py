"""Blocks of which each takes more than hidden states from the one before it (GLM-5, HY-V4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from calibration.model.parity import BlockCall, apart, own_block_calls

X = torch.arange(6.0).reshape(2, 3, 1)  # a batch of two, which unpacks into two


class Block(nn.Module):
    def __init__(self, step: float, hands_on: bool) -> None:
        super().__init__()
        self.step, self.hands_on = step, hands_on

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor | None = None) -> Any:
        made = hidden_states + self.step if chosen is None else hidden_states * 2 + chosen + self.step
        return (made, made.sum()) if self.hands_on else made


class Model(nn.Module):
    def __init__(self, hands_on: bool = True) -> None:
        super().__init__()
        self.hands_on, self.blocks = hands_on, nn.ModuleList(Block(1.0 + number, hands_on) for number in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = None
        for block in self.blocks:
            if self.hands_on:
                x, chosen = block(x, chosen=chosen)
            else:
                x = block(x)
        return x


def calls(model: Model) -> list[BlockCall]:
    entering, made = own_block_calls(model, list(model.blocks), {"x": X})
    assert torch.equal(entering, X)
    return made


@pytest.mark.parametrize("hands_on", [True, False])
def test_the_calls_one_after_the_other_are_the_model_s_own_forward(hands_on: bool) -> None:
    model, hidden = Model(hands_on), X
    for call, block in zip(calls(model), model.blocks, strict=True):
        hidden = call(block, hidden)
    assert torch.equal(hidden, model(X))


def test_a_block_that_is_left_out_hands_on_what_it_took() -> None:
    model = Model()
    first, second, third = calls(model)
    hidden, chosen = model.blocks[0](X)
    first(model.blocks[0], X)
    passed, handed = second.skip(hidden, chosen=chosen)
    assert passed is hidden and torch.equal(handed, chosen)
    assert torch.equal(third(model.blocks[2], hidden), model.blocks[2](hidden, chosen)[0])


def test_what_was_not_run_before_a_block_comes_from_another_call_of_it() -> None:
    model = Model()
    _, second, _ = calls(model)
    second.complete(BlockCall.of((X,), {"chosen": torch.tensor(5.0)})[1])
    assert torch.equal(second(model.blocks[1], X), X * 2 + 7)


def test_another_way_through_the_blocks_has_what_its_own_blocks_returned() -> None:
    model = Model()
    one = calls(model)
    other = apart(one)
    one[0](model.blocks[0], X)
    other[0](model.blocks[0], X * 0)
    one[0](model.blocks[0], X * 9, keep=False)
    assert torch.equal(one[1](model.blocks[1], X), X * 2 + (X + 1).sum() + 2)
    assert torch.equal(other[1](model.blocks[1], X), X * 2 + 6 + 2)
