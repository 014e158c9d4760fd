"""What a dress rehearsal of DeepSeek-V4 reads, writes, multiplies and holds, counted from hollow headers.

python -m tests.benchmarks.miniature_cost [--models flash pro]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from calibration.forecast.cost import BF16, block_costs
from calibration.plan.miniature import SAMPLES, TOKENS, find_cut
from tests.exported import EXPERTS, recipe, task_of
from tests.models import headers_only


def row(model: str, directory: Path) -> str:
    """One row of the table in docs/cost-model.md."""
    source = headers_only.write(directory / model, headers_only.MODELS[model])
    task = task_of(recipe(source, directory / "output", EXPERTS))
    cut, tokens = find_cut(task), SAMPLES * TOKENS
    costs = [c for c in block_costs(task.plan, task.formats) if c.number is None or c.number in cut.kept]
    read, written = sum(task.source.tensors[name].nbytes for name in cut.names), cut.output_bytes(task.plan)
    products = [(p, n) for c in costs if c.number is not None for p, n in c.products.items()]
    flops = sum(2 * tokens * p.rows * p.columns * n for p, n in products)
    values = sum(math.prod(task.formats.of(name).shape) for name in cut.names if name not in task.formats.companions)
    block = max(c.values for c in costs if c.number is not None) * BF16
    return (
        f"| {model} | {', '.join(map(str, cut.kept))} of {len(task.plan.block_numbers)} | {read / 1e9:.1f} | "
        f"{written / 1e9:.1f} | {flops / 1e12:,.0f} | {block / 1e9:.1f} | {written / 1e9:.1f} | "
        f"{(written + BF16 * values) / 1e9:.1f} |"
    )


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Count what a dress rehearsal takes.")
    parser.add_argument("--models", nargs="+", default=["flash", "pro"], choices=tuple(headers_only.MODELS))
    for model in parser.parse_args().models:
        with tempfile.TemporaryDirectory() as directory:
            print(row(model, Path(directory)))


if __name__ == "__main__":
    main()
