"""Routers that are trained: each block of an upcycled model sends tokens of a kind to an expert, about as many to each.

What is learned is the router of a block, [experts, hidden], and nothing else: Adam raises the mutual information of token and
expert, the entropy of the mean choice (a load-balance term) less the mean entropy of each token's choice, over the hidden states
that enter the dense model's MLP. Experts of an upcycled model are copies with noise, so that no loss of the model itself would
tell them apart. Minutes on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.model.skeleton import build_skeleton
from tests.models.storage import generator, normal

STEPS, TOKENS, RATE = 150, 1024, 2e-3


@torch.no_grad()
def mlp_inputs(dense: Path, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What enters the MLP of each block of the Llama `dense`, BF16 `[tokens, hidden]`, over int64 `[1, tokens]` windows."""
    with TemporaryDirectory() as work:
        source = build_skeleton(Formats(Checkpoint.open(dense)), Path(work), False, torch.device("cpu"))
        source.load([*source.outside_blocks(), *source.blocks.values()])
        seen = [Seen() for _ in source.blocks]
        for block, one in zip(source.blocks.values(), seen, strict=True):
            block.get_submodule("mlp").register_forward_pre_hook(one)
        for ids in windows:
            source.model(input_ids=ids, use_cache=False)
    return [torch.cat(one.inputs) for one in seen]


class Seen:
    """Keeps a module's first input, `[tokens, hidden]` of each call."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.inputs.append(arguments[0].flatten(0, -2))


def train(inputs: torch.Tensor, experts: int, name: str, rate: float = RATE) -> torch.Tensor:
    """A router for `inputs`, BF16 `[tokens, hidden]`: BF16 `[experts, hidden]`. `name` chooses its start."""
    width = inputs.shape[-1]
    router = nn.Parameter(normal(0, name, (experts, width), 0.0, 1 / width**0.5))
    optimizer, order = torch.optim.Adam([router], rate), generator(0, f"{name}/batches")
    for _ in range(STEPS):
        rows = inputs[torch.randint(len(inputs), (TOKENS,), generator=order)].float()
        log_p = (rows @ router.T).log_softmax(-1)
        p = log_p.exp()
        mean = p.mean(0)
        undecided, balance = -(p * log_p).sum(-1).mean(), -(mean * mean.log()).sum()
        optimizer.zero_grad()
        (undecided - balance).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return router.detach().to(torch.bfloat16)
