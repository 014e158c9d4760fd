"""Draws the plots of a report, as SVG text to embed in a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, MaxNLocator

from recipes.errors import printable

_INK, _FIRST, _SECOND = "#33373c", "#2f6f9f", "#c0702a"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: it is smaller, and readers can search it
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "report",
}
_WIDTH = 8.6
#: Inches for labels beside the axes, and for a color scale: to measure every text takes matplotlib as long as to draw all.
_LEFT, _BELOW, _EDGE, _BAR = 0.75, 0.5, 0.1, 1.1
#: Maximum number of outliers of a heat map that get a ring.
_RINGS = 20


@dataclass(frozen=True)
class Figure:
    """One plot: `svg` is markup, `caption` says what is shown and how it was measured."""

    title: str
    caption: str
    svg: Markup


def expert_map(
    values: Mapping[tuple[int, int], float], title: str, caption: str, label: str, logarithmic: bool = False
) -> Figure | None:
    """A heat map, blocks down and experts across; `values` maps (block, expert) to a figure. None without values.

    Colors span the values of 99 % of the experts, so that an outlier does not make all others look alike; outliers have
    rings.
    """
    if not values:
        return None
    blocks = sorted({block for block, _ in values})
    experts = max(expert for _, expert in values) + 1
    rows = {block: row for row, block in enumerate(blocks)}
    grid = np.full((len(blocks), experts), np.nan)
    for (block, expert), value in values.items():
        grid[rows[block], expert] = value
    positive = grid[grid > 0] if logarithmic and (grid > 0).any() else grid[np.isfinite(grid)]
    low = np.percentile(positive, 0.5, method="higher")
    high = np.percentile(positive, 99.5, method="lower")
    norm = LogNorm(low, high) if positive.min() > 0 and logarithmic and high > low else Normalize(low, high)
    # The color scale as numbers from 0 to 1: values more than one span outside it are outliers.
    place = np.ma.filled(norm(np.ma.masked_invalid(grid)), 0.5) if high > low else np.where(grid == low, 0.5, 9.0)
    rings = np.argwhere(((place > 2) | (place < -1)) & np.isfinite(grid))[:_RINGS]
    with rc_context(_STYLE):
        height = min(1.6 + 0.09 * len(blocks), 6.5)
        drawing, (axes,) = _drawing(height, right=_BAR)
        axes.set_facecolor("#d9d9d9")  # cells without a value: a dense block, an expert without tokens
        image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
        axes.scatter(rings[:, 1], rings[:, 0], s=120, facecolors="none", edgecolors="#ff2d20", linewidths=2.2)
        place_of = axes.get_position()
        scale = drawing.add_axes((place_of.x1 + 0.1 / _WIDTH, place_of.y0, 0.15 / _WIDTH, place_of.height))
        bar = drawing.colorbar(image, cax=scale, label=label, extend="both")
        if isinstance(norm, LogNorm):
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter("{x:,g}")
            bar.ax.minorticks_off()
        axes.set_xlabel("expert")
        axes.set_ylabel("block")
        step = max(1, len(blocks) // 12)
        axes.set_yticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return Figure(title, caption, _svg(drawing))


def lines(
    series: Mapping[str, Mapping[int, float]], title: str, caption: str, label: str, logarithmic: bool = False
) -> Figure | None:
    """One line per name over blocks; a logarithmic axis omits values that are not positive. None without a point."""
    kept = {
        name: {block: value for block, value in points.items() if not logarithmic or value > 0}
        for name, points in series.items()
    }
    if not any(kept.values()):
        return None
    with rc_context(_STYLE):
        drawing, (axes,) = _drawing(2.5)
        for (name, points), color in zip(kept.items(), (_FIRST, _SECOND, "#5f8f4e", "#7a5ea8"), strict=False):
            axes.plot(
                list(points), list(points.values()), color=color, label=name, linewidth=1.4, marker="o", markersize=2.5
            )
        if logarithmic:
            axes.set_yscale("log")
        _over_blocks(axes, label)
        if len(kept) > 1:
            axes.legend(frameon=False)
        return Figure(title, caption, _svg(drawing))


def against_size(points: Mapping[str, tuple[float, float]], title: str, caption: str, label: str) -> Figure | None:
    """One dot per checkpoint: (bytes, figure), named in the legend. None with fewer than two."""
    if len(points) < 2:
        return None
    with rc_context(_STYLE):
        drawing = Drawing(figsize=(_WIDTH, 3.2), layout="constrained")
        axes = drawing.subplots()
        for number, (name, (x, y)) in enumerate(points.items()):
            # What a stranger calls a run is no formula: matplotlib reads $...$ as one.
            shown = printable(name if len(name) <= 40 else f"...{name[-37:]}").replace("$", r"\$")
            axes.scatter(x / 1e9, y, s=36, color=f"C{number % 10}", marker="osD^v"[number // 10 % 5], label=f" {shown}")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.margins(0.15)
        axes.set_xlabel("GB")
        axes.set_ylabel(label)
        return Figure(title, caption, _svg(drawing))


def size_figures(measured: Mapping[str, tuple[int | None, float | None, float | None]]) -> list[Figure]:
    """KL and perplexity against size; `measured` maps a checkpoint's name to (bytes, perplexity, KL)."""
    kl = {name: (size, kl) for name, (size, _, kl) in measured.items() if size and kl is not None}
    perplexity = {name: (size, p) for name, (size, p, _) in measured.items() if size and p is not None}
    how = "As the serving engine measured it, each run on the text of its recipe."
    found = (
        against_size(kl, "KL against size", how, "KL(source || output), nats"),
        against_size(perplexity, "Perplexity against size", how, "perplexity"),
    )
    return [figure for figure in found if figure is not None]


