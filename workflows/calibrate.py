"""The calibrate stage: data and model together, each finished block exported and put into the journal.

Apart from `stages` because it imports torch's and llm-compressor's model code, which takes seconds.
"""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import Any

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.plan import Plan
from calibration.data import load_batches, load_tokenizer
from calibration.export import Exporter
from calibration.journal import RunDirectory
from calibration.oneshot import calibrate, quiet
from calibration.sequential import BlockResult, Callbacks
from calibration.source_model import build_skeleton
from recipes.errors import RecipeError
from recipes.schema import Recipe
from workflows.progress import Reporter

#: Warnings of llm-compressor that are true of every run here and ask nothing of anybody.
_EXPECTED = ("No accelerator available", "Calibration pipeline is set to")


def calibrate_blocks(
    recipe: Recipe,
    plan: Plan,
    source: Checkpoint,
    formats: Formats,
    output: Path,
    directory: RunDirectory,
    reporter: Reporter,
) -> None:
    """Calibrates every block of `plan` and writes its shards as it is finished; then the shards outside the blocks.

    Raises the errors of `load_batches`, `build_skeleton`, `calibrate` and `Exporter`; what is written stays.
    """
    if recipe.calibration is None:
        raise RecipeError("calibration: is missing; `calibration: {dataset: bundled}` is the smallest")
    tokenizer = load_tokenizer(source.directory, recipe.source.trust_remote_code)
    data = load_batches(recipe.calibration, tokenizer, source_directory=source.directory)
    reporter.say(f"data: {data.description}")
    exporter = Exporter(plan, formats, recipe, output)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    directory.record("started", plan=plan.digest, data=data.digest)

    def on_block(result: BlockResult) -> None:
        started = time.monotonic()
        inside = {name: m for name, m in result.modules.items() if plan.family.place(name).block is not None}
        outside = {name: m for name, m in result.modules.items() if name not in inside}
        shards: dict[str, str] = {}
        if result.block is not None:
            shards = exporter.block(result.block, inside)
        if result.block == result.blocks - 1:
            shards |= exporter.rest(outside)
        directory.record("shards", plan=plan.digest, block=result.block, shards=shards)
        if result.block is None:
            return
        errors = [exporter.errors[name] for name in inside if name in exporter.errors]
        facts = {
            "name": result.name,
            "seconds": round(result.seconds, 2),
            "export_seconds": round(time.monotonic() - started, 2),
            "modules": len(inside),
            "tokens_per_expert": result.tokens_per_expert,
            "filled_experts": result.filled_experts,
            "worst_error": max(errors, default=None),
            "parity": result.parity,
            "peak_memory": result.peak_rss,
            "bytes_written": sum((output / shard).stat().st_size for shard in shards),
            "shards": sorted(shards),
        }
        reporter.block(result.block + 1, result.blocks, facts)

    def on_progress(event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "log" and not any(part in event["message"] for part in _EXPECTED):
            reporter.say(f"llm-compressor: {event['message']}", event["level"])
        elif kind == "trace":
            reporter.say(f"tracing {event['blocks']} blocks; {event['batches']} batches")
        if kind not in ("batch", "block"):
            reporter.event(kind, **event)

    with quiet(on_progress):
        model = build_skeleton(source, directory.path, recipe.source.trust_remote_code)
    with reporter.counting("calibrating blocks", len(model.blocks)):
        summary = calibrate(recipe, model, plan, data.batches, Callbacks(on_block, on_progress), directory.path / "activations")
    counts = [count for block in summary.tokens_per_expert.values() for count in block.values()]
    seen = f"min {min(counts)}, median {statistics.median(counts):.0f}" if counts else "no routed experts"
    directory.record("calibrated", data=data.description, tokens_per_expert=seen, seconds=round(summary.seconds, 1))
    reporter.say(f"calibrated {summary.modules} modules in {summary.blocks} blocks; tokens per expert: {seen}")
