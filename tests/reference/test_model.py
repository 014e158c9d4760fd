"""The reference's own judgement of what float32 noise decides."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tests.reference.model import Projection, decided, logits


class OneLayer(nn.Module):
    """A W4A4 layer with unit weights on given rows `[T, 16]`: a token's logits are its quantized row."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.layer = Projection({"weight": torch.eye(16)})
        self.layer.divisor = torch.ones(1, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(self.rows[input_ids]))


def test_values_a_float32_bit_from_a_border_are_undecided_and_others_decided() -> None:
    rows = torch.ones(2000, 16, dtype=torch.float64)
    rows[:, 0] = 6.0  # the group scale is 1
    rms = float(rows[0].square().mean().sqrt())
    rows[:1000, 5] = 2.5 - 1e-7 * rms  # the border of the codes 2 and 3
    rows[1000:, 5] = 2.5 - 1e-5 * rms
    model, ids = OneLayer(rows), [list(range(2000))]
    (mask,) = decided(model, ids, logits(model, ids))
    assert int(mask[:1000].sum()) < 10
    assert bool(mask[1000:].all())


def test_prompts_of_one_length_are_one_batch_and_keep_their_places() -> None:
    rows = torch.arange(8, dtype=torch.float64)[:, None].expand(8, 16)
    model, prompts, calls = OneLayer(rows), [[1, 2], [3], [4, 5], [6], [7]], []
    model.register_forward_pre_hook(lambda *call: calls.append(call[2]["input_ids"].shape), with_kwargs=True)
    found = logits(model, prompts)
    assert calls == [(3, 1), (2, 2)]
    assert [one.tolist() for one in found] == [logits(model, [ids])[0].tolist() for ids in prompts]
    assert len({one.sum().item() for one in found}) == len(prompts)
