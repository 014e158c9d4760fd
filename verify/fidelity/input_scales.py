"""Input global scales against the inputs that the forward of the source really has."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from calibration.families.family import Family
from recipes.schema import Fidelity
from verify.checks import Check, unchecked, verdict
from verify.fidelity.forward import InputSeen

#: Above these a scale is wider than calibration makes it, though nothing is lost yet: WARN. Calibrated scales admit 0.7 to
#: 1.5 times what comes with other text (16 x 128 and 4 x 64 tokens, four families), with heavier tails somewhat more.
_WIDE, _WIDE_MEDIAN = 32.0, 3.0
_ID = "fidelity.input_scales"
_WHAT = "input global scales fit the inputs that the source's forward has"


def input_scale_check(
    inputs: Iterable[InputSeen], family: Family, options: Fidelity, how: str, headroom: float = 1.0
) -> list[Check]:
    """One check, none where no input global scale is stored. Modules that share a scale in a block and see inputs of one
    kind are judged by the largest of these inputs: experts share the extremes of all. FAIL where inputs are more than
    `max_input_overflow` times what the scale admits (they saturate) or less than 1 / `max_input_headroom` of it (group
    scales lose precision), unless one constant stands everywhere, which `method: convert` writes on purpose: WARN. Scales
    that were calibrated with a `headroom` are wide by this factor on purpose."""
    watched = list(inputs)
    groups: dict[tuple[int | None, str, object, float], list[InputSeen]] = defaultdict(list)
    for seen in watched:
        place, leaf = family.place(f"{seen.module}.weight"), seen.module.rpartition(".")[2]
        kind = next((fused for fused in family.fused_leaves if leaf in fused), leaf)
        groups[(place.block, place.part, kind, seen.admitted)].append(seen)
    if not watched:
        return []
    room = {
        group[0].module: group[0].admitted / max(seen.seen for seen in group)
        for group in groups.values()
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
