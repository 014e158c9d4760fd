"""Fidelity: compares every weight of the output with the source's, streaming, and the outputs of the quantized blocks
on text.

Needs no plan: output and source use the same module names, so that it works with any compressed-tensors NVFP4
checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.checkpoint.formats import Formats, logical_name, module_of
from calibration.checkpoint.view import as_compressed_tensors
from calibration.families.family import Family, Place
from calibration.families.registry import family_of, open_source
from calibration.plan.plan import Plan
from recipes.checks import Fidelity
from recipes.errors import WorkflowError
from recipes.schema import Calibration
from verify.checks import Check
from verify.fidelity.forward import verify_forward
from verify.fidelity.input_scales import input_scale_check, saturation_check
from verify.fidelity.rescaled import Rescaled, compensated, rescaled_blocks
from verify.fidelity.smoothing import SmoothedWeights
from verify.fidelity.verdicts import HOW, Explained, Pairs, block_errors, coverage_check, kept_checks, weight_checks
from verify.fidelity.weights import Measured, Stored, measure

COLUMNS = ("module", "part", "block", "expert", "projection", "relative_error", "sqnr_db", "cosine", "saturated",
           "zero_groups")  # fmt: skip
_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FidelityReport:
    """`checks`, and `data` as in fidelity.json: `columns`, `rows` (one per quantized module), `blocks`, `group_scales`
    (per part, the number of E4M3 group scales in each power of two) and `source` (how the data was obtained)."""

    checks: list[Check]
    data: dict[str, Any]


def verify_fidelity(
    directory: Path, plan: Plan | None, source: Formats, options: Fidelity | None = None
) -> list[Check]:
    """Only the checks of `measure_fidelity`."""
    return measure_fidelity(directory, plan, source, options).checks


def measure_fidelity(
    directory: Path,
    plan: Plan | None,
    source: Formats,
    options: Fidelity | None = None,
    progress: _Progress | None = None,
) -> FidelityReport:
    """Compares every weight of the checkpoint in `directory` with `source` and judges by the thresholds of `options`.
    `plan`, if there is one, says what had to be quantized. `progress(done, total)` counts weights. Memory: a few
    stripes per thread. Never raises for a bad output."""
    options = options or Fidelity()
    what = "no quantized weight is far from the source's"
    try:
        output = Formats(as_compressed_tensors(open_source(directory)))
        family = family_of(source.checkpoint.config, names=source.checkpoint.tensors)
        pairs = find_pairs(output, source, plan.quantized if plan else ())
        smoothed = SmoothedWeights(plan.smoothed, output, source) if plan is not None and plan.smoothed else None
        differing = [
            name
            for original, name in pairs.kept
            if not (
                smoothed.same(original, name)
                if smoothed is not None and plan is not None and plan.steps[original].action == "rescale"
                else _same(output, name, source, original)
            )
        ]
        # Weights that our own plans rescale are compared up to exact factors.
        rescaled = rescaled_blocks(output, source, family, pairs.quantized, differing) if plan is None else set()
        readers = compensated(output, source, family, differing) if rescaled else set[str]()
        counterparts = Counterparts(output, source, family, rescaled, smoothed)
        measured = measure_weights(pairs, counterparts, progress)
        steps = {} if plan is None else plan.steps
        # An expert of a stack that stays has no step of its own.
        scaled = sum(original in steps and steps[original].action == "rescale" for original, _ in pairs.kept)
        checks = [coverage_check(pairs), *kept_checks(pairs, differing, family, Explained(rescaled, readers, scaled))]
        checks += [] if smoothed is None else [smoothed.check()]
    except WorkflowError as problem:
        check = Check("fidelity.weights", "FAIL", what, str(problem), f"<= {options.worst_error}", HOW)
        return FidelityReport([check], _data({}, {}, str(source.checkpoint.directory)))
    places = {module: family.place(module) for module in measured}
    if measured:
        checks = weight_checks(measured, places, family, options) + checks
    elif not any(source.of(name).kind != "plain" for name, _ in pairs.kept):
        checks.insert(0, Check("fidelity.weights", "UNCHECKED", what, "nothing is quantized", "", HOW))
    return FidelityReport(checks, _data(measured, places, str(source.checkpoint.directory)))


def verify_with_forward(
    directory: Path, plan: Plan | None, source: Formats, options: Fidelity | None, text: Calibration | None,
    trust_remote_code: bool = False,
) -> FidelityReport:  # fmt: skip
    """`measure_fidelity`, `verify.fidelity.forward.verify_forward` over the blocks, and the check of input scales, as
    one report."""
    report = measure_fidelity(directory, plan, source, options)
    checks, blocks = verify_forward(directory, source.checkpoint, options or Fidelity(), text, trust_remote_code, plan)
    known = {entry["block"]: entry for entry in report.data.get("blocks", ())}
    for found in blocks:
        entry = known.setdefault(found.block, {"block": found.block, "relative_error": None})
        entry |= {"cosine": _rounded(found.cosine), "cosine_propagated": _rounded(found.propagated),
                  "tokens": found.tokens}  # fmt: skip
    if blocks:
        seen = [found for block in blocks for found in block.inputs]
        family, headroom = (
            family_of(source.checkpoint.config, names=source.checkpoint.tensors),
            text.input_headroom if text else 1.0,
        )
        checks += input_scale_check(seen, family, options or Fidelity(), checks[0].how, headroom)
        checks += saturation_check((found for block in blocks for found in block.unseen), family)
    data = report.data | {"blocks": [known[block] for block in sorted(known)]}
    if blocks:
        data["source"] += f"; blocks: {checks[0].how}"
    return FidelityReport(report.checks + checks, data)


def find_pairs(output: Formats, source: Formats, planned: Collection[str]) -> Pairs:
    """Pairs tensors of equal names, from headers; `planned` names modules that must be quantized."""
    quantized, kept, problems = [], [], []
    tied = bool(source.checkpoint.config.get("tie_word_embeddings"))
    originals = {logical_name(name): name for name in source.checkpoint.tensors if name not in source.companions}
    found = set()
    for name in output.checkpoint.tensors:
        if name in output.companions:
            continue
        original = originals.get(logical_name(name))
        found.add(logical_name(name))
        if original is None:
            if not (tied and name.startswith("lm_head.")):
                problems.append(f"{name}: the source has no such tensor")
            continue
        before, after = source.of(original), output.of(name)
        if before.shape != after.shape:
            problems.append(f"{name}: {list(after.shape)}, the source has {list(before.shape)}")
        elif after.kind == "plain" or (after.kind, after.tile) == (before.kind, before.tile):
            kept.append((original, name))
        else:
            quantized.append((module_of(name), original, name))
    for logical, original in originals.items():
        if (
            logical not in found
            and not original.endswith("inv_freq")
            and not (tied and original.startswith("lm_head."))
        ):
            problems.append(f"{original}: missing in the output")
    missing = set(planned) - {module for module, _, _ in quantized}
    problems += [f"{module}: planned to be quantized, is not" for module in sorted(missing)]
    return Pairs(quantized, kept, problems)


@dataclass(frozen=True)
class Counterparts:
    """What each weight of the output is compared with: the source's, in `rescaled` blocks up to factors per row and column,
    in `smoothed` layers with their factors."""

    output: Formats
    source: Formats
    family: Family
    rescaled: Collection[int] = ()
    smoothed: SmoothedWeights | None = None

    def measure(self, pair: tuple[str, str, str]) -> Measured:
        """The figures of one pair of `Pairs.quantized`."""
        module, original, name = pair
        stored = Stored(self.output, name)
        if self.smoothed is not None and module in self.smoothed:
            self.smoothed.compare_columns(module, stored)
            return measure(self.smoothed.expected(module), stored)
        if self.family.place(module).block in self.rescaled:
            return measure(Rescaled(self.source, original, stored), stored)
        return measure(Stored(self.source, original), stored)


def measure_weights(pairs: Pairs, counterparts: Counterparts, progress: _Progress | None = None) -> dict[str, Measured]:
    """Module -> figures of its quantized weight, computed with a thread per processor. Raises SourceError for unreadable
    files."""
    measured: dict[str, Measured] = {}
    threads = torch.get_num_threads()
    # Stripes are small: one thread per weight is faster than torch's own threads, which would wait for each other.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, (pair, figures) in enumerate(
                zip(pairs.quantized, pool.map(counterparts.measure, pairs.quantized), strict=True), 1
            ):
                measured[pair[0]] = figures
                if progress is not None:
                    progress(done, len(pairs.quantized))
    finally:
        torch.set_num_threads(threads)
    return measured


def _same(output: Formats, name: str, source: Formats, original: str) -> bool:
    """Whether codes and scales (whatever their dtype) are equal; a cast must equal the source's value in its own
    dtype."""
    stored, before = output.checkpoint.read(name), source.of(original)
    if before.kind != "plain" and output.of(name).kind == "plain":
        return torch.equal(source.read(original, stored.dtype), stored)
    scales = output.of(name).companions
    return _equal(source.checkpoint.read(original), stored) and all(
        _equal_scales(source.checkpoint.read(scale), output.checkpoint.read(scales[role]))
        for role, scale in before.companions.items()
    )


def _equal_scales(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Scales of equal dtype are not expanded: those of an Engram table of DeepSeek-V4.1 take 3 GB, in float32 12 GB.
    return (
        _equal(one, other) if one.dtype == other.dtype else torch.equal(one.to(torch.float32), other.to(torch.float32))
    )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    if one.element_size() == 1:  # torch cannot compare FP8
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)


def _data(measured: dict[str, Measured], places: dict[str, Place], source: str) -> dict[str, Any]:
    rows = []
    counts: dict[str, torch.Tensor] = {}
    for module, m in measured.items():
        place = places[module]
        rows.append([module, place.part, place.block, place.expert, module.rpartition(".")[2],
                     *(_rounded(v) for v in (m.relative_error, m.sqnr_db, m.cosine, m.saturated, m.zero_groups))])  # fmt: skip
        if m.scale_codes is not None:
            counts[place.part] = counts.get(place.part, 0) + m.scale_codes
    errors = block_errors(measured, places)
    blocks = [
        {"block": block, "cosine": None, "cosine_propagated": None, "relative_error": _rounded(error), "tokens": None}
        for block, error in sorted((b, e) for b, e in errors.items() if b is not None)
    ]
    edges = list(range(-9, 10))
    # Each power of two has eight E4M3 codes; below 2^-6 they are subnormal.
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    powers = torch.floor(torch.log2(values[1:127])).long() + 9
    histogram = {
        part: torch.zeros(18, dtype=torch.long).index_add_(0, powers, codes[1:127].long()).tolist()
        for part, codes in counts.items()
    }
    return {
        "columns": list(COLUMNS),
        "rows": rows,
        "blocks": blocks,
        "group_scales": {"edges_log2": edges, "counts": histogram},
        "source": f"every quantized weight dequantized and compared with {source}",
    }


def _rounded(value: float) -> float | None:
    """Four significant digits; JSON has no NaN and no infinity."""
    return float(f"{value:.4g}") if abs(value) < float("inf") else None
