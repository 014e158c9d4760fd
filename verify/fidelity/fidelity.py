"""Fidelity: every weight of the output against the source's, streaming, and what the quantized blocks make of text.

Needs no plan: output and source spell modules alike, so that it works on any compressed-tensors NVFP4 checkpoint.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.checkpoint.formats import Formats, logical_name, module_of
from calibration.checkpoint.index import Checkpoint
from calibration.families.family import Family, Place
from calibration.families.registry import family_of
from calibration.plan.plan import Plan
from recipes.errors import WorkflowError
from recipes.schema import Calibration, Fidelity
from verify.checks import Check, Verdict
from verify.fidelity.forward import verify_forward
from verify.fidelity.input_scales import input_scale_check
from verify.fidelity.rescaled import Rescaled, rescaled_blocks
from verify.fidelity.weights import Measured, Stored, measure, scale_ratio

COLUMNS = ("module", "part", "block", "expert", "projection", "relative_error", "sqnr_db", "cosine", "saturated",
           "zero_groups")  # fmt: skip
#: A global scale may be off the source's largest magnitude by these factors: an MSE observer clips up to a fifth of the
#: range, and the power of two of a lossless MXFP4 scale lies up to 12 x below 2688 / amax.
_SCALE_RATIOS = (1 / 16, 1.5)
#: An outlier is this many robust standard deviations above the median of its peers, and this many times the median.
_DEVIATIONS, _TIMES = 10.0, 1.5
#: Spread of the peers that is taken for granted, as a share of their median: equal peers have none of their own.
_SPREAD = 0.02
_Progress = Callable[[int, int], None]
_HOW = "output and source dequantized, one weight at a time"


@dataclass(frozen=True)
class FidelityReport:
    """`checks`, and `data` as it stands in fidelity.json: `columns`, `rows` (one per quantized module), `blocks`,
    `group_scales` (per part, how many E4M3 group scales lie in each power of two) and `source` (how obtained)."""

    checks: list[Check]
    data: dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """What to compare: `quantized` (module, source tensor, output tensor), `kept` (source tensor, output tensor) that
    must be equal in value, and `problems`: tensors that have no counterpart."""

    quantized: list[tuple[str, str, str]]
    kept: list[tuple[str, str]]
    problems: list[str]


def verify_fidelity(
    directory: Path, plan: Plan | None, source: Formats, options: Fidelity | None = None
) -> list[Check]:
    """The checks of `measure_fidelity` alone."""
    return measure_fidelity(directory, plan, source, options).checks


def measure_fidelity(
    directory: Path,
    plan: Plan | None,
    source: Formats,
    options: Fidelity | None = None,
    progress: _Progress | None = None,
) -> FidelityReport:
    """Compares every weight of the checkpoint in `directory` with `source` against the thresholds of `options`. `plan`,
    where there is one, says what had to be quantized. `progress(done, total)` counts weights. Memory: a few stripes per
    thread. Never raises for a bad output."""
    options = options or Fidelity()
    what = "no quantized weight is far from the source's"
    try:
        output = Formats(Checkpoint.open(directory))
        family = family_of(source.checkpoint.config)
        pairs = find_pairs(output, source, plan.quantized if plan else ())
        differing = [name for original, name in pairs.kept if not _same(output, name, source, original)]
        # A plan of ours rescales nothing.
        rescaled = rescaled_blocks(output, source, family, pairs.quantized, differing) if plan is None else set()
        measured = measure_weights(output, source, pairs, family, rescaled, progress)
        checks = [_coverage(pairs), *_kept(pairs, differing, family, rescaled)]
    except WorkflowError as problem:
        check = Check("fidelity.weights", "FAIL", what, str(problem), f"<= {options.worst_error}", _HOW)
        return FidelityReport([check], _data({}, {}, str(source.checkpoint.directory)))
    places = {module: family.place(module) for module in measured}
    if measured:
        checks = weight_checks(measured, places, family, options) + checks
    elif not any(source.of(name).kind != "plain" for name, _ in pairs.kept):
        checks.insert(0, Check("fidelity.weights", "UNCHECKED", what, "nothing is quantized", "", _HOW))
    return FidelityReport(checks, _data(measured, places, str(source.checkpoint.directory)))


def verify_with_forward(
    directory: Path, plan: Plan | None, source: Formats, options: Fidelity | None, text: Calibration | None,
    trust_remote_code: bool = False,
) -> FidelityReport:  # fmt: skip
    """`measure_fidelity` and, over the blocks, `verify.fidelity.forward.verify_forward` and what it saw of the inputs, as one
    report."""
    report = measure_fidelity(directory, plan, source, options)
    checks, blocks = verify_forward(directory, source.checkpoint, options or Fidelity(), text, trust_remote_code)
    known = {entry["block"]: entry for entry in report.data.get("blocks", ())}
    for found in blocks:
        entry = known.setdefault(found.block, {"block": found.block, "relative_error": None})
        entry |= {"cosine": _rounded(found.cosine), "cosine_propagated": _rounded(found.propagated),
                  "tokens": found.tokens}  # fmt: skip
    if blocks:
        seen = [found for block in blocks for found in block.inputs]
        checks += input_scale_check(seen, family_of(source.checkpoint.config), options or Fidelity(), checks[0].how)
    data = report.data | {"blocks": [known[block] for block in sorted(known)]}
    if blocks:
        data["source"] += f"; blocks: {checks[0].how}"
    return FidelityReport(report.checks + checks, data)


def find_pairs(output: Formats, source: Formats, planned: Collection[str]) -> Pairs:
    """Pairs of equal names, from headers alone; `planned` names modules that must be quantized."""
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


def measure_weights(
    output: Formats, source: Formats, pairs: Pairs, family: Family, rescaled: Collection[int] = (),
    progress: _Progress | None = None,
) -> dict[str, Measured]:  # fmt: skip
    """Module -> figures of every quantized weight, a thread per processor; those in `rescaled` blocks up to factors per
    row and column. Raises SourceError for unreadable files."""

    def one(pair: tuple[str, str, str]) -> Measured:
        stored = Stored(output, pair[2])
        if family.place(pair[0]).block in rescaled:
            return measure(Rescaled(source, pair[1], stored), stored)
        return measure(Stored(source, pair[1]), stored)

    measured: dict[str, Measured] = {}
    threads = torch.get_num_threads()
    # Stripes are small: a thread per weight gains where torch's own threads would wait for each other.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, (pair, figures) in enumerate(
                zip(pairs.quantized, pool.map(one, pairs.quantized), strict=True), 1
            ):
                measured[pair[0]] = figures
                if progress is not None:
                    progress(done, len(pairs.quantized))
    finally:
        torch.set_num_threads(threads)
    return measured


def weight_checks(
    measured: dict[str, Measured], places: dict[str, Place], family: Family, options: Fidelity
) -> list[Check]:
    """The checks of quantized weights, each on its worst module."""
    nvfp4 = {module: m for module, m in measured.items() if m.global_scale is not None}
    fp8 = {module: m for module, m in measured.items() if m.global_scale is None}
    checks = []
    for id, some, limit in (("weights", nvfp4, options.worst_error), ("fp8_weights", fp8, options.worst_error_fp8)):
        if some:
            checks.append(_worst(id, "no quantized weight is far from the source's", some, lambda m: m.relative_error,
                                 at_most=limit))  # fmt: skip
    checks += [
        _worst("cosine", "every quantized weight points where the source's does", measured, lambda m: m.cosine,
               at_least=options.min_cosine),
        _block_sqnr(measured, places, options.min_sqnr),
        _worst("saturation", "few codes at the largest magnitude", measured, lambda m: m.saturated,
               at_most=options.max_saturated, percent=True),
        _worst("zero_groups", "few groups became zero that are not zero in the source", measured,
               lambda m: m.lost_groups, at_most=options.max_zero_groups, percent=True),
        _worst("group_scales", "no group is scaled up or down against the source", measured, _group_gain,
               at_most=options.max_group_gain),
    ]  # fmt: skip
    if nvfp4:
        checks.append(_global_scales(nvfp4, family))
        checks += _rounding(nvfp4)
    return [*checks, _outliers(measured, places)]


def _group_gain(m: Measured) -> float:
    """By values where codes are the nearest to the source's, else by scales: error feedback (GPTQ) takes its scales from
    the source's weights too, but may move the values of a group anywhere."""
    low, high = (m.scale_low, m.scale_high) if m.off_nearest else (m.gain_low, m.gain_high)
    return max(high, 1 / low if low > 0 else float("inf"))


