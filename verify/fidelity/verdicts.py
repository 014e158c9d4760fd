"""Turns the figures of all weights into checks, each judging the worst module or block."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch

from calibration.families.family import Family, Place
from recipes.checks import Fidelity
from verify.checks import Check, Verdict
from verify.fidelity.weights import Measured, scale_ratio

#: A global scale may deviate from 2688 / amax of the source by these factors: an MSE observer clips up to a fifth of
#: the range, and the power of two of a lossless MXFP4 scale is up to 12 x smaller.
_SCALE_RATIOS = (1 / 16, 1.5)
#: An outlier is this many robust standard deviations above the median of its peers, and this many times the median.
_DEVIATIONS, _TIMES = 10.0, 1.5
#: Minimum spread of the peers, as a fraction of their median: equal peers would have none.
_SPREAD = 0.02

HOW = "output and source dequantized, one weight at a time"


@dataclass(frozen=True)
class Pairs:
    """The tensors to compare: `quantized` (module, source tensor, output tensor), `kept` (source tensor, output tensor)
    that must have equal values, and `problems`: tensors without a counterpart."""

    quantized: list[tuple[str, str, str]]
    kept: list[tuple[str, str]]
    problems: list[str]


@dataclass(frozen=True)
class Explained:
    """What of the unquantized tensors may differ: without a plan the norms of `blocks`, and `readers`, weights with a norm's
    inverse factors; `scaled` of those that count as equal have the exact factors of the plan's smoothing."""

    blocks: Collection[int] = ()
    readers: Collection[str] = ()
    scaled: int = 0


@dataclass(frozen=True)
class _Limit:
    """The worst passing figure: the largest, or the smallest if `at_least`; `percent` says how it is shown."""

    value: float
    at_least: bool = False
    percent: bool = False


def weight_checks(
    measured: dict[str, Measured], places: dict[str, Place], family: Family, options: Fidelity
) -> list[Check]:
    """The checks of quantized weights, each judging its worst module."""
    nvfp4 = {module: m for module, m in measured.items() if m.global_scale is not None}
    fp8 = {module: m for module, m in measured.items() if m.global_scale is None}
    checks = []
    for id, some, limit in (("weights", nvfp4, options.worst_error), ("fp8_weights", fp8, options.worst_error_fp8)):
        if some:
            checks.append(_worst(id, "no quantized weight is far from the source's", some, lambda m: m.relative_error,
                                 _Limit(limit)))  # fmt: skip
    checks += [
        _worst("cosine", "every quantized weight points where the source's does", measured, lambda m: m.cosine,
               _Limit(options.min_cosine, at_least=True)),
        _block_sqnr(measured, places, options.min_sqnr),
        _worst("saturation", "few codes at the largest magnitude", measured, lambda m: m.saturated,
               _Limit(options.max_saturated, percent=True)),
        _worst("zero_groups", "few groups became zero that are not zero in the source", measured,
               lambda m: m.lost_groups, _Limit(options.max_zero_groups, percent=True)),
        _worst("group_scales", "no group is scaled up or down against the source", measured, _group_gain,
               _Limit(options.max_group_gain)),
    ]  # fmt: skip
    if nvfp4:
        checks.append(_global_scales(nvfp4, family))
        checks += _rounding(nvfp4)
    return [*checks, _outliers(measured, places)]


def _group_gain(m: Measured) -> float:
    """Computed from values if codes are the nearest to the source's, else from scales: error feedback (GPTQ) also takes
    its scales from the source's weights, but may move the values of a group anywhere."""
    low, high = (m.scale_low, m.scale_high) if m.off_nearest else (m.gain_low, m.gain_high)
    return max(high, 1 / low if low > 0 else float("inf"))


def _worst(
    id: str, what: str, measured: dict[str, Measured], figure: Callable[[Measured], float], limit: _Limit
) -> Check:
    values = {module: figure(m) for module, m in measured.items()}
    sign, relation = (-1, ">=") if limit.at_least else (1, "<=")
    # NaN is the worst, and every comparison with it is false.
    worst = max(values, key=lambda module: (values[module] != values[module], sign * values[module]))
    verdict: Verdict = "PASS" if sign * values[worst] <= sign * limit.value else "FAIL"

    def spell(value: float) -> str:
        return f"{value:.2%}" if limit.percent else f"{value:.4f}"

    bad = sum(not sign * value <= sign * limit.value for value in values.values())
    more = f", {bad} beyond the threshold" if bad > 1 else ""
    text = (
        f"worst {spell(values[worst])} ({worst}), median {spell(statistics.median(values.values()))} of {len(values)}"
    )
    return Check(f"fidelity.{id}", verdict, what, text + more, f"{relation} {spell(limit.value)}", HOW)


