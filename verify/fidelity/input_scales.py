"""Compares input global scales with the inputs of the source's own forward."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from calibration.families.family import Family
from recipes.checks import Fidelity
from verify.checks import Check, unchecked, verdict
from verify.fidelity.forward import InputSeen

#: Above these a scale is wider than calibration makes it, although no precision is lost yet: WARN. Calibrated scales
#: admit 0.7 to 1.5 times the inputs from other text (16 x 128 and 4 x 64 tokens, four families), somewhat more with
#: heavier tails.
_WIDE, _WIDE_MEDIAN = 32.0, 3.0
#: Share of the values of one module beyond what its scale admits: see docs/measurements.md for what calibration leaves.
_SATURATED = 1e-3
_ID = "fidelity.input_scales"
_WHAT = "input global scales fit the inputs that the source's forward has"


def input_scale_check(
    inputs: Iterable[InputSeen], family: Family, options: Fidelity, how: str, headroom: float = 1.0
) -> list[Check]:
    """One check; none if no input global scale is stored. Modules of a block that share a scale and have inputs of one
    kind are judged by the largest of these inputs, because experts share the extremes of all. FAIL if inputs exceed
    `max_input_overflow` times what the scale admits (they saturate) or are below 1 / `max_input_headroom` of it (group
    scales lose precision). WARN if all scales are one constant, which `method: convert` writes on purpose. Scales
    calibrated with a `headroom` are wider by this factor on purpose."""
    watched = list(inputs)
    groups = _sharing(watched, family)
    if not watched:
        return []
    room = {
        group[0].module: group[0].admitted / max(seen.seen for seen in group)
        for group in groups
        if any(seen.seen for seen in group)
    }
    idle = sum(not seen.tokens for seen in watched)
    missed = f"; {idle} of {len(watched)} modules saw no token" if idle else ""
    if not room:
        return [unchecked(_ID, _WHAT, f"no module saw a token{missed}")]
    constant = len({seen.admitted for seen in watched}) == 1 < len(groups)
    problems = [
        f"{module}: inputs are {1 / ratio:.3g} times what its scale admits: they saturate"
        for module, ratio in room.items()
        if ratio * options.max_input_overflow < 1
    ]
    wide = {module: ratio for module, ratio in room.items() if ratio > options.max_input_headroom * headroom}
    problems += [
        f"{module}: its scale admits {ratio:.3g} times its inputs: small ones are lost"
        for module, ratio in wide.items()
        if not constant
    ]
    middle = statistics.median(room.values())
    spread = f"admitted by seen {min(room.values()):.3g} to {max(room.values()):.3g}, median {middle:.3g}, of {len(room)} scales"
    doubts = []
    if constant:
        doubts.append(f"one constant for all {len(watched)} modules, not calibrated: {spread}")
    elif middle > _WIDE_MEDIAN * headroom:
        doubts.append(f"all scales are wide: {spread}")
    elif max(room.values()) > _WIDE * headroom:
        module = max(room, key=room.__getitem__)
        doubts.append(f"{module}: its scale admits {room[module]:.3g} times its inputs; {spread}")
    found = verdict(_ID, _WHAT, problems, doubts, how, spread)
    limits = f"1/{options.max_input_overflow:g} to {options.max_input_headroom:g}"
    return [Check(_ID, found.verdict, _WHAT, found.figure + missed, limits, how)]


def saturation_check(unseen: Iterable[InputSeen], family: Family) -> list[Check]:
    """One check of the inputs that text unknown to calibration gives, none if no input global scale is stored: the share of
    values larger than the scale admits, which the kernels cut off, over the modules that share a scale in a block. WARN above
    `_SATURATED` of them."""
    id, what = "fidelity.saturated_inputs", "text that calibration did not see does not saturate the inputs"
    watched = list(unseen)
    if not watched:
        return []
    shares = {group[0].module: _share(group) for group in _sharing(watched, family) if any(s.values for s in group)}
    if not shares:
        return [unchecked(id, what, "no module saw a token")]
    worst, largest = max(shares.items(), key=lambda item: item[1])
    saturated, values = sum(share > 0 for share in shares.values()), sum(seen.values for seen in watched)
    figure = f"{_share(watched):.1e} of {values:,} values, under {saturated} of {len(shares)} scales"
    if largest:
        times = max(seen.seen / seen.admitted for seen in watched)
        figure += f"; most at {worst}: {largest:.1e}; the largest is {times:.3g} times what its scale admits"
    doubts = []
    if largest > _SATURATED:
        doubts = [f"{figure}; more samples, or calibration.input_headroom: 2, leave room"]
    how = f"the help text of Python, {max(seen.tokens for seen in watched)} tokens; BF16 blocks of the source"
    found = verdict(id, what, [], doubts, how, figure)
    return [Check(id, found.verdict, what, found.figure, f"<= {_SATURATED:g} under each scale", how)]


def _sharing(watched: Iterable[InputSeen], family: Family) -> list[list[InputSeen]]:
    """The modules of a block that share a scale and see inputs of one kind."""
    groups: dict[tuple[int | None, str, object, float], list[InputSeen]] = defaultdict(list)
    for seen in watched:
        place, leaf = family.place(f"{seen.module}.weight"), seen.module.rpartition(".")[2]
        kind = next((fused for fused in family.fused_leaves if leaf in fused), leaf)
        groups[(place.block, place.part, kind, seen.admitted)].append(seen)
    return list(groups.values())


def _share(group: Iterable[InputSeen]) -> float:
    group = list(group)
    return sum(seen.beyond for seen in group) / max(1, sum(seen.values for seen in group))
