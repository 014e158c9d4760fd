"""Passes all batches through one part of the model at a time, and judges what comes out of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from llmcompressor.core import active_session
from llmcompressor.pipelines.sequential.helpers import Subgraph
from torch import nn

from calibration.checkpoint.dequantize import is_finite
from calibration.engine.activations import ActivationCache
from calibration.engine.experts import Pass
from calibration.engine.guards import first_non_finite
from calibration.engine.run import CalibrationRun
from calibration.model.parity import BlockCall, hidden_of, own_block_calls, require_parity
from calibration.model.tracing import called_modules
from recipes.errors import SourceError


@dataclass(frozen=True)
class Part:
    """One subgraph of the traced model: its `index` and `roots`, the modules whose weights it needs. `block` and its
    `number` are None before the first block (or after the last); `name` is the source's; `where` names the part in
    messages."""

    index: int
    roots: list[nn.Module]
    block: nn.Module | None
    number: int | None
    name: str
    where: str


@dataclass(frozen=True)
class Passed:
    """What went through a block: the hidden states that entered, its other arguments, the hidden states that left."""

    hidden: torch.Tensor
    call: BlockCall
    made: torch.Tensor


@dataclass
class Passes:
    """The batches in the `cache` and the parts that they pass through. `samples` are the batches, by index, that are
    compared with the model's own forward."""

    run: CalibrationRun
    cache: ActivationCache
    subgraphs: list[Subgraph]
    samples: dict[int, dict[str, Any]]
    #: Whether the weights of the head are needed: llm-compressor's calibration forward computes no logits.
    quantizes_head: bool = False
    #: What enters block 0 in the model's own forward, by sample, and how it calls its blocks.
    entering: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)

    def part(self, index: int, number: int | None) -> Part:
        """The part of subgraph `index`, which contains block `number` unless it contains none."""
        source = self.run.source
        block = next(iter(self.run.blocks_in(self.subgraphs[index])), None)
        name = "before the blocks" if block is None else source.source_block(source.module_name(block))
        number = None if block is None else number
        where = name if number is None else f"block {number} ({name})"
        return Part(index, self.roots(index), block, number, name, where)

    def roots(self, index: int) -> list[nn.Module]:
        """The modules whose weights a subgraph needs."""
        model = self.run.source.model
        roots = called_modules(self.subgraphs[index], model)
        if index == 0:
            # The embedding is called inside wrapped code, where the graph does not show it.
            later = {module for subgraph in self.subgraphs[1:] for module in called_modules(subgraph, model)}
            roots += [module for module in self.run.source.outside_blocks() if module not in {*later, *roots}]
        # calibration_forward_context gives the head a forward that needs no weights.
        head = model.get_output_embeddings()
        return [module for module in roots if module is not head or self.quantizes_head]

    def record_own_calls(self) -> None:
        """Runs the model's own forward with identity blocks, to record how it calls them (for parity)."""
        source = self.run.source
        for batch, sample in self.samples.items():
            with self.run.experts.running(Pass.REPEAT):
                calls = own_block_calls(source.model, list(source.blocks.values()), sample)
            self.entering[batch], self.calls[batch] = calls

    def forward(self, part: Part, kind: str) -> Iterator[tuple[int, dict[str, Any], Passed | None]]:
        """Yields for each batch its index, outputs, and what went through the block."""
        subgraph, passed = self.subgraphs[part.index], list[Passed]()

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            passed.append(Passed(*BlockCall.of(args, kwargs), hidden_of(output)))

        for batch in range(len(self.cache)):
            active_session().state.current_batch_idx = batch
            if self.run.experts.top_up is not None:
                self.run.experts.top_up.enter_batch(batch)
            inputs = self.cache.fetch(batch, subgraph.input_names)
            handle = None if part.block is None else part.block.register_forward_hook(watch, with_kwargs=True)
            outputs = subgraph.forward(self.run.source.model, **inputs)
            if handle is not None:
                handle.remove()
            self.run.tell("batch", block=part.number, batch=batch, batches=len(self.cache), kind=kind)
            yield batch, outputs, passed.pop() if passed else None

    def compute(self, part: Part, kind: Pass) -> None:
        """Computes and keeps the outputs of a loaded part without observing: with the same bits (REPEAT), or with the edited
        weights (PROPAGATE)."""
        with self.run.experts.running(kind):
            for batch, outputs, passed in self.forward(part, kind.value):
                if passed is not None:
                    self.require_finite(part, passed.made, batch)
                self.keep(part.index, batch, outputs)

    def keep(self, index: int, batch: int, outputs: dict[str, Any]) -> None:
        """Keeps a subgraph's outputs for the next one."""
        if index + 1 < len(self.subgraphs):
            self.cache.replace(batch, outputs, self.subgraphs[index].consumed_names)

    def check_parity(self, part: Part, batch: int, passed: Passed) -> float:
        """The largest difference between what left the block and the result of the model's own call of it on what entered.
        Raises ParityError."""
        block, number = part.block, part.number
        assert block is not None and number is not None
        worst = 0.0
        if number == 0:
            worst = require_parity("before block 0", passed.hidden, self.entering[batch])
        self.calls[batch][number].complete(passed.call)
        with self.run.experts.running(Pass.REPEAT):
            own = self.calls[batch][number](block, passed.hidden)
        return max(worst, require_parity(f"block {number}", passed.made, own))

    def require_finite(self, part: Part, made: torch.Tensor, batch: int) -> None:
        """Raises SourceError that names the first module with NaN or Inf if the block's output is not finite."""
        if part.block is None or is_finite(made):
            return
        source, subgraph = self.run.source, self.subgraphs[part.index]
        name = source.module_name(part.block)
        with self.run.experts.running(Pass.PROPAGATE):
            inputs = self.cache.fetch(batch, subgraph.input_names)
            forward = partial(subgraph.forward, source.model, **inputs)
            first = first_non_finite(part.block.named_modules(prefix=name), forward)
        raise SourceError(
            f"{part.where}, batch {self.cache.numbers[batch]}: the hidden states are not finite; the first module with NaN "
            f"or Inf is {first or name}; the source overflows in BF16 on this text, or is damaged"
        )