def _worst(
    id: str, what: str, measured: dict[str, Measured], figure: Callable[[Measured], float], *,
    at_most: float | None = None, at_least: float | None = None, percent: bool = False,
) -> Check:  # fmt: skip
    values = {module: figure(m) for module, m in measured.items()}
    sign, limit, relation = (1, at_most, "<=") if at_most is not None else (-1, at_least, ">=")
    assert limit is not None
    # NaN is the worst of all, and no comparison with it is true.
    worst = max(values, key=lambda module: (values[module] != values[module], sign * values[module]))
    verdict: Verdict = "PASS" if sign * values[worst] <= sign * limit else "FAIL"

    def spell(value: float) -> str:
        return f"{value:.2%}" if percent else f"{value:.4f}"

    bad = sum(not sign * value <= sign * limit for value in values.values())
    more = f", {bad} beyond the threshold" if bad > 1 else ""
    text = (
        f"worst {spell(values[worst])} ({worst}), median {spell(statistics.median(values.values()))} of {len(values)}"
    )
    return Check(f"fidelity.{id}", verdict, what, text + more, f"{relation} {spell(limit)}", _HOW)


def _block_sqnr(measured: dict[str, Measured], places: dict[str, Place], limit: float) -> Check:
    errors = block_errors(measured, places)
    sqnr = {block: -20 * torch.log10(torch.tensor(max(error, 1e-30))).item() for block, error in errors.items()}
    worst = min(sqnr, key=lambda block: (sqnr[block] == sqnr[block], sqnr[block]))
    where = "outside the blocks" if worst is None else f"block {worst}"
    verdict: Verdict = "PASS" if sqnr[worst] >= limit else "FAIL"
    return Check("fidelity.sqnr", verdict, "signal to quantization noise of each block's weights together",
                 f"worst {sqnr[worst]:.1f} dB ({where}), median {statistics.median(sqnr.values()):.1f} dB",
                 f">= {limit:g} dB", _HOW)  # fmt: skip


