"""The calibrate stage: runs the data through the model, and exports and journals each finished block.

Separate from `stages`, because it imports torch's and llm-compressor's model code, which takes seconds.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calibration.data.batches import CalibrationData, embedding_rows, load_batches, load_tokenizer
from calibration.engine.export import Exporter
from calibration.engine.oneshot import calibrate, quiet
from calibration.engine.results import BlockResult, CalibrationSummary, Callbacks
from calibration.model.skeleton import build_skeleton
from calibration.plan.plan import Plan
from calibration.runs.fingerprint import fingerprint
from calibration.runs.output import remove_unfinished
from calibration.runs.resume import Boundary, Resume, discard_of, open_resume
from calibration.runs.row_invariance import Products, try_products
from calibration.runs.sharing import require_batches, require_equal
from recipes.errors import RecipeError
from workflows.progress import Reporter
from workflows.run.state import Run

#: Warnings of llm-compressor that occur in every run here and need no action.
_EXPECTED = ("No accelerator available", "Calibration pipeline is set to")


def calibrate_blocks(run: Run) -> None:
    """Calibrates every unfinished block of the run's plan and writes its shards; then those outside the blocks.

    Resumes an earlier run of the same recipe; see `open_resume` for what `restart` and `overwrite` discard. All ranks
    call this; rank 0 alone writes. Reuses the batches and the empty model of the rehearsal. Raises the errors of
    `load_batches`, `require_batches`, `open_resume`, `build_skeleton`, `calibrate` and `Exporter`; what is finished
    stays.
    """
    task, reporter, ranks = run.task, run.reporter, run.ranks
    if task.recipe.calibration is None:
        raise RecipeError("calibration: is missing; `calibration: {dataset: bundled}` is the smallest")
    ranks.start()
    data = _data(run)
    shapes = (task.formats.of(step.source).shape for step in task.plan.quantized.values())
    hessians = "GPTQModifier" in [entry.name for entry in task.recipe.modifiers]
    found = try_products(shapes, ranks.device, hessians=hessians)
    now = fingerprint(task, data.digest, found.device)
    if data.regrouped:  # absent otherwise: a run that began with padded batches must not resume without padding
        now["batches"] = "of samples of one length, without padding"
    require_equal(ranks, "settings", now | {"products": found.digest})
    resume = open_resume(task, run.directory, now, discard_of(run.restart, run.overwrite), ranks)
    if ranks.writes:
        remove_unfinished(run.output)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    blocks = _Blocks(run, Exporter(task, ranks), resume)
    pending = [number for number in task.plan.block_numbers if number not in resume.finished]
    _say_where(resume, pending, task.plan, reporter)
    if pending:
        _say_products(found, run)
        summary = _calibrate(run, data, blocks)
    else:
        summary = CalibrationSummary(blocks=len(resume.finished))
        for number, facts in resume.finished.items():
            summary.take(number, facts)
    ranks.stop()
    if ranks.writes:
        blocks.write_rest()
        _say_end(run, data, summary, blocks.exporter.exact)


def _data(run: Run) -> CalibrationData:
    task, data = run.task, run.prepared.data
    if data is None:
        options = task.recipe.calibration
        assert options is not None, "calibrate_blocks requires it"
        tokenizer = load_tokenizer(task.source.directory, task.recipe.source.trust_remote_code)
        data = load_batches(
            options, tokenizer, source_directory=task.source.directory, embedding=embedding_rows(task.source)
        )
        if data.warning:
            run.reporter.say(data.warning, "warning")
    run.reporter.say(f"data: {data.description}")
    require_batches(run.ranks, len(data.batches))
    return data


def _calibrate(run: Run, data: CalibrationData, blocks: _Blocks) -> CalibrationSummary:
    task, ranks, resume = run.task, run.ranks, blocks.resume
    callbacks = Callbacks(
        blocks.on_block,
        blocks.on_progress,
        on_finished=blocks.on_finished,
        should_stop=lambda: run.interrupts.requested,
    )
    with ExitStack() as stack:
        # A rank on another host may not see the run directory, and only one rank may write there.
        skeleton = run.directory.path if ranks.writes else Path(stack.enter_context(TemporaryDirectory()))
        with quiet(blocks.on_progress):
            model = run.prepared.model or build_skeleton(
                task.formats, skeleton, task.recipe.source.trust_remote_code, ranks.device
            )
        stack.enter_context(run.interrupts.deferring())
        stack.enter_context(run.reporter.counting("calibrating blocks", len(model.blocks), len(resume.finished)))
        return calibrate(task, model, data.batches, callbacks, resume, ranks)


def _say_end(run: Run, data: CalibrationData, summary: CalibrationSummary, exact: dict[str, bool]) -> None:
    counts = [count for block in summary.tokens_per_expert.values() for count in block.values()]
    seen = f"min {min(counts)}, median {statistics.median(counts):.0f}" if counts else "no routed experts"
    if more := [count for block in summary.topped_up.values() for count in block.values()]:
        seen += f"; {len(more)} of {len(counts)} experts topped up with {sum(more)} tokens"
    if exact:
        kept = sum(exact.values())
        run.reporter.say(f"MXFP4 weights: {kept} keep their values, {len(exact) - kept} are requantized")
    facts = {"data": data.description, "rows": list(data.rows), "revision": data.revision, "tokens_per_expert": seen}
    run.directory.record("calibrated", **facts, seconds=round(summary.seconds, 1))
    run.reporter.say(f"calibrated {summary.modules} modules in {summary.blocks} blocks; tokens per expert: {seen}")


@dataclass
class _Blocks:
    """Receives each block from the engine; writes it to disk and journal, and reports it."""

    run: Run
    exporter: Exporter
    resume: Resume
    _shards: dict[str, str] = field(default_factory=dict)
    _facts: dict[str, Any] = field(default_factory=dict)

    def on_block(self, result: BlockResult) -> None:
        """Writes the shards of a calibrated block; with the last block also those outside the blocks."""
        started = time.monotonic()
        inside = {name: m for name, m in result.modules.items() if self.run.task.family.place(name).block is not None}
        outside = {name: m for name, m in result.modules.items() if name not in inside}
        self._shards = {} if result.block is None else self.exporter.block(result.block, inside, result.factors)
        if result.block == result.blocks - 1:
            self._shards |= self.exporter.rest(outside)
            self.resume.rest = True
        errors = {name: self.exporter.errors[name] for name in inside if name in self.exporter.errors}
        self._facts = {
            "name": result.name,
            "blocks": result.blocks,
            "seconds": round(result.seconds, 2),
            "export_seconds": round(time.monotonic() - started, 2),
            "modules": len(inside),
            "tokens_per_expert": result.tokens_per_expert,
            "topped_up": result.topped_up,
            "filled_experts": result.filled_experts,
            "worst_error": max(errors.values(), default=None),
            "exact_weights": sum(self.exporter.exact.get(name, False) for name in inside),
            "expert_errors": self._worst_by_expert(errors),
            "parity": result.parity,
            "peak_memory": result.peak_rss,
            "bytes_written": sum((self.run.output / shard).stat().st_size for shard in self._shards),
            "shards": sorted(self._shards),
        }

    def _worst_by_expert(self, errors: dict[str, float]) -> dict[int, float]:
        worst: dict[int, float] = {}
        for name, error in errors.items():
            expert = self.run.task.family.place(name).expert
            if expert is not None:
                worst[expert] = max(worst.get(expert, 0.0), round(error, 5))
        return worst

    def on_finished(self, block: int, facts: dict[str, Any] | None, boundary: Boundary | None) -> None:
        """Writes a block's journal line, after which it is finished. Rank 0 does this for all ranks."""
        if not self.run.ranks.writes:
            return
        saved = None if boundary is None else {"directory": str(boundary.directory.absolute()), "files": boundary.files}
        if facts is None:
            self.run.directory.record("boundary", plan=self.run.plan.digest, block=block, activations=saved)
            self.run.reporter.say(f"block {block + 1}: finished before, its outputs calculated again")
        else:
            self.run.directory.record(
                "shards", plan=self.run.plan.digest, block=block, shards=self._shards, activations=saved, result=facts
            )
            self.run.reporter.block(block + 1, self._facts.pop("blocks"), self._facts)
        for number, old in self.resume.boundaries.items():
            if number <= block:  # it may be in an earlier offload.directory
                shutil.rmtree(old.directory, ignore_errors=True)

    def write_rest(self) -> None:
        """Writes the shards outside the blocks if only these are missing or damaged."""
        if not self.resume.rest:
            shards = self.exporter.rest({})
            self.run.directory.record("shards", plan=self.run.plan.digest, block=None, shards=shards)

    def on_progress(self, event: dict[str, Any]) -> None:
        """Records engine events in the run directory, and prints those that an operator must know."""
        kind = event.pop("event")
        if kind == "log" and not any(part in event["message"] for part in _EXPECTED):
            self.run.reporter.say(f"llm-compressor: {event['message']}", event["level"])
        elif kind == "trace":
            self.run.reporter.say(f"tracing {event['blocks']} blocks; {event['batches']} batches")
        if kind not in ("batch", "block"):
            self.run.reporter.event(kind, **event)


