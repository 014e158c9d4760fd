"""Padding stays outside the engine: batches of one length each."""

from __future__ import annotations

import pytest
import torch

from calibration.data.padding import batches_of_one_length, without_padding


def test_rows_of_one_length_share_batches_in_the_order_of_their_first_rows() -> None:
    assert batches_of_one_length([5, 3, 5, 5, 4, 3], 2) == [[0, 2], [1, 5], [3], [4]]
    assert batches_of_one_length([7] * 5, 2) == [[0, 1], [2, 3], [4]]
    assert batches_of_one_length([3, 1, 2], 1) == [[0], [1], [2]]
    assert batches_of_one_length([], 4) == []


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_the_pad_token_is_in_no_batch(side: str) -> None:
    lengths, width, pad = [3, 6, 3, 0, 1], 6, 99
    ids, mask = torch.full((5, width), pad), torch.zeros(5, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        begin = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        ids[row, begin : begin + length] = 10 * row + torch.arange(length)
        mask[row, begin : begin + length] = 1
    labels = torch.arange(5)
    found = list(without_padding([{"input_ids": ids, "attention_mask": mask, "labels": labels, "name": "x"}]))
    assert [batch["input_ids"].tolist() for batch in found] == [[[0, 1, 2], [20, 21, 22]], [[*range(10, 16)]], [[40]]]
    assert [batch["labels"].tolist() for batch in found] == [[0, 2], [1], [4]]
    assert all(batch["attention_mask"].all() and batch["name"] == "x" for batch in found)


def test_a_batch_without_padding_stays_the_very_object() -> None:
    full = {"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 4)}
    bare = {"input_ids": torch.ones(2, 4)}
    assert all(made is given for made, given in zip(without_padding([full, bare]), [full, bare], strict=True))


def test_padding_between_tokens_is_refused() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    with pytest.raises(ValueError, match="row 1 has padding between its tokens"):
        list(without_padding([{"input_ids": mask, "attention_mask": mask}]))
