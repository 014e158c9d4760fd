"""One calibration with a clock at reading, computing and writing; prints what it took as JSON.

    python -m tests.gpu.once ours|stock RECIPE [--one-by-one]

As tests/benchmarks/engine_once.py, and of this engine: seconds in which weights were read and copied, blocks computed, and both
at once; of either, the most memory that torch held on the accelerator.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from calibration.engine.experts import ExpertCalibration
from calibration.engine.export import Exporter
from calibration.engine.passes import Passes
from calibration.engine.walk import Walk
from calibration.model.source_model import SourceModel
from calibration.runs.memory import PeakMemory, anonymous_memory
from recipes.loader import load_recipe
from tests.benchmarks.engine_once import METHODS

Span = tuple[float, float]


def union(spans: Iterable[Span]) -> list[Span]:
    """The spans without overlaps, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def seconds(spans: Iterable[Span]) -> float:
    """Their total length, what overlaps counted once."""
    return sum(end - begin for begin, end in union(spans))


def overlap(left: Iterable[Span], right: Iterable[Span]) -> float:
    """Seconds in both."""
    left, right = list(left), list(right)
    return seconds(left) + seconds(right) - seconds([*left, *right])


def clocked(function: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    """`function`, each of whose calls adds a span; it waits for the accelerator, whose work would else count later."""

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            spans.append((begin, time.perf_counter()))

    return timed


def measured(method: str, recipe: Path, one_by_one: bool = False) -> dict[str, Any]:
    """Runs one method of METHODS here; `one_by_one` computes an expert at a time, instead of all in a few products."""
    read, compute, write = list[Span](), list[Span](), list[Span]()
    base, wall, cpu = anonymous_memory(), time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        memory = stack.enter_context(PeakMemory())
        for owner, name, spans in (
            (SourceModel, "_read", read), (Walk, "_calibrate", compute), (Passes, "compute", compute),
            (Exporter, "block", write),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, clocked(getattr(owner, name), spans)))
        if one_by_one:
            stack.enter_context(patch.object(ExpertCalibration, "stacked", False))
        METHODS[method](load_recipe(recipe))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    facts: dict[str, Any] = {"seconds": wall, "cpu_seconds": cpu, "host_bytes": memory.take() - base}
    if torch.cuda.is_available():
        facts["accelerator_bytes"] = torch.cuda.max_memory_allocated()
    if method == "ours":
        named = {"reading": read, "computing": compute, "writing": write}
        facts |= {f"{name}_seconds": seconds(found) for name, found in named.items()}
        facts["share_of_reading_while_computing"] = overlap(read, compute) / max(seconds(read), 1e-9)
        facts["share_of_time_busy"] = seconds([*read, *compute, *write]) / wall
    return facts


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--one-by-one", action="store_true", help="an expert at a time, instead of all in a few products"
    )
    given = parser.parse_args()
    print(json.dumps(measured(given.method, given.recipe, given.one_by_one)))


if __name__ == "__main__":
    main()
