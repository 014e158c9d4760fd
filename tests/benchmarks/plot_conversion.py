"""Draws docs/conversion-cost.svg from the table of `convert_benchmark` in docs/measurements.md.

`python -m tests.benchmarks.plot_conversion` in any environment with matplotlib, from the project's root.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt

ROW = re.compile(r"^\| ([\d.]+) \| (pipeline|input and output alone) \| \d+ \| [\d.]+ \| ([\d.]+) \|", re.MULTILINE)


def main() -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for gigabytes, method, cpu in ROW.findall(Path("docs/measurements.md").read_text()):
        points.setdefault(method, []).append((float(gigabytes), float(cpu)))
    figure, axes = plt.subplots(figsize=(6, 4))
    for method, measured in points.items():
        axes.plot(*zip(*measured, strict=True), marker="o", label=method)
    axes.set(xlabel="FP8 source, GB", ylabel="CPU-seconds", title="method: convert, NVFP4A16, 2 cores")
    axes.legend()
    figure.tight_layout()
    figure.savefig("docs/conversion-cost.svg")


if __name__ == "__main__":
    main()
