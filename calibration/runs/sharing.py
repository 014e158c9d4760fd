"""Distributes modules among the ranks of a run, compares their settings, and reduces their statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from calibration.plan.plan import Plan
from calibration.runs.ranks import Ranks
from recipes.errors import EnvironmentProblem, RecipeError


def assign_owners(plan: Plan, size: int) -> dict[str, int]:
    """Quantized module of `plan` -> the rank that observes and packs it. Ranks get about the same number of bytes of
    every block; a fused group stays on one rank."""
    leader = {module: group[0] for group in plan.fused for module in group}
    loads: dict[int | None, list[int]] = {}
    owners: dict[str, int] = {}
    for module, step in plan.quantized.items():
        load = loads.setdefault(plan.family.place(step.source).block, [0] * size)
        owner = owners.setdefault(leader.get(module, module), load.index(min(load)))
        owners[module] = owner
        load[owner] += sum(output.nbytes for output in step.outputs)
    return {module: owners[module] for module in plan.quantized}


def require_batches(ranks: Ranks, batches: int) -> None:
    """Raises RecipeError if a rank would have no batch."""
    if batches < ranks.size:
        raise RecipeError(
            f"calibration: {batches} batches for {ranks.size} ranks; give torchrun at most --nproc-per-node {batches}, "
            "or raise calibration.num_samples, or lower calibration.batch_size"
        )


def require_equal(ranks: Ranks, what: str, facts: Mapping[str, Any]) -> None:
    """Raises EnvironmentProblem that names every key of `facts` that differs between the ranks."""
    first, *others = ranks.all_gather(what, dict(facts))
    lines = [
        f"  {key}: {first.get(key)} on rank 0, {facts.get(key)} on rank {rank}"
        for rank, facts in enumerate(others, start=1)
        for key in {**first, **facts}
        if first.get(key) != facts.get(key)
    ]
    if lines:
        raise EnvironmentProblem("the ranks would not calculate the same:\n" + "\n".join(lines))


def all_reduce_extremes(ranks: Ranks, observers: Sequence[Any]) -> None:
    """Sets every observer's extremes to those over all ranks; exact, whatever the order. `observers` are
    llm-compressor's with `min_vals` and `max_vals`, in the same order on every rank; one that saw nothing on a rank
    takes the others' extremes."""
    if ranks.size == 1:
        return
    own = [(tuple(o.min_vals.shape), o.min_vals.dtype) if o.has_statistics else None for o in observers]
    every = ranks.all_gather("statistics", own)
    forms = [next((form for form in seen if form is not None), None) for seen in zip(*every, strict=True)]
    values = []
    for observer, form in zip(observers, forms, strict=True):
        if form is not None and observer.has_statistics:
            values += [observer.min_vals.float().flatten(), -observer.max_vals.float().flatten()]
        elif form is not None:
            values.append(torch.full((2 * torch.Size(form[0]).numel(),), torch.inf, device=ranks.device))
    if not values:
        return
    flat = torch.cat(values)
    ranks.all_reduce_min(flat)
    for observer, form in zip(observers, forms, strict=True):
        if form is not None:
            shape, dtype = form
            count = torch.Size(shape).numel()
            observer.min_vals = flat[:count].reshape(shape).to(dtype)
            observer.max_vals = (-flat[count : 2 * count]).reshape(shape).to(dtype)
            flat = flat[2 * count :]


def sum_counts(ranks: Ranks, what: str, counts: Iterable[Mapping[int, int]]) -> list[dict[int, int]]:
    """Each dict of `counts` with its values added up over all ranks."""
    totals = []
    for same in zip(*ranks.all_gather(what, [dict(count) for count in counts]), strict=True):
        total: Counter[int] = Counter()
        for count in same:
            total.update(count)
        totals.append(dict(sorted(total.items())))
    return totals