def block_errors(measured: dict[str, Measured], places: dict[str, Place]) -> dict[int | None, float]:
    """Block -> relative error of all its quantized weights together."""
    sums: dict[int | None, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for module, m in measured.items():
        pair = sums[places[module].block]
        pair[0] += (m.relative_error * m.source_norm) ** 2
        pair[1] += m.source_norm**2
    return {block: (error / max(norm, 1e-300)) ** 0.5 for block, (error, norm) in sums.items()}


def _global_scales(measured: dict[str, Measured], family: Family) -> Check:
    fused = {module: group for group in family.fused(measured) for module in group}
    ratios = {}
    for module, m in measured.items():
        amax = max(measured[other].amax for other in fused.get(module, (module,)))
        assert m.global_scale is not None
        if amax:  # any scale will do for a weight of zeros
            ratios[module] = scale_ratio(m.global_scale, amax)
    low, high = _SCALE_RATIOS
    bad = [f"{module} {ratio:.4g}" for module, ratio in ratios.items() if not low <= ratio <= high]
    spread = f"{min(ratios.values()):.3f} to {max(ratios.values()):.3f}" if ratios else "every weight is zero"
    figure = _some(bad) if bad else spread
    return Check("fidelity.global_scales", "FAIL" if bad else "PASS",
                 "weight global scales are 2688 / amax of the source's fused weights", figure,
                 f"global scale * amax / 2688 in {low:g} to {high:g}", _HOW)  # fmt: skip


def _rounding(measured: dict[str, Measured]) -> list[Check]:
    """No check where most modules are off by design: error feedback (GPTQ) rounds elsewhere than to the nearest."""
    shares = {module: m.off_nearest or 0.0 for module, m in measured.items()}
    if statistics.median(shares.values()) > 0:
        return []
    bad = [f"{module} {share:.2g}" for module, share in shares.items() if share > 0]
    return [Check("fidelity.rounding", "FAIL" if bad else "PASS",
                  "round to nearest: each code is the nearest to the source's value under its scales",
                  f"share of other codes: {_some(bad)}" if bad else f"all codes of {len(shares)} weights",
                  "no other code (ties of BF16 excepted)", _HOW)]  # fmt: skip


def _outliers(measured: dict[str, Measured], places: dict[str, Place]) -> Check:
    # By part too: routed experts of an MXFP4 source lose less than the FP8 shared experts beside them.
    peers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in measured:
        peers[places[module].part, module.rpartition(".")[2]].append(module)
    ranked = []
    for group in peers.values():
        for figure in ("relative_error", "group_error"):
            values: dict[str, float] = {module: getattr(measured[module], figure) for module in group}
            if figure == "group_error" and statistics.median(measured[m].off_nearest or 0.0 for m in group) > 0:
                continue  # error feedback moves single groups as it likes
            middle = statistics.median(values.values())
            deviation = 1.4826 * statistics.median(abs(v - middle) for v in values.values()) + _SPREAD * middle
            for module, value in values.items():
                if value > _TIMES * middle and value - middle > _DEVIATIONS * deviation:
                    ranked.append((value / max(middle, 1e-30), f"{module} {figure} {value:.4f} (median {middle:.4f})"))
    ranked.sort(reverse=True)
    return Check("fidelity.outliers", "WARN" if ranked else "PASS", "no module is far worse than its peers",
                 _some([text for _, text in ranked]) if ranked else "none",
                 f"<= {_DEVIATIONS:g} robust deviations above the median of the same part and projection",
                 _HOW)  # fmt: skip


def _coverage(pairs: Pairs) -> Check:
    count = len(pairs.quantized) + len(pairs.kept)
    return Check("fidelity.coverage", "FAIL" if pairs.problems else "PASS",
                 "output and source hold the same weights, by name and logical shape",
                 _some(pairs.problems) if pairs.problems else f"{count} tensors", "no difference",
                 "headers of both")  # fmt: skip


def _kept(pairs: Pairs, differing: list[str], family: Family, rescaled: Collection[int]) -> list[Check]:
    norms = [name for name in differing if family.place(name).part == "norm" and family.place(name).block in rescaled]
    bad = [name for name in differing if name not in norms]
    check = Check("fidelity.kept", "FAIL" if bad else "PASS",
                  "what is not quantized has the source's values: copies, casts, kept FP8",
                  _some(bad) if bad else f"{len(pairs.kept) - len(differing)} tensors equal", "no difference",
                  "values compared")  # fmt: skip
    if not norms:
        return [check]
    figure = f"{len(norms)} norms changed, in {len(rescaled)} blocks; weights there are compared up to the factors"
    what = "norms and weights share factors per row and column (AWQ, SmoothQuant): see block_cosine"
    return [check, Check("fidelity.rescaled", "WARN", what, figure, "none", "factors by least squares")]


def _same(output: Formats, name: str, source: Formats, original: str) -> bool:
    """Equal codes and, whatever their dtype, equal scales; a cast equals the source's value in its dtype."""
    stored, before = output.checkpoint.read(name), source.of(original)
    if before.kind != "plain" and output.of(name).kind == "plain":
        return torch.equal(source.read(original, stored.dtype), stored)
    scales = output.of(name).companions
    return _equal(source.checkpoint.read(original), stored) and all(
        torch.equal(*(f.checkpoint.read(n).to(torch.float32) for f, n in ((source, scale), (output, scales[role]))))
        for role, scale in before.companions.items()
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
    # A power of two of E4M3 group scales is eight codes; below 2^-6 they are subnormal.
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


def _some(problems: Iterable[str], most: int = 5) -> str:
    listed = list(problems)
    return "; ".join(listed[:most]) + (f"; and {len(listed) - most} more" if len(listed) > most else "")