def _block_sqnr(measured: dict[str, Measured], places: dict[str, Place], limit: float) -> Check:
    errors = block_errors(measured, places)
    sqnr = {block: -20 * torch.log10(torch.tensor(max(error, 1e-30))).item() for block, error in errors.items()}
    worst = min(sqnr, key=lambda block: (sqnr[block] == sqnr[block], sqnr[block]))
    where = "outside the blocks" if worst is None else f"block {worst}"
    verdict: Verdict = "PASS" if sqnr[worst] >= limit else "FAIL"
    return Check("fidelity.sqnr", verdict, "signal to quantization noise of each block's weights together",
                 f"worst {sqnr[worst]:.1f} dB ({where}), median {statistics.median(sqnr.values()):.1f} dB",
                 f">= {limit:g} dB", HOW)  # fmt: skip


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
        if amax:  # any scale is right for a weight of zeros
            ratios[module] = scale_ratio(m.global_scale, amax)
    low, high = _SCALE_RATIOS
    bad = [f"{module} {ratio:.4g}" for module, ratio in ratios.items() if not low <= ratio <= high]
    spread = f"{min(ratios.values()):.3f} to {max(ratios.values()):.3f}" if ratios else "every weight is zero"
    figure = _some(bad) if bad else spread
    return Check("fidelity.global_scales", "FAIL" if bad else "PASS",
                 "weight global scales are 2688 / amax of the source's fused weights", figure,
                 f"global scale * amax / 2688 in {low:g} to {high:g}", HOW)  # fmt: skip


def _rounding(measured: dict[str, Measured]) -> list[Check]:
    """No check if most modules deviate by design: error feedback (GPTQ) does not round to the nearest."""
    shares = {module: m.off_nearest or 0.0 for module, m in measured.items()}
    if statistics.median(shares.values()) > 0:
        return []
    bad = [f"{module} {share:.2g}" for module, share in shares.items() if share > 0]
    return [Check("fidelity.rounding", "FAIL" if bad else "PASS",
                  "round to nearest: each code is the nearest to the source's value under its scales",
                  f"share of other codes: {_some(bad)}" if bad else f"all codes of {len(shares)} weights",
                  "no other code (ties of BF16 excepted)", HOW)]  # fmt: skip


def _outliers(measured: dict[str, Measured], places: dict[str, Place]) -> Check:
    # Peers have the same part too: routed experts of an MXFP4 source lose less than FP8 shared experts.
    peers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in measured:
        peers[places[module].part, module.rpartition(".")[2]].append(module)
    ranked = []
    for group in peers.values():
        for figure in ("relative_error", "group_error"):
            values: dict[str, float] = {module: getattr(measured[module], figure) for module in group}
            if figure == "group_error" and statistics.median(measured[m].off_nearest or 0.0 for m in group) > 0:
                continue  # error feedback may change single groups arbitrarily
            middle = statistics.median(values.values())
            deviation = 1.4826 * statistics.median(abs(v - middle) for v in values.values()) + _SPREAD * middle
            for module, value in values.items():
                if value > _TIMES * middle and value - middle > _DEVIATIONS * deviation:
                    ranked.append((value / max(middle, 1e-30), f"{module} {figure} {value:.4f} (median {middle:.4f})"))
    ranked.sort(reverse=True)
    return Check("fidelity.outliers", "WARN" if ranked else "PASS", "no module is far worse than its peers",
                 _some([text for _, text in ranked]) if ranked else "none",
                 f"<= {_DEVIATIONS:g} robust deviations above the median of the same part and projection",
                 HOW)  # fmt: skip


def coverage_check(pairs: Pairs) -> Check:
    """The check that every tensor of output and source has its counterpart."""
    count = len(pairs.quantized) + len(pairs.kept)
    return Check("fidelity.coverage", "FAIL" if pairs.problems else "PASS",
                 "output and source hold the same weights, by name and logical shape",
                 _some(pairs.problems) if pairs.problems else f"{count} tensors", "no difference",
                 "headers of both")  # fmt: skip


def kept_checks(pairs: Pairs, differing: list[str], family: Family, explained: Explained) -> list[Check]:
    """The checks of unquantized tensors: their values are equal, except those that are `explained`."""
    places = {name: family.place(name) for name in differing}
    inside = [name for name, place in places.items() if place.block in explained.blocks]
    norms = [name for name in inside if places[name].part == "norm"]
    readers = [name for name in inside if name in explained.readers]
    bad = [name for name in differing if name not in {*norms, *readers}]
    factors = f", {explained.scaled} of them up to smoothing's factors" if explained.scaled else ""
    check = Check("fidelity.kept", "FAIL" if bad else "PASS",
                  "what is not quantized has the source's values: copies, casts, kept FP8",
                  _some(bad) if bad else f"{len(pairs.kept) - len(differing)} tensors equal{factors}", "no difference",
                  "values compared")  # fmt: skip
    if not norms:
        return [check]
    also = f" and {len(readers)} unquantized weights by the inverse" if readers else ""
    figure = f"{len(norms)} norms changed{also}, in {len(explained.blocks)} blocks; weights there are compared up to the factors"
    what = "norms and weights share factors per row and column (AWQ, SmoothQuant): see block_cosine"
    return [check, Check("fidelity.rescaled", "WARN", what, figure, "none", "factors by least squares")]


def _some(problems: Iterable[str], most: int = 5) -> str:
    listed = list(problems)
    return "; ".join(listed[:most]) + (f"; and {len(listed) - most} more" if len(listed) > most else "")
