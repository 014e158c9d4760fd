"""Predicts the stage `budget`: what measuring the candidates of a size budget takes (calibration.engine.sensitivity)."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from calibration.engine.sensitivity import SAVE_SECONDS
from calibration.families.registry import language_config
from calibration.forecast.cost import BF16, BlockCost, block_costs, hidden_width
from calibration.forecast.predict import figures, forward, held_memory, writing
from calibration.forecast.speed import Machine, Spent
from calibration.plan.budget import BudgetTask, Unit
from recipes.budget import UNQUANTIZED

#: CPU seconds per module with a weight until the empty model is there. Measured on the headers of V4-Pro: 5.7 s for 70,455.
_SKELETON = 0.00008
#: Bytes for each value of a layer while its weight is rounded: it in float32, its absolute values, codes and both again.
_ROUNDING = 16
#: Products that oneDNN keeps compiled on a CPU, one for each shape and number of rows, and bytes of each. Measured: 216 MB on 4
#: blocks of 32 experts, 109 of them less with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0.
_COMPILED, _COMPILED_BYTES = 1024, 200_000
#: Bytes for each logit of a sample: BF16, float32, two log probabilities and the divergence's temporaries.
_LOGIT = 22


def predict_measuring(budget: BudgetTask, machine: Machine) -> dict[str, Any]:
    """The figures of the stage, as those of `predict.predict`: every block is run once exactly, once for each unit before it,
    and once for each of its candidates; the head is run for each unit. Samples are assumed to have their largest length."""
    samples, length = budget.text
    tokens, config = samples * length, budget.formats.checkpoint.config
    width, hidden = hidden_width(config), int(language_config(config).get("hidden_size") or 0)
    vocabulary = int(language_config(config).get("vocab_size") or 0)
    terms = dict.fromkeys(("start", "load", "forward", "round", "predictions"), Spent())
    units: dict[int, list[Unit]] = defaultdict(list)
    for unit in budget.units:
        units[unit.block].append(unit)
    carried, read, costs = 0, 0, block_costs(budget.plan, budget.formats, 0.0)
    saved, since, stream = 0, 0.0, tokens * width * BF16
    for cost in costs:
        before = math.fsum(spent.clock for spent in terms.values())
        times = 2 if cost.number is None else 1  # before the blocks and after them
        read += times * cost.source_bytes
        for kind, nbytes in cost.reads.items():
            terms["load"] += machine.load(kind) * (nbytes * times)
        if cost.number is None:
            continue
        own = units[cost.number]
        tried = [(unit, name) for unit in own for name in unit.sizes if name != UNQUANTIZED]
        once = forward(machine, cost, tokens, width) + machine.attention(*cost.attention, length) * samples
        terms["forward"] += once * (1 + carried + len(tried))
        for unit, name in tried:
            terms["round"] += machine.rounding(name) * _rounded(budget, unit, cost, tokens)
        carried += sum(unit.smallest != UNQUANTIZED for unit in own)
        since += math.fsum(spent.clock for spent in terms.values()) - before
        if since >= SAVE_SECONDS:
            saved, since = saved + (1 + carried) * stream, 0.0
    modules = sum(sum(cost.products.values()) for cost in costs)
    terms["start"] = Spent(_SKELETON, _SKELETON) * modules
    streams = (1 + carried) * stream
    terms["predictions"] = machine.predictions(vocabulary, hidden, length) * (samples * (1 + carried))
    # Once at the head, if not behind the last block.
    if since > 0 and since + terms["predictions"].clock >= SAVE_SECONDS:
        saved += streams
    terms["save"] = writing(machine) * saved
    block = max((cost.values * BF16 for cost in costs if cost.number is not None), default=0)
    layer = max((math.prod(budget.formats.of(step.source).shape) for step in budget.plan.quantized.values()), default=0)
    outside = sum(cost.values * BF16 for cost in costs if cost.number is None)
    heads = max((cost.attention[0] for cost in costs), default=0)
    inside = block + max(layer * _ROUNDING, heads * samples * length**2 * 10)
    # The experts' numbers of tokens differ from trial to trial.
    routed = sum(n for cost in costs for product, n in cost.products.items() if product.use == "expert down")
    compiled = min(_COMPILED, 2 * routed * (1 + len(units[0]))) if machine.device.type == "cpu" else 0
    peak = held_memory() + compiled * _COMPILED_BYTES + streams + max(inside, outside + length * vocabulary * _LOGIT)
    return figures(terms, read, saved, peak) | {"state_bytes": streams}


def _rounded(budget: BudgetTask, unit: Unit, cost: BlockCost, tokens: int) -> float:
    """Values that one trial of a unit rounds: its weights, and the inputs of each of its modules."""
    shapes = [budget.formats.of(budget.plan.quantized[module].source).shape for module in unit.modules]
    shares = {(product.rows, product.columns): product.share for product in cost.products if product.use != "layer"}
    routed = len(unit.modules) > 3
    return sum(rows * k + tokens * k * (shares.get((rows, k), 1.0) if routed else 1.0) for rows, k in shapes)
