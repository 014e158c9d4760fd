"""Walks all batches through the blocks, whose weights stream from the source: one block in memory at a time.

Modeled on llmcompressor/pipelines/sequential/pipeline.py (0.14.0.1), with three differences. Weights come from the
source instead of an offloaded model. Without weight edits (round to nearest) there is no second pass, because its
outputs would equal those of the first. There are more checks: every block is compared with the model's own forward,
every observer must have seen something, every scale must be finite and positive.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import patch_attr
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.quantization.calibration import freeze_module_quantization, observe, update_qparams
from llmcompressor.observers import ACTIVATION_OBS, Observer
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from torch import nn

from calibration.checkpoint.dequantize import is_finite
from calibration.engine.activations import ActivationCache
from calibration.engine.attachment import BlockQuantizationModifier
from calibration.engine.experts import ExpertCalibration, Pass, fill_dead_experts, fill_from_peers
from calibration.engine.gptq import StreamingGPTQModifier
from calibration.engine.guards import (
    first_non_finite,
    require_scales,
    require_statistics,
)
from calibration.engine.results import BlockResult, CalibrationSummary, Callbacks
from calibration.engine.smoothing import Factors, Smoother
from calibration.engine.weighted import all_reduce_importance
from calibration.model import tracing
from calibration.model.parity import BlockCall, hidden_of, own_block_calls, require_parity
from calibration.model.source_model import SourceModel
from calibration.model.tracing import called_modules
from calibration.runs.memory import PeakMemory
from calibration.runs.ranks import Ranks
from calibration.runs.resume import Boundary, Resume
from calibration.runs.sharing import all_reduce_extremes, sum_counts
from recipes.errors import Interrupted, RecipeError, SourceError, WorkflowError


@dataclass
class CalibrationRun:
    """The settings and state of one run of the pipeline.

    `fused` are groups of transformers module names that must share a weight global scale; `scratch` holds activations
    beyond `max_host_memory` bytes. With `resume`, the blocks it names are skipped and every boundary is saved. Each of
    several `ranks` takes its own batches, and the weights of the modules (source names) that `owners` assigns to it.
    """

    source: SourceModel
    callbacks: Callbacks
    scratch: Path
    fused: Sequence[tuple[str, ...]] = ()
    min_tokens_per_expert: int = 1
    max_host_memory: int | None = None
    resume: Resume | None = None
    ranks: Ranks = field(default_factory=Ranks)
    owners: Mapping[str, int] = field(default_factory=dict)
    #: Smooths each block before its layers are observed.
    smoother: Smoother | None = None
    #: Numbers of the batches that the smoother sees.
    sample: range = range(0)
    experts: ExpertCalibration = field(default_factory=ExpertCalibration)
    summary: CalibrationSummary = field(default_factory=CalibrationSummary)
    memory: PeakMemory = field(default_factory=PeakMemory)
    #: Whether the modifiers were accepted and the forward passes have started.
    calibrating: bool = False

    def tell(self, event: str, **facts: Any) -> None:
        """Reports an event of the calibration through `on_progress`."""
        self.callbacks.on_progress({"event": event, **facts})

    def trace(self, sample: dict[str, Any], ignore: list[str]) -> list[Subgraph]:
        """Traces the model with llm-compressor on one batch. Raises WorkflowError unless each block becomes its own
        subgraph."""
        blocks = list(self.source.blocks.values())
        try:
            with tracing.repaired_tracing():
                subgraphs = trace_subgraphs(self.source.model, sample, self.source.sequential_targets, ignore)
        except Exception as error:
            name = type(self.source.model).__name__
            raise WorkflowError(f"{name}: llm-compressor cannot trace this model: {str(error)[-600:]}") from error
        found = [self.blocks_in(subgraph) for subgraph in subgraphs]
        if [block for group in found for block in group] != blocks or any(len(group) > 1 for group in found):
            raise WorkflowError(
                f"{type(self.source.model).__name__}: tracing gave {len(subgraphs)} parts, not one for each of the "
                f"{len(blocks)} blocks, in order; this model type is not supported"
            )
        return list(subgraphs)

    def blocks_in(self, subgraph: Subgraph) -> list[nn.Module]:
        """The blocks that a subgraph calls: one, or none before the first block and after the last."""
        blocks = set(self.source.blocks.values())
        return [module for module in called_modules(subgraph, self.source.model) if module in blocks]


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
class Walk:
    """Takes all batches through the subgraphs, one subgraph at a time."""

    run: CalibrationRun
    cache: ActivationCache
    subgraphs: list[Subgraph]
    samples: dict[int, dict[str, Any]]
    edits: bool
    #: The modifiers that attach and detach the modules of each subgraph; the others initialize all at the start.
    blockwise: Sequence[BlockQuantizationModifier] = ()
    #: The modifiers that divide their work among the ranks by themselves.
    dividing: Sequence[StreamingGPTQModifier] = ()
    #: Block number by subgraph; None for the subgraph before the first block (or after the last).
    numbers: list[int | None] = field(default_factory=list)
    entering: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)

    def walk(self) -> None:
        """Takes every batch through every unfinished block, starting at the nearest saved activations."""
        run, resume = self.run, self.run.resume or Resume(self.run.scratch)
        numbers = iter(range(len(run.source.blocks)))
        self.numbers = [next(numbers) if run.blocks_in(subgraph) else None for subgraph in self.subgraphs]
        for number, facts in sorted(resume.finished.items()):
            run.summary.take(number, facts)
        where = {number: index for index, number in enumerate(self.numbers) if number is not None}
        route = self._route(where, resume)
        for (index, saved), (following, _) in zip(route, [*route[1:], (None, None)], strict=True):
            if saved is not None:
                if index == route[0][0]:
                    self._look_before_the_blocks()
                run.tell("resume", block=self.numbers[index], directory=str(saved.directory))
                self.cache.restore(saved)
            self.step(index, following)

    def _route(self, where: dict[int, int], resume: Resume) -> list[tuple[int, Boundary | None]]:
        """The subgraphs to step through, in order, each with the saved activations to restore before it. `where` maps
        block numbers to subgraphs."""
        route: list[tuple[int, Boundary | None]] = []
        begin = 0
        for pending in (index for number, index in where.items() if number not in resume.finished):
            saved = max((n for n in resume.boundaries if begin < where[n] <= pending), default=None)
            start = begin if saved is None else where[saved]
            route += [(start, None if saved is None else resume.boundaries[saved])]
            route += [(index, None) for index in range(start + 1, pending + 1)]
            begin = pending + 1
        return route + [(index, None) for index in range(begin, len(self.subgraphs)) if begin > max(where.values())]

    def _look_before_the_blocks(self) -> None:
        """Records the model's own calls of its blocks, for parity, if the walk does not start at the text."""
        roots = self.roots(0)
        self.run.source.load(roots)
        self.record_own_calls()
        self.run.source.unload(roots)

    def part(self, index: int, number: int | None) -> Part:
        """The part of subgraph `index`, which contains block `number` unless it contains none."""
        source = self.run.source
        block = next(iter(self.run.blocks_in(self.subgraphs[index])), None)
        name = "before the blocks" if block is None else source.source_block(source.module_name(block))
        number = None if block is None else number
        where = name if number is None else f"block {number} ({name})"
        return Part(index, self.roots(index), block, number, name, where)

    def step(self, index: int, following: int | None) -> None:
        """Loads, calibrates, checks, reports and unloads one subgraph while the `following` one's weights are
        prefetched; then makes its outputs durable."""
        run, source, started = self.run, self.run.source, time.monotonic()
        part = self.part(index, self.numbers[index])
        number, roots = part.number, part.roots
        known = run.resume is not None and number in run.resume.finished and not self.edits
        for modifier in self.blockwise if not known else ():
            modifier.attach(roots)
        run.tell("load", block=number, name=part.name)
        source.load(roots)
        if following is not None and source.prefetches:
            source.prefetch(self.roots(following))
        self.cache.aim(index + 1, save=part.block is not None and index + 1 < len(self.subgraphs))
        if index == 0:
            self.record_own_calls()
        result = None if known else self._work(part, started)
        if result is not None:
            self._hand_over(result)
        else:
            self._repeat(part)
        for modifier in self.blockwise:
            modifier.detach()
        for module in [module for root in roots for module in root.modules()]:
            run.experts.forget(module)
            freeze_module_quantization(
                module
            )  # calibration_end does it too late: a thousand observers per block until then
        source.unload(roots)
        if number is not None:
            facts = None if result is None else result.facts()
            boundary = Boundary.whole(run.ranks.all_gather(f"activations after {part.where}", self.cache.commit()))
            run.callbacks.on_finished(number, facts, boundary)
        # After this barrier the block is finished for all ranks.
        stop = number is not None and run.ranks.any(f"end of {part.where}", run.callbacks.should_stop())
        self.cache.forget(before=index + 1)
        if number is not None and stop:
            total = len(source.blocks)
            rest = "writes the index" if number + 1 == total else f"resumes with block {number + 2}"
            raise Interrupted(f"stopped after block {number + 1} of {total}; the same command {rest}")

    def _work(self, part: Part, started: float) -> BlockResult:
        """Calibrates and checks the loaded part."""
        run, source, roots, where = self.run, self.run.source, part.roots, part.where
        quantized = {
            source.source_module(source.module_name(module)): module
            for root in roots
            for module in root.modules()
            if is_module_quantized(module)
        }
        _attach_again(quantized.values())
        factors = self._smooth(part)
        if factors:  # what such observers saw was not smoothed
            _attach_again(quantized.values())
        parity = self._calibrate(part)
        experts = [m for root in roots for m in root.modules() if isinstance(m, LinearExperts2D)]
        self._share_counts(experts, where)
        added = [self._top_up(module, where) for module in experts]
        self._share_statistics(quantized)
        tokens = {expert: count for module in experts for expert, count in run.experts.tokens(module).items()}
        filled = self._fill(experts, added)
        require_statistics(quantized, where)
        own = {name: m for name, m in quantized.items() if run.owners.get(name, 0) == run.ranks.rank}
        others = set() if self.dividing else set(quantized.values()) - set(own.values())
        with patch_attr(run.experts, "kind", Pass.PROPAGATE):
            modules = self.subgraphs[part.index].submodules(source.model)
            LifecycleCallbacks.sequential_epoch_end([module for module in modules if module not in others])
        update_qparams(others, ACTIVATION_OBS)
        nearest = self._round_to_nearest(own)
        if self.edits:
            self._propagate(part)
        require_scales(own, where)
        figures = run.ranks.all_gather(f"scales of {where}", (parity, run.memory.take()))
        return BlockResult(
            part.number, len(source.blocks), part.name, quantized, self._factors(factors, roots, quantized, where),
            tokens,
            {number: count for counts in added for number, count in counts.items()}, filled,
            nearest, max(parity for parity, _ in figures), time.monotonic() - started, max(peak for _, peak in figures),
        )  # fmt: skip

    def _share_statistics(self, quantized: dict[str, nn.Module]) -> None:
        """Combines the statistics of all ranks on every rank."""
        found = (getattr(module, f"{base}_observer", None) for module in quantized.values() for base in ACTIVATION_OBS)
        all_reduce_extremes(self.run.ranks, [observer for observer in found if observer is not None])
        all_reduce_importance(self.run.ranks, quantized.values())

    def _share_counts(self, experts: list[LinearExperts2D], where: str) -> None:
        """Adds up the token counts of all ranks on every rank."""
        counted = self.run.experts
        tokens = sum_counts(self.run.ranks, f"tokens of {where}", map(counted.tokens, experts))
        for module, total in zip(experts, tokens, strict=True):
            counted.count(module, total)

    def _top_up(self, experts: LinearExperts2D, where: str) -> dict[int, int]:
        """Shows experts that are short of tokens the tokens that the router ranks next for them. Returns expert number ->
        tokens added on all ranks."""
        run, top_up = self.run, self.run.experts.top_up
        if top_up is None:
            return {}
        offers = run.ranks.all_gather(f"candidates of {where}", top_up.ranks(experts))
        if run.ranks.any(f"ranking of {where}", top_up.is_unranked(experts)):
            run.tell(
                "log", level="warning", message=f"{where}: no ranking of tokens chooses its experts (as in hash-routed "
                f"layers), so none is topped up; with fewer than {top_up.wanted} tokens they take the largest inputs of peers"
            )  # fmt: skip
        shown, added = top_up.choose(experts, run.experts.tokens(experts), offers, run.ranks.rank)
        for number, tokens in shown.items():
            run.experts.show(experts, number, tokens)
        return added

    def _hand_over(self, result: BlockResult) -> None:
        if result.block is not None or result.modules:
            self.run.callbacks.on_block(result)
        if result.block is None:
            self.run.summary.modules += len(result.modules)
            return
        if self.run.resume is None or result.block not in self.run.resume.finished:
            self.run.summary.take(result.block, result.facts())
        self.run.tell(
            "block", block=result.block, blocks=result.blocks, name=result.name, modules=len(result.modules),
            seconds=round(result.seconds, 3), peak_rss=result.peak_rss, parity=result.parity,
            tokens_per_expert=result.tokens_per_expert, topped_up=result.topped_up, filled_experts=result.filled_experts,
        )  # fmt: skip

    def _repeat(self, part: Part) -> None:
        """Computes the outputs of a finished block again, with the same bits, without observing."""
        with self.run.experts.running(Pass.REPEAT):
            for batch, outputs, passed in self.forward(part, "repeat"):
                if passed is not None:
                    self.require_finite(part, passed.made, batch)
                self.keep(part.index, batch, outputs)

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
        wanted = is_module_quantized(head) or any(modifier.quantizes(head) for modifier in self.blockwise)
        return [module for module in roots if module is not head or wanted]

    def record_own_calls(self) -> None:
        """Runs the model's own forward with identity blocks, to record how it calls them (for parity)."""
        source = self.run.source
        for batch, sample in self.samples.items():
            with self.run.experts.running(Pass.REPEAT):
                calls = own_block_calls(source.model, list(source.blocks.values()), sample)
            self.entering[batch], self.calls[batch] = calls

    def _calibrate(self, part: Part) -> float:
        """Runs the pass that observes. Returns the largest difference to the model's own forward."""
        worst, rounds = 0.0, 0
        if self.dividing:
            rounds = max(self.run.ranks.all_gather(f"batches of {part.where}", len(self.cache)))
        with self.run.experts.running(Pass.CALIBRATE):
            for batch, outputs, passed in self.forward(part, "calibrate"):
                if passed is not None:
                    self.require_finite(part, passed.made, batch)
                    if batch in self.calls and part.number is not None:
                        worst = max(worst, self.check_parity(part, batch, passed))
                if not self.edits:
                    self.keep(part.index, batch, outputs)
                self._add_inputs(part)
        for _ in range(len(self.cache), rounds):
            self._add_inputs(part)
        return worst

    def _add_inputs(self, part: Part) -> None:
        for modifier in self.dividing:
            modifier.add_inputs(part.where)

    def _propagate(self, part: Part) -> None:
        """Runs the pass that computes the outputs with the edited weights."""
        with self.run.experts.running(Pass.PROPAGATE):
            for batch, outputs, passed in self.forward(part, "propagate"):
                if passed is not None:
                    self.require_finite(part, passed.made, batch)
                self.keep(part.index, batch, outputs)

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

    def _fill(self, experts: list[LinearExperts2D], added: list[dict[int, int]]) -> list[int]:
        for module in experts:
            fill_dead_experts(module)
        if get_calibrate_all_experts_flag():
            return []
        filled = []
        for module, more in zip(experts, added, strict=True):
            tokens, least = self.run.experts.tokens(module), self.run.min_tokens_per_expert
            if self.run.experts.top_up is not None:
                least = self.run.experts.top_up.least
            filled += fill_from_peers(module, {n: count + more.get(n, 0) for n, count in tokens.items()}, least)
        return filled

    @staticmethod
    def _round_to_nearest(quantized: dict[str, nn.Module]) -> list[str]:
        """Computes weight scales of modules that the modifier skipped: GPTQ skips an expert that saw no token. Returns
        their names."""
        left = {n: m for n, m in quantized.items() if not is_finite(getattr(m, "weight_scale", torch.zeros(())))}
        observe(list(left.values()), "weight")
        update_qparams(list(left.values()), "weight")
        return list(left)

    def _smooth(self, part: Part) -> dict[str, Factors]:
        """Smooths the loaded block. Observers with state of their own start after it."""
        if self.run.smoother is None or part.number is None:
            return {}

        def outputs(which: str) -> list[torch.Tensor]:
            made = []
            with self.run.experts.running(Pass.PROPAGATE):
                for batch, _, passed in self.forward(part, "smooth"):
                    if which == "sample" and self.cache.numbers[batch] not in self.run.sample:
                        break
                    assert passed is not None
                    made.append(passed.made)
                    if which == "first":
                        break
            return made

        return self.run.smoother.smooth(part.number, outputs, self.run.tell)

    def _factors(
        self, factors: dict[str, Factors], roots: list[nn.Module], modules: dict[str, nn.Module], where: str
    ) -> dict[str, Factors]:
        """The factors. Raises RecipeError if a modifier changed what the plan copies."""
        edited = {name.rpartition(".")[0] for name in self.run.source.edited(roots)}
        smoothed = self.run.smoother.modules if self.run.smoother is not None else set()
        if outside := edited - smoothed - modules.keys():
            raise RecipeError(
                f"{where}: the modifiers changed {', '.join(sorted(outside))}, which the output copies unchanged"
            )
        return factors


def _attach_again(modules: Iterable[nn.Module]) -> None:
    """Attaches observers with state of their own (imatrix) again: they created it on meta, before the weights were
    loaded."""
    for module in modules:
        for child in list(module.children()):
            if isinstance(child, Observer) and type(child).attach is not Observer.attach:
                child.detach(module)
                child.attach(module)
