"""Checks that the traced blocks compute what the model's own forward computes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn

from recipes.errors import WorkflowError

#: Batches per rank that are compared with the model's own forward: one per shape of batch, at most this many.
PARITY_SAMPLES = 2
#: One BF16 rounding: a number's relative distance to its neighbor is at most 2^-7.
BF16_STEP = 2.0**-7


class ParityError(WorkflowError):
    """The traced model differs from the original: calibrating it would give wrong scales."""


@dataclass
class BlockCall:
    """The arguments, except the hidden states, that the model's own forward passes to one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, BlockCall]:
        """Splits a block's arguments into its hidden states and the rest."""
        if args:
            return args[0], cls(args[1:], kwargs)
        kwargs = dict(kwargs)
        return kwargs.pop("hidden_states"), cls((), kwargs)

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The output hidden states of `block` for `hidden` with these arguments."""
        return hidden_of(block(hidden, *self.args, **self.kwargs))


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in a block's output."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


class _Recorded(Exception):
    pass


def own_block_calls(
    model: nn.Module, blocks: Sequence[nn.Module], sample: dict[str, Any]
) -> tuple[torch.Tensor, list[BlockCall]]:
    """Runs the model's own, untraced forward on `sample` with every block replaced by the identity.

    Only the modules before the blocks (embedding, rotary frequencies) must be loaded. Returns the hidden states that
    enter the first block and the call of each block. Raises ParityError if the forward does not call every block.
    """
    calls: list[BlockCall] = []
    first: list[torch.Tensor] = []

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, call = BlockCall.of(args, kwargs)
        first.append(hidden)
        calls.append(call)
        if len(calls) == len(blocks):
            raise _Recorded
        return hidden

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(patch_attr(block, "forward", record))
        try:
            model(**sample)
        except _Recorded:
            return first[0], calls
    raise ParityError(f"{type(model).__name__}: its own forward called {len(calls)} of {len(blocks)} blocks")


def require_parity(what: str, traced: torch.Tensor, own: torch.Tensor) -> float:
    """Raises ParityError unless `traced` equals `own`: bit for bit on the CPU, elsewhere (atomic adds have no order)
    within one BF16 rounding of the largest value. Returns the largest absolute difference."""
    if traced.shape == own.shape and torch.equal(traced, own):
        return 0.0
    if traced.shape != own.shape:
        raise ParityError(f"{what}: traced output has shape {list(traced.shape)}, the model's own {list(own.shape)}")
    difference = float((traced.float() - own.float()).abs().max())
    if traced.device.type != "cpu" and difference <= BF16_STEP * float(own.float().abs().max()):
        return difference
    raise ParityError(
        f"{what}: traced output differs from the model's own forward (max abs diff {difference:.4g}); the calibration "
        "would see a different model, so nothing was calibrated from here on; report the model type"
    )


def parity_samples(cache: IntermediatesCache) -> dict[int, dict[str, Any]]:
    """The batches to check parity with, by their index in `cache`: the first of each shape, at most PARITY_SAMPLES,
    including the first batch."""
    samples: dict[int, dict[str, Any]] = {}
    shapes = set()
    for index in range(len(cache)):
        batch = cache.fetch(index)
        shape = tuple(batch["input_ids"].shape)
        if shape not in shapes:
            shapes.add(shape)
            samples[index] = batch
        if len(samples) == PARITY_SAMPLES:
            break
    return samples