def time_and_memory(seconds: Mapping[int, float], memory: Mapping[int, float], caption: str) -> Figure | None:
    """Seconds (bars) and peak memory in bytes (line with its own axis) of each block. None without a block."""
    if not seconds:
        return None
    with rc_context(_STYLE):
        drawing, (above, below) = _drawing(3.4, rows=2)
        above.bar(list(seconds), list(seconds.values()), color=_FIRST)
        above.set_ylabel("seconds")
        below.plot(
            list(memory),
            [value / 1e9 for value in memory.values()],
            color=_SECOND,
            linewidth=1.4,
            marker="o",
            markersize=2.5,
        )
        below.set_ylim(bottom=0)
        _over_blocks(below, "peak GB")
        return Figure("Time and memory per block", caption, _svg(drawing))


def scale_histogram(scales: Mapping[str, Any], caption: str) -> Figure | None:
    """Counts of group scales by power of two, per part; `scales` is `group_scales` of fidelity.json."""
    edges, counts = scales.get("edges_log2", ()), scales.get("counts", {})
    if len(edges) < 2 or not counts:
        return None
    with rc_context(_STYLE):
        drawing, (axes,) = _drawing(2.5)
        for (part, numbers), color in zip(counts.items(), (_FIRST, _SECOND, "#5f8f4e", "#7a5ea8"), strict=False):
            share = np.asarray(numbers, dtype=float)
            axes.stairs(share / max(share.sum(), 1.0), edges, color=color, label=part, linewidth=1.4)
        axes.set_xlabel("log2 of the group scale as stored (E4M3)")
        axes.set_ylabel("share of groups")
        axes.legend(frameon=False)
        return Figure("Group scales", caption, _svg(drawing))


def fidelity_figures(fidelity: Mapping[str, Any]) -> list[Figure]:
    """The plots of fidelity.json: error per block and expert, forward cosine per block, group scales."""
    how = str(fidelity.get("source", ""))
    blocks: Sequence[Mapping[str, Any]] = fidelity.get("blocks", ())
    cosines = {
        "each block fed the source's hidden states": _complement(blocks, "cosine"),
        "errors carried from block to block": _complement(blocks, "cosine_propagated"),
    }
    found = (
        expert_map(
            worst_by_expert(fidelity), "Weight error by block and expert",
            f"Largest relative error |output - source| / |source| of an expert's projections. {how}", "relative error",
        ),
        lines(
            cosines, "Forward error by block",
            "1 - cosine between the source's block and the quantized one on calibration tokens; activations quantized "
            "as the serving engine does.", "1 - cosine", logarithmic=True,
        ),
        scale_histogram(fidelity.get("group_scales", {}), "Read from the output's weight_scale tensors."),
    )  # fmt: skip
    return [figure for figure in found if figure is not None]


def worst_by_expert(fidelity: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    """(block, expert) -> largest relative error of its projections, from the table of fidelity.json."""
    columns = {name: number for number, name in enumerate(fidelity.get("columns", ()))}
    worst: dict[tuple[int, int], float] = {}
    for row in fidelity.get("rows", ()):
        block, expert, error = (row[columns[name]] for name in ("block", "expert", "relative_error"))
        if block is not None and expert is not None and error is not None:
            worst[block, expert] = max(worst.get((block, expert), 0.0), error)
    return worst


def _complement(blocks: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {int(block["block"]): 1.0 - block[key] for block in blocks if block.get(key) is not None}


def _over_blocks(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _drawing(height: float, rows: int = 1, right: float = _EDGE) -> tuple[Drawing, Sequence[Axes]]:
    """A drawing of `height` inches with `rows` axes over each other that share x; `right`: inches beside them."""
    drawing = Drawing(figsize=(_WIDTH, height))
    axes: Sequence[Axes] = list(drawing.subplots(rows, sharex=True, squeeze=False)[:, 0])
    drawing.subplots_adjust(_LEFT / _WIDTH, _BELOW / height, 1 - right / _WIDTH, 1 - _EDGE / height, hspace=0.12)
    return drawing, axes


def _svg(drawing: Drawing) -> Markup:
    text = io.StringIO()
    drawing.savefig(text, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])
