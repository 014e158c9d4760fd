"""Predicts what a run takes, stage by stage.

A stage's cost is counts (`calibration.forecast.cost`) times seconds per unit, measured now
(`calibration.forecast.speed`), or, after a rehearsal of a block of every kind, that block's own seconds. Formulas and
errors: docs/cost-model.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calibration.convert.layout import JOB
from calibration.forecast.cost import (
    BF16,
    BlockCost,
    Shapes,
    block_costs,
    boundary_bytes,
    hessian_bytes,
    hidden_width,
    nominal_shapes,
    shown_share,
)
from calibration.forecast.speed import ASSUMED_WRITE, Machine, Spent
from calibration.plan.task import Task
from calibration.runs.memory import anonymous_memory

if TYPE_CHECKING:  # llm-compressor takes seconds to import
    from calibration.forecast.rehearsal import Rehearsal

#: CPU seconds per quantized module: 0.13 ms before the first forward pass (empty model, modifiers, trace), 0.33 ms for scales,
#: observers and hooks when its block is loaded. Measured on the headers of V4-Pro (docs/cost-model.md).
_START = 0.0005
#: Batches per block that run twice, for the comparison with the model's own forward (calibration.model.parity).
_PARITY = 2
#: Passes over the hidden states in a block besides its products: norms, residuals, rotary positions.
_NORMS = 8
#: Anonymous memory of a run of a tiny model: libraries, tokenizer, data set. Measured (2-block Llama, 0.4 MB).
_IMPORTED = 380_000_000


@dataclass(frozen=True)
class Seen:
    """What is known about a run beyond its headers: the `shapes` of its batches (`(samples, tokens each)`), the bytes
    of the activations at a `boundary` between blocks, and the `rehearsal` of a block of every kind."""

    shapes: Shapes | None = None
    boundary: int | None = None
    rehearsal: Rehearsal | None = None


def predict(
    task: Task, machine: Machine, seen: Seen | None = None, finished: Collection[int] = (), ranks: int = 1
) -> dict[str, Any]:
    """The prediction as JSON. `stages`: per stage `seconds`, `cpu_seconds`, `bytes_read`, `bytes_written`,
    `peak_memory` and the `terms` that make up the seconds; `notes`: how the figures were obtained. Blocks that are
    `finished` cost nothing; batches are divided among `ranks`."""
    seen, notes = seen or Seen(), list[str]()
    if machine.write is None:
        notes.append(
            f"writing is assumed to run at {ASSUMED_WRITE / 1e6:.0f} MB/s: the file system does not support O_TMPFILE"
        )
    else:
        notes.append(f"writing measured: {1e-6 / max(machine.write.clock, 1e-12):,.0f} MB/s")
    notes.append(f"reading measured: {1e-6 / max(machine.read.clock, 1e-12):,.0f} MB/s")
    tokens = sum(n * t for n, t in seen.shapes or nominal_shapes(task.recipe))
    every = block_costs(task.plan, task.formats, shown_share(task.recipe, tokens))
    costs = [cost for cost in every if cost.number not in finished or cost.number is None]
    if task.recipe.method == "calibrate":
        if seen.shapes is None:
            notes.append("every sample is assumed to have max_seq_length tokens: this is an upper bound")
            seen = replace(seen, shapes=nominal_shapes(task.recipe))
        work = _Calibration(task, machine, costs, seen, ranks).work(notes)
    else:
        work = _conversion(task, machine, costs)
    written = sum(cost.written for cost in costs)
    stages = {"calibrate": work}
    if task.recipe.verify.structure or task.recipe.verify.fidelity:
        passes = task.plan.output_bytes * 2 + (task.source.total_bytes if task.recipe.verify.fidelity else 0)
        stages["verify"] = figures({"read": machine.read * passes}, passes, 0, None) | {"at_least": True}
        notes.append("verify: reading only; serving is not predicted")
    return {"from": "rehearsal" if seen.rehearsal else "micro-benchmark", "stages": stages, "notes": notes,
            "blocks": sum(cost.number is not None for cost in costs), "output_bytes": written}  # fmt: skip


@dataclass(frozen=True)
class _Calibration:
    task: Task
    machine: Machine
    costs: list[BlockCost]
    seen: Seen
    ranks: int

    def work(self, notes: list[str]) -> dict[str, Any]:
        machine, costs, shapes, rehearsal = self.machine, self.costs, list(self.seen.shapes or ()), self.seen.rehearsal
        width = hidden_width(self.task.source.config)
        boundary = boundary_bytes(width, shapes) if self.seen.boundary is None else self.seen.boundary
        blocks = [cost for cost in costs if cost.number is not None]
        largest = max(shapes, key=lambda shape: shape[0] * shape[1])
        tokens = sum(n * t for n, t in shapes)
        # The passes of this rank's batches and of the parity samples, in units of the largest batch.
        passes = (1 if _one_pass(self.task) else 2) / self.ranks
        passed = passes * tokens / (largest[0] * largest[1])
        squares = passes * sum(n * t * t for n, t in shapes) / (largest[0] * largest[1] ** 2)
        again = min(_PARITY, len(set(shapes)))
        rehearsed = {} if rehearsal is None else {n: block for block in rehearsal.blocks for n in block.blocks}
        write = writing(machine) + machine.digest
        terms = dict.fromkeys(("start", "load", "forward", "observe", "quantize", "write", "activations"), Spent())
        terms["start"] = Spent(_START, _START) * sum(cost.modules for cost in costs)
        if self.ranks > 1:
            notes.append(f"{self.ranks} ranks, as if each had a machine of its own; loads and writes are not divided")
        for cost in costs:
            known = None if cost.number is None else rehearsed.get(cost.number)
            load = Spent()
            for kind, nbytes in cost.reads.items():
                load += machine.load(kind) * nbytes
            terms["load"] += known.load if known else load
            count = largest[0] * largest[1]
            for product, equal in cost.products.items():
                # Gate and up of an expert have one input, and so have those of all experts that see all tokens.
                inputs = equal if product.use != "expert gate" else equal / 2 if product.observed < 1 else 0
                if inputs:
                    rows = max(round(count * product.observed), 1)
                    terms["observe"] += machine.observe(rows, product.columns) * (inputs * passed)
            # The model's own forward reuses the outputs of the traced forward's experts for the same input.
            times = passed + again * cost.outside_experts(largest[1])
            if known:
                terms["forward"] += known.forward * times
            elif cost.number is not None:
                terms["forward"] += forward(machine, cost, count, width) * times
                terms["forward"] += machine.attention(*cost.attention, largest[1]) * largest[0] * (squares + again)
            terms["quantize"] += machine.pack * (cost.quantized / self.ranks)
            terms["write"] += write * cost.written
        held = min(boundary, self.task.recipe.offload.max_host_memory or 0)
        # The activations that enter the first block go to disk only if memory cannot hold them.
        first = boundary - held if any(cost.number == 0 for cost in blocks) else 0
        kept = first + boundary * max(len(blocks) - 1, 0)
        terms["activations"] = write * kept
        if not _one_pass(self.task):
            notes.append("weights are edited (GPTQ, ...): two passes; the modifier's own arithmetic is not predicted")
        block = max((cost.values * BF16 for cost in blocks), default=0)
        hessians = hessian_bytes(self.task, self.ranks)
        if hessians:
            notes.append(
                f"the Hessians of a block take {hessians / 1e9:,.2f} GB beside it{' on each rank' if self.ranks > 1 else ''}"
            )
        peak = _peak(costs, block, largest, rehearsal) + held + hessians
        return figures(
            terms, sum(cost.source_bytes for cost in costs), sum(cost.written for cost in costs) + kept, peak
        )


def forward(machine: Machine, cost: BlockCost, tokens: int, width: int) -> Spent:
    """The time of one batch through a block, without the attention scores."""
    spent = machine.norm(tokens, width) * _NORMS
    for product, times in cost.products.items():
        spent += machine.product(product, tokens) * times
        if product.use == "expert down":
            spent += machine.expert(product, tokens) * times
    return spent


def _conversion(task: Task, machine: Machine, costs: list[BlockCost]) -> dict[str, Any]:
    read, written = sum(cost.source_bytes for cost in costs), sum(cost.written for cost in costs)
    workers = min(task.recipe.convert.workers or os.cpu_count() or 1, os.cpu_count() or 1)
    compute = machine.conversion * written
    parts = {"read": machine.read * read, "compute": Spent(compute.clock / workers, compute.cpu),
             "write": writing(machine) * written}  # fmt: skip
    # Reading, computing and writing overlap, as far as there are enough processors.
    clocks = max(max(part.clock for part in parts.values()), sum(p.cpu for p in parts.values()) / (os.cpu_count() or 1))
    # One input buffer per worker, and two more output buffers than workers (calibration.convert.pipeline).
    peak = anonymous_memory() + (2 * workers + 2) * min(JOB, task.plan.output_bytes)
    return figures(parts, read, written, peak) | {"seconds": round(clocks, 3)}


def _one_pass(task: Task) -> bool:
    return task.recipe.quantization_modifier.name == "QuantizationModifier"


def writing(machine: Machine) -> Spent:
    """The time per written byte; assumed if it cannot be measured."""
    return machine.write or Spent(1 / ASSUMED_WRITE, 0.0)


def _peak(costs: list[BlockCost], block: int, largest: tuple[int, int], rehearsal: Rehearsal | None) -> int:
    """Anonymous memory in bytes: what the process holds without a block, a block in BF16 and the same again while it is
    observed and packed, its shards, and the attention scores. Does not include growth from block to block."""
    made = max((cost.written for cost in costs if cost.number is not None), default=0)
    if rehearsal is not None:
        return rehearsal.peak_memory + block + made
    heads = max((cost.attention[0] for cost in costs), default=0)
    scores = heads * largest[0] * largest[1] ** 2 * (4 + 4 + 2)
    return held_memory() + 2 * block + made + scores


def held_memory() -> int:
    """Anonymous memory in bytes of a run without a model: what this process has, at least that of the libraries."""
    return max(anonymous_memory(), _IMPORTED)


def figures(terms: dict[str, Spent], read: int, written: int, peak: int | None) -> dict[str, Any]:
    """A stage as JSON: its seconds are the sum of the `terms`; bytes read and written, and at the peak in memory."""
    return {
        "seconds": round(math.fsum(spent.clock for spent in terms.values()), 3),
        "cpu_seconds": round(math.fsum(spent.cpu for spent in terms.values()), 3),
        "bytes_read": read,
        "bytes_written": written,
        "peak_memory": peak,
        "terms": {name: [round(spent.clock, 3), round(spent.cpu, 3)] for name, spent in terms.items()},
    }
