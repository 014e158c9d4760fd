"""Walks all batches through the blocks, whose weights stream from the source: one block in memory at a time.

Modeled on llmcompressor/pipelines/sequential/pipeline.py (0.14.0.1), with three differences. Weights come from the
source instead of an offloaded model. Without weight edits (round to nearest) there is no second pass, because its
outputs would equal those of the first. There are more checks: every block is compared with the model's own forward,
every observer must have seen something, every scale must be finite and positive.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import patch_attr
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.quantization.calibration import freeze_module_quantization, observe, update_qparams
from llmcompressor.observers import ACTIVATION_OBS, Observer
from torch import nn

from calibration.checkpoint.dequantize import is_finite
from calibration.engine.attachment import BlockQuantizationModifier
from calibration.engine.experts import Pass
from calibration.engine.gptq import StreamingGPTQModifier
from calibration.engine.guards import require_scales, require_statistics
from calibration.engine.passes import Part, Passes
from calibration.engine.peers import fill_dead_experts, fill_from_peers
from calibration.engine.results import BlockResult
from calibration.engine.run import CalibrationRun
from calibration.engine.smoothing import Factors
from calibration.engine.weighted import all_reduce_importance
from calibration.runs.resume import Boundary, Resume
from calibration.runs.sharing import all_reduce_extremes, sum_counts
from recipes.errors import Interrupted, RecipeError


@dataclass
class Walk:
    """Takes all batches through the subgraphs, one subgraph at a time."""

    passes: Passes
    #: Whether the modifiers edit weights: outputs are then computed in a second pass.
    edits: bool
    #: The modifiers that attach and detach the modules of each subgraph; the others initialize all at the start.
    blockwise: Sequence[BlockQuantizationModifier] = ()
    #: The modifiers that divide their work among the ranks by themselves.
    dividing: Sequence[StreamingGPTQModifier] = ()
    #: Block number by subgraph; None for the subgraph before the first block (or after the last).
    numbers: list[int | None] = field(default_factory=list)

    @property
    def run(self) -> CalibrationRun:
        """The settings and state of the run."""
        return self.passes.run

    def walk(self) -> None:
        """Takes every batch through every unfinished block, starting at the nearest saved activations."""
        run, resume = self.run, self.run.resume or Resume(self.run.scratch)
        numbers = iter(range(len(run.source.blocks)))
        self.numbers = [next(numbers) if run.blocks_in(subgraph) else None for subgraph in self.passes.subgraphs]
        for number, facts in sorted(resume.finished.items()):
            run.summary.take(number, facts)
        where = {number: index for index, number in enumerate(self.numbers) if number is not None}
        route = self._route(where, resume)
        for (index, saved), (following, _) in zip(route, [*route[1:], (None, None)], strict=True):
            if saved is not None:
                if index == route[0][0]:
                    self._look_before_the_blocks()
                run.tell("resume", block=self.numbers[index], directory=str(saved.directory))
                self.passes.cache.restore(saved)
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
        rest = range(begin, len(self.passes.subgraphs)) if begin > max(where.values()) else ()
        return route + [(index, None) for index in rest]

    def _look_before_the_blocks(self) -> None:
        """Records the model's own calls of its blocks, for parity, if the walk does not start at the text."""
        roots = self.passes.roots(0)
        self.run.source.load(roots)
        self.passes.record_own_calls()
        self.run.source.unload(roots)

    def step(self, index: int, following: int | None) -> None:
        """Loads, calibrates, checks, reports and unloads one subgraph while the `following` one's weights are
        prefetched; then makes its outputs durable."""
        run, source, cache, started = self.run, self.run.source, self.passes.cache, time.monotonic()
        part = self.passes.part(index, self.numbers[index])
        number, roots = part.number, part.roots
        known = run.resume is not None and number in run.resume.finished and not self.edits
        for modifier in self.blockwise if not known else ():
            modifier.attach(roots)
        run.tell("load", block=number, name=part.name)
        source.load(roots)
        if following is not None and source.prefetches:
            source.prefetch(self.passes.roots(following))
        cache.aim(index + 1, save=part.block is not None and index + 1 < len(self.passes.subgraphs))
        if index == 0:
            self.passes.record_own_calls()
        result = None if known else self._work(part, started)
        if result is not None:
            self._hand_over(result)
        else:
            self.passes.compute(part, Pass.REPEAT)
        for modifier in self.blockwise:
            modifier.detach()
        for module in [module for root in roots for module in root.modules()]:
            run.experts.forget(module)
            # calibration_end does it too late: a thousand observers per block until then.
            freeze_module_quantization(module)
        source.unload(roots)
        if number is not None:
            facts = None if result is None else result.facts()
            boundary = Boundary.whole(run.ranks.all_gather(f"activations after {part.where}", cache.commit()))
            run.callbacks.on_finished(number, facts, boundary)
        # After this barrier the block is finished for all ranks.
        stop = number is not None and run.ranks.any(f"end of {part.where}", run.callbacks.should_stop())
        cache.forget(before=index + 1)
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
            modules = self.passes.subgraphs[part.index].submodules(source.model)
            LifecycleCallbacks.sequential_epoch_end([module for module in modules if module not in others])
        update_qparams(others, ACTIVATION_OBS)
        nearest = self._round_to_nearest(own)
        if self.edits:
            self.passes.compute(part, Pass.PROPAGATE)
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

    def _calibrate(self, part: Part) -> float:
        """Runs the pass that observes. Returns the largest difference to the model's own forward."""
        worst, rounds = 0.0, 0
        if self.dividing:
            rounds = max(self.run.ranks.all_gather(f"batches of {part.where}", len(self.passes.cache)))
        with self.run.experts.running(Pass.CALIBRATE):
            for batch, outputs, passed in self.passes.forward(part, "calibrate"):
                if passed is not None:
                    self.passes.require_finite(part, passed.made, batch)
                    if batch in self.passes.calls and part.number is not None:
                        worst = max(worst, self.passes.check_parity(part, batch, passed))
                if not self.edits:
                    self.passes.keep(part.index, batch, outputs)
                self._add_inputs(part)
        for _ in range(len(self.passes.cache), rounds):
            self._add_inputs(part)
        return worst

    def _add_inputs(self, part: Part) -> None:
        for modifier in self.dividing:
            modifier.add_inputs(part.where)

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
                for batch, _, passed in self.passes.forward(part, "smooth"):
                    if which == "sample" and self.passes.cache.numbers[batch] not in self.run.sample:
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