def _say_products(found: Products, run: Run) -> None:
    """Records how products round here, and reports what a run loses if it began on a machine that rounds
    differently."""
    run.reporter.event("products", **found.facts)
    if not run.ranks.writes:
        return
    facts = run.directory.facts()
    lost = found.lost(facts)
    if lost is not None:
        run.reporter.say(lost, "warning")
    if lost is not None or not any(fact["fact"] == "products" for fact in facts):
        run.directory.record("products", plan=run.plan.digest, **found.facts)


def _say_where(resume: Resume, pending: list[int], plan: Plan, reporter: Reporter) -> None:
    total = len(plan.block_numbers)
    if resume.damaged:
        shown = ", ".join(resume.damaged[:3]) + (
            f" and {len(resume.damaged) - 3} more" if len(resume.damaged) > 3 else ""
        )
        redone = f"; {len(pending)} of {total} blocks are calibrated (again)" if pending else ""
        reporter.say(f"damaged or missing since they were finished: {shown}{redone}", "warning")
    if not resume.finished:
        return
    if not pending:
        reporter.say(f"all {total} blocks are finished and intact: nothing to calibrate")
        return
    start = resume.starting_point(pending[0])
    reporter.say(f"{len(resume.finished)} of {total} blocks are finished; resuming with block {pending[0] + 1}")
    if start < pending[0]:
        origin = f"the saved activations of block {start + 1}" if start else "the text"
        reporter.say(
            f"the activations that enter block {pending[0] + 1} are gone: blocks {start + 1} to {pending[0]} are "
            f"calculated again from {origin}",
            "warning",
        )
