"""Trace repair and trace parity: the traced blocks must compute what the model's own forward computes.

Stock llm-compressor loses the causal mask of models that write `mask_function = create_causal_mask if ... else ...`
(Mixtral, Qwen3-MoE, Mistral in transformers 5.17): the call then is not wrapped with its surroundings but becomes a
node of its own, whose config argument is rebuilt from `config.to_dict()`. The rebuilt config has forgotten
`_attn_implementation`, the mask function takes it for SDPA and returns no mask, and eager attention runs without one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential import helpers
from llmcompressor.pipelines.sequential.helpers import Subgraph
from torch import nn
from torch.fx.node import Argument
from transformers.configuration_utils import PretrainedConfig

from recipes.errors import WorkflowError

#: Batches of a rank compared with the model's own forward: one per shape of batch, at most this many.
PARITY_SAMPLES = 2
#: One BF16 rounding: a number's relative distance to its neighbour is at most 2^-7.
BF16_STEP = 2.0**-7


class ParityError(WorkflowError):
    """The traced model is not the model: calibrating it would give wrong scales."""


class ConfigKeepingTracer(helpers.SequentialTracer):  # type: ignore[misc]
    """llm-compressor's tracer, except that a config of the model itself is passed on as that very object."""

    def create_arg(self, a: Any) -> Argument:
        """The graph's form of one argument `a`."""
        if isinstance(a, PretrainedConfig):
            for name, module in self.root.named_modules():
                for attribute, value in vars(module).items():
                    if value is a:
                        node: Argument = self.create_node("get_attr", f"{name}.{attribute}".lstrip("."), (), {})
                        return node
        argument: Argument = super().create_arg(a)
        return argument


@contextmanager
def repaired_tracing() -> Iterator[None]:
    """llm-compressor's trace_subgraphs uses the repaired tracer inside."""
    with patch_attr(helpers, "SequentialTracer", ConfigKeepingTracer), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not reference an nn.Module.*")
        yield


@dataclass
class BlockCall:
    """The arguments that the model's own forward hands one block, but for the hidden states."""

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
        """The hidden states that `block` makes of `hidden` with these arguments."""
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

    Only what stands before the blocks (embedding, rotary frequencies) must be loaded. Returns the hidden states that
    enter the first block and the call of each block.
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
    """The batches that parity is checked with, by their index in `cache`: the first of each shape, at most
    PARITY_SAMPLES, the first batch among them."""
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


def called_modules(subgraph: Subgraph, model: nn.Module) -> list[nn.Module]:
    """The modules a subgraph calls, and the owners of tensors it reads by itself."""
    found: dict[nn.Module, None] = {}
    for node in subgraph.graph.nodes:
        if node.op == "call_module":
            found[model.get_submodule(node.target)] = None
        elif node.op == "get_attr":
            owner = model.get_submodule(node.target.rpartition(".")[0])
            if isinstance(getattr(owner, node.target.rpartition(".")[2], None), torch.Tensor):
                found[owner] = None
    return list(found)
