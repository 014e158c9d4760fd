"""What a run will take on this machine, stage by stage; and, at its end, the prediction beside the fact.

A stage's cost is counts (`calibration.forecast.cost`) times seconds per unit, measured now (`calibration.forecast.speed`),
or, once a block of every kind has been rehearsed, that block's own seconds. Formulas and errors: docs/cost-model.md.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.convert.layout import JOB
from calibration.forecast.cost import BF16, BlockCost, block_costs, boundary_bytes, hidden_width
from calibration.runs.memory import PeakMemory, anonymous_memory
from workflows.progress import clock, size

if TYPE_CHECKING:
    from calibration.forecast.rehearsal import Rehearsal
    from calibration.forecast.speed import Machine, Spent
    from workflows.run.stages import Run

#: Processor seconds per quantized module before the first forward pass: empty model, observers, trace. Measured on the
#: headers of V4-Pro (docs/cost-model.md), 49.0 s for 70,455 modules.
_START = 0.0007
#: Batches per block that are run twice, to compare with the model's own forward (calibration.model.parity).
_PARITY = 2
#: Passes over the hidden states of a block beside its products: norms, residuals, rotary positions.
_NORMS = 8
#: Anonymous memory of a run of a tiny model: libraries, tokenizer, data set. Measured (2-block Llama, 0.4 MB).
_IMPORTED = 380_000_000
FILE = "estimate.json"

Shapes = Sequence[tuple[int, int]]


def nominal_shapes(run: Run) -> list[tuple[int, int]]:
    """`(samples, tokens each)` of every batch where all samples are as long as the recipe allows: an upper bound."""
    data = run.recipe.calibration
    if data is None:
        return []
    full, rest = divmod(data.num_samples, data.batch_size)
    return [(data.batch_size, data.max_seq_length)] * full + ([(rest, data.max_seq_length)] if rest else [])


def predict(
    run: Run,
    machine: Machine,
    shapes: Shapes | None = None,
    boundary: int | None = None,
    rehearsal: Rehearsal | None = None,
    finished: Collection[int] = (),
) -> dict[str, Any]:
    """`stages`: per stage `seconds`, `cpu_seconds`, `bytes_read`, `bytes_written`, `peak_memory` and the `terms` that make
    up the seconds; `notes`: how each came about. `shapes` and `boundary` are those of the real data where it is loaded;
    blocks that are `finished` cost nothing."""
    notes: list[str] = []
    if machine.write is None:
        from calibration.forecast.speed import ASSUMED_WRITE

        notes.append(f"writing is assumed to run at {ASSUMED_WRITE / 1e6:.0f} MB/s: no unnamed file can be had there")
    else:
        notes.append(f"writing measured: {1e-6 / max(machine.write.clock, 1e-12):,.0f} MB/s")
    notes.append(f"reading measured: {1e-6 / max(machine.read.clock, 1e-12):,.0f} MB/s")
    data = run.recipe.calibration
    every = block_costs(run.plan, run.formats, data is None or data.all_experts)
    costs = [cost for cost in every if cost.number not in finished or cost.number is None]
    if run.recipe.method == "calibrate":
        given = list(shapes if shapes is not None else nominal_shapes(run))
        if shapes is None:
            notes.append("every sample is taken to be max_seq_length tokens long: at most this")
        width = hidden_width(run.source.config)
        kept = boundary if boundary is not None else boundary_bytes(width, given)
        work = _calibration(run, machine, costs, given, kept, rehearsal, notes)
    else:
        work = _conversion(run, machine, costs)
    written = sum(cost.written for cost in costs)
    stages = {"calibrate": work}
    if run.recipe.verify.structure or run.recipe.verify.fidelity:
        passes = run.plan.output_bytes * 2 + (run.source.total_bytes if run.recipe.verify.fidelity else 0)
        stages["verify"] = _told({"read": machine.read * passes}, passes, 0, None) | {"at_least": True}
        notes.append("verify: reading alone; serving is not predicted")
    return {"from": "rehearsal" if rehearsal else "micro-benchmark", "stages": stages, "notes": notes,
            "blocks": sum(cost.number is not None for cost in costs), "output_bytes": written}  # fmt: skip


def _calibration(
    run: Run, machine: Machine, costs: list[BlockCost], shapes: Shapes, boundary: int, rehearsal: Rehearsal | None,
    notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    from calibration.forecast.speed import Spent

    blocks = [cost for cost in costs if cost.number is not None]
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    tokens = sum(n * t for n, t in shapes)
    # The passes of this rank's batches, and those of the parity samples, in units of the largest batch.
    passes = (1 if _one_pass(run) else 2) / run.ranks.size
    passed = passes * tokens / (largest[0] * largest[1])
    squares = passes * sum(n * t * t for n, t in shapes) / (largest[0] * largest[1] ** 2)
    again = min(_PARITY, len(set(shapes)))
    rehearsed = {} if rehearsal is None else {n: block for block in rehearsal.blocks for n in block.blocks}
    width = hidden_width(run.source.config)
    write = _writing(machine) + machine.digest
    terms = dict.fromkeys(("start", "load", "forward", "observe", "quantize", "write", "activations"), Spent())
    terms["start"] = Spent(_START, _START) * sum(cost.modules for cost in costs)
    if run.ranks.size > 1:
        notes.append(
            f"{run.ranks.size} ranks, as if each had this machine to itself; loads and writes are not shared out"
        )
    for cost in costs:
        known = None if cost.number is None else rehearsed.get(cost.number)
        load = Spent()
        for kind, nbytes in cost.reads.items():
            load += machine.load(kind) * nbytes
        terms["load"] += known.load if known else load
        count = largest[0] * largest[1]
        for product, equal in cost.products.items():
            if product.use != "expert gate":  # one input for all of them, observed once
                terms["observe"] += machine.observe(count, product.columns) * (equal * passed)
        # The model's own forward takes over what the traced one's experts made of the same input.
        times = passed + again * cost.outside_experts(largest[1])
        if known:
            terms["forward"] += known.forward * times
        elif cost.number is not None:
            terms["forward"] += _forward(machine, cost, count, width) * times
            terms["forward"] += machine.attention(*cost.attention, largest[1]) * largest[0] * (squares + again)
        terms["quantize"] += machine.pack * (cost.quantized / run.ranks.size)
        terms["write"] += write * cost.written
    held = min(boundary, run.recipe.offload.max_host_memory or 0)
    # What enters the first block goes to disk only where memory does not hold it.
    first = boundary - held if any(cost.number == 0 for cost in blocks) else 0
    kept = first + boundary * max(len(blocks) - 1, 0)
    terms["activations"] = write * kept
    if not _one_pass(run):
        notes.append("weights are edited (GPTQ, ...): two passes; the modifier's own arithmetic is not predicted")
    block = max((cost.values * BF16 for cost in blocks), default=0)
    peak = _peak(costs, block, largest, rehearsal) + held
    return _told(terms, sum(cost.source_bytes for cost in costs), sum(cost.written for cost in costs) + kept, peak)


def _forward(machine: Machine, cost: BlockCost, tokens: int, width: int) -> Spent:
    """One batch through a block, but for the scores of attention."""
    spent = machine.norm(tokens, width) * _NORMS
    for product, times in cost.products.items():
        spent += machine.product(product, tokens) * times
        if product.use == "expert down":
            spent += machine.expert(product, tokens) * times
    return spent


def _conversion(run: Run, machine: Machine, costs: list[BlockCost]) -> dict[str, Any]:
    from calibration.forecast.speed import Spent

    read, written = sum(cost.source_bytes for cost in costs), sum(cost.written for cost in costs)
    workers = min(run.recipe.convert.workers or os.cpu_count() or 1, os.cpu_count() or 1)
    compute = machine.conversion * written
    parts = {"read": machine.read * read, "compute": Spent(compute.clock / workers, compute.cpu),
             "write": _writing(machine) * written}  # fmt: skip
    # Reading, computing and writing overlap, as far as there are processors for it.
    clocks = max(max(part.clock for part in parts.values()), sum(p.cpu for p in parts.values()) / (os.cpu_count() or 1))
    # One input buffer for each worker, and two outputs more than workers (calibration.convert.pipeline).
    peak = anonymous_memory() + (2 * workers + 2) * min(JOB, run.plan.output_bytes)
    told = _told(parts, read, written, peak)
    return told | {"seconds": round(clocks, 3)}


def _one_pass(run: Run) -> bool:
    return all(entry.name == "QuantizationModifier" for entry in run.recipe.modifiers)


def _writing(machine: Machine) -> Spent:
    from calibration.forecast.speed import ASSUMED_WRITE, Spent

    return machine.write or Spent(1 / ASSUMED_WRITE, 0.0)


def _peak(costs: list[BlockCost], block: int, largest: tuple[int, int], rehearsal: Rehearsal | None) -> int:
    """Anonymous memory: what the process holds without a block, a block in BF16 and as much again while it is observed and
    packed, the shards made of it, the scores of attention. Growth from block to block is not in it."""
    made = max((cost.written for cost in costs if cost.number is not None), default=0)
    if rehearsal is not None:
        return rehearsal.peak_memory + block + made
    heads = max((cost.attention[0] for cost in costs), default=0)
    scores = heads * largest[0] * largest[1] ** 2 * (4 + 4 + 2)
    return max(anonymous_memory(), _IMPORTED) + 2 * block + made + scores


def _told(terms: dict[str, Spent], read: int, written: int, peak: int | None) -> dict[str, Any]:
    return {
        "seconds": round(math.fsum(spent.clock for spent in terms.values()), 3),
        "cpu_seconds": round(math.fsum(spent.cpu for spent in terms.values()), 3),
        "bytes_read": read,
        "bytes_written": written,
        "peak_memory": peak,
        "terms": {name: [round(spent.clock, 3), round(spent.cpu, 3)] for name, spent in terms.items()},
    }


@contextmanager
def measured(facts: dict[str, dict[str, Any]], stage: str) -> Iterator[None]:
    """Puts what a stage took into `facts`: seconds, processor seconds (children included), bytes read from disk (what lay
    in the page cache is not among them) and handed to write, peak of anonymous memory."""
    began, cpu, moved = time.monotonic(), _cpu(), _moved()
    with PeakMemory() as memory:
        try:
            yield
        finally:
            now = _moved()
            facts[stage] = {
                "seconds": round(time.monotonic() - began, 3),
                "cpu_seconds": round(_cpu() - cpu, 3),
                "bytes_read": now[0] - moved[0],
                "bytes_written": now[1] - moved[1],
                "peak_memory": memory.take(),
            }


def compare(predicted: dict[str, Any], facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Prediction and fact of every stage that has both, for `estimate.json`."""
    both = {
        name: {"predicted": told, "fact": facts[name]} for name, told in predicted["stages"].items() if name in facts
    }
    return {"from": predicted["from"], "notes": predicted["notes"], "stages": both}


