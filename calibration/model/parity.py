"""Checks that the traced blocks compute what the model's own forward computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, order=True)
class _HandedOn:
    """A place holder for what block `number` returns at `position`, behind the hidden states, and a later block takes."""

    number: int
    position: int


@dataclass
class BlockCall:
    """The arguments, except the hidden states, that the model's own forward passes to one block, the `number`-th.

    Some blocks return more than hidden states, which the next one takes (GLM-5's and HY-V4's selected positions): `handed`,
    which the calls of one sample share, contains what the blocks before this one returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int = 0
    handed: dict[_HandedOn, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, BlockCall]:
        """Splits a block's arguments into its hidden states and the rest."""
        if args:
            return args[0], cls(args[1:], kwargs)
        kwargs = dict(kwargs)
        return kwargs.pop("hidden_states"), cls((), kwargs)

    def __call__(self, block: nn.Module, hidden: torch.Tensor, keep: bool = True) -> torch.Tensor:
        """The output hidden states of `block` for `hidden` with these arguments; what else it returns is handed on to the
        calls after this one, if `keep`."""
        kwargs = {name: self._actual(value) for name, value in self.kwargs.items()}
        output = block(hidden, *map(self._actual, self.args), **kwargs)
        if keep and isinstance(output, tuple | list):
            self.handed.update({_HandedOn(self.number, n): value for n, value in enumerate(output) if n})
        return hidden_of(output)

    @property
    def takes_more(self) -> bool:
        """Whether it takes more than hidden states of a block before it."""
        return bool(self._taken())

    def complete(self, given: BlockCall) -> None:
        """Takes what is not known of the blocks before this one (they were not run) from another call of the same block."""
        pairs = [*zip(self.args, given.args, strict=False), *((v, given.kwargs.get(k)) for k, v in self.kwargs.items())]
        for own, other in pairs:
            if isinstance(own, _HandedOn):
                self.handed.setdefault(own, other)

    def skip(self, *args: Any, **kwargs: Any) -> Any:
        """What a block that is left out returns in place of its forward: its hidden states, and what it took of the block
        before it, as its own."""
        hidden, given = self.of(args, kwargs)
        self.complete(given)
        taken = sorted(self._taken(), key=lambda value: value.position)
        self.handed.update({_HandedOn(self.number, value.position): self.handed[value] for value in taken})
        return (hidden, *(self.handed[value] for value in taken)) if taken else hidden

    def _taken(self) -> list[_HandedOn]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, _HandedOn)]

    def _actual(self, value: Any) -> Any:
        return self.handed[value] if isinstance(value, _HandedOn) else value


class HandedOn:
    """What the blocks before the one numbered `following` returned beside hidden states, as far as that one or a later one takes
    it: what a pass needs to go on there. `calls`: of one sample, all blocks."""

    def __init__(self, calls: Sequence[BlockCall], following: int) -> None:
        taken = {value for call in calls[following:] for value in call._taken()}
        self._places = sorted(value for value in taken if value.number < following)
        self._values = calls[0].handed

    def __len__(self) -> int:
        return len(self._places)

    def get(self) -> list[Any]:
        """The values, in an order that is that of every pass."""
        return [self._values[place] for place in self._places]

    def set(self, values: Sequence[Any]) -> None:
        """Hands on `values` in place of blocks that were not run."""
        self._values.update(zip(self._places, values, strict=True))


def apart(calls: Sequence[BlockCall]) -> list[BlockCall]:
    """The calls of one sample for another way through the blocks, on which they return something else."""
    handed: dict[_HandedOn, Any] = {}
    return [replace(call, handed=handed) for call in calls]


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in a block's output."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


class _Recorded(Exception):
    pass


class _ReturnsMore(Exception):
    pass


class _Alone(torch.Tensor):
    """Hidden states as all that a block returns: whoever unpacks them expects more (a batch of two would unpack)."""

    def __iter__(self) -> Iterator[Any]:
        raise _ReturnsMore


def own_block_calls(
    model: nn.Module, blocks: Sequence[nn.Module], sample: dict[str, Any]
) -> tuple[torch.Tensor, list[BlockCall]]:
    """Runs the model's own, untraced forward on `sample` with every block replaced by the identity.

    Only the modules before the blocks (embedding, rotary frequencies) must be loaded. Returns the hidden states that
    enter the first block and the call of each block. Raises ParityError if the forward does not call every block.
    """
    try:
        return _own_calls(model, blocks, sample, further=0)
    except _ReturnsMore:
        return _own_calls(model, blocks, sample, further=1)


def _own_calls(
    model: nn.Module, blocks: Sequence[nn.Module], sample: dict[str, Any], further: int
) -> tuple[torch.Tensor, list[BlockCall]]:
    """`own_block_calls`, of a model whose blocks return as many `further` values."""
    calls: list[BlockCall] = []
    first: list[torch.Tensor] = []
    handed: dict[_HandedOn, Any] = {}

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden, call = BlockCall.of(args, kwargs)
        number = len(calls)
        first.append(hidden)
        calls.append(replace(call, number=number, handed=handed))
        if len(calls) == len(blocks):
            raise _Recorded
        more = (_HandedOn(number, position) for position in range(1, further + 1))
        return (hidden, *more) if further else hidden.as_subclass(_Alone)

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