def render(estimate: dict[str, Any]) -> list[str]:
    """Lines for people: per stage the prediction, and the fact where there is one."""
    lines = []
    for name, entry in estimate["stages"].items():
        predicted, fact = entry.get("predicted", entry), entry.get("fact")
        least = "at least " if predicted.get("at_least") else ""
        told = f"{name}: {least}{_seconds(predicted['seconds'])}, {_bytes(predicted)}"
        terms = ", ".join(
            f"{term} {_seconds(spent[0])}" for term, spent in predicted["terms"].items() if spent[0] >= 0.05
        )
        if fact is None:
            lines.append(f"predicted {told}" + (f" ({terms})" if terms else ""))
        else:
            lines.append(f"{name}: {_seconds(fact['seconds'])}, {_bytes(fact)}; predicted {told.partition(': ')[2]}")
    return lines


def _bytes(told: dict[str, Any]) -> str:
    peak = f", peak memory {size(told['peak_memory'])}" if told["peak_memory"] is not None else ""
    return f"{size(told['bytes_read'])} read, {size(told['bytes_written'])} written{peak}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else clock(seconds)


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _moved() -> tuple[int, int]:
    """Bytes that this process read from disk and handed to write."""
    try:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0, 0
    return int(lines["read_bytes"]), int(lines["wchar"])
