"""`python -m workflows.compare RUN RUN ...`: several outputs of one source as one table, and as one page with --html.

RUN is an output, its run directory (`<output>.run`) or the directory of a batch, which stands for all its runs. Nothing is
measured again: the figures are those of each run's last verification. What was measured on other text, or is made from
another source, is not compared. docs/running.md explains the columns.

Exit codes: 0 compared; 2 the runs cannot be compared; 3 a run directory is missing or damaged; 4 the page cannot be
written; 130 interrupted; 141 the result could not be printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from calibration.checkpoint.files import write_text
from recipes.errors import RecipeError, WorkflowError
from recipes.places import is_inside
from recipes.streams import exit_with, parse_arguments, print_result, printed
from recipes.units import duration, size
from verify.accuracy.recovery import NOISE
from verify.report.tables import OutputConsole
from workflows.compare.runs import Compared, Difference, described, differences, read_runs


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workflows.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output, run directory or batch directory")
    parser.add_argument("--matrix", action="store_true", help="print the difference of every pair of runs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the comparison as one self-contained page too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parse_arguments(parser, arguments)
    try:
        runs = read_runs(options.runs)
        inside = [run.output for run in runs if options.html is not None and is_inside(options.html, run.output)]
        if inside:
            raise RecipeError(f"--html: {options.html} lies inside the checkpoint {inside[0]}; name another place")
        pairs = differences(runs)
        if options.html is not None:
            write_text(options.html, page(runs, pairs))
        if options.json:
            print_result(json.dumps(_to_json(runs, pairs), indent=2))
        else:
            _print(runs, pairs, options.matrix)
            if options.html is not None:
                print_result(f"page: {options.html}")
    except WorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return printed()


def page(runs: Sequence[Compared], pairs: Sequence[Difference]) -> str:
    """The comparison as one HTML page that contains everything it shows."""
    from verify.report.page import marked, render  # jinja2 and matplotlib: not before they are needed
    from verify.report.plots import size_figures

    prompts = {prompt: None for run in runs for prompt in run.samples}
    samples = []
    for prompt in prompts:
        texts = {run.name: run.samples.get(prompt, ("", None)) for run in runs}
        source = next((its for _, its in texts.values() if its is not None), None)
        samples.append((prompt, source, {name: marked(text, source)[0] for name, (text, _) in texts.items()}))
    return render(
        "compare.html.j2", title="Comparison", refresh=None, rows=[_row(run, runs, pairs) for run in runs],
        source=described(runs[0]), pairs=[_pair(pair) for pair in pairs], samples=samples, names=[r.name for r in runs],
        figures=size_figures(
            {run.name: (run.output_bytes, run.perplexity, run.quality.kl if run.quality else None) for run in runs}
        ),
    )  # fmt: skip


def _row(run: Compared, runs: Sequence[Compared], pairs: Sequence[Difference]) -> dict[str, str]:
    """One run as text: what it costs, what it keeps, and how it stands to the best one."""
    quality = run.quality
    loss = _plus_minus(quality.difference, quality.error) if quality else ""
    return {
        "run": run.name,
        "verdict": run.verdict,
        "size": size(run.output_bytes) if run.output_bytes is not None else "",
        "bits": f"{run.bits:.3f}" if run.bits is not None else "",
        "perplexity": f"{run.perplexity:.4g}" if run.perplexity is not None else "",
        "loss": loss,
        "kept": f"{quality.kept:.1%}" if quality and quality.kept is not None else "",
        "KL": f"{quality.kl:.4f}" if quality and quality.kl is not None else "",
        "top-1": f"{quality.top1:.1%}" if quality and quality.top1 is not None else "",
        **{task: _score(run, task) for task in dict.fromkeys(found.task for other in runs for found in other.accuracy)},
        "against best": _against_best(run, runs, pairs),
        "made in": duration(run.seconds) if run.seconds else "",
    }


def _score(run: Compared, task: str) -> str:
    found = next((found for found in run.accuracy if found.task == task), None)
    if found is None:
        return ""
    kept = (
        ""
        if found.recovered is None
        else f" ({found.recovered:.1%}{'' if found.error is None else f' +- {found.error:.1%}'})"
    )
    return f"{found.output:.3f}{kept}"


def _against_best(run: Compared, runs: Sequence[Compared], pairs: Sequence[Difference]) -> str:
    measured = [other for other in runs if other.losses]
    if not run.losses or len(measured) < 2:
        return ""
    best = min(measured, key=lambda other: sum(other.losses) / len(other.losses))
    if best is run:
        return "best"
    pair = next((p for p in pairs if {p.left, p.right} == {run.name, best.name}), None)
    if pair is None:
        return ""
    mean = pair.mean if pair.left == run.name else -pair.mean
    return _plus_minus(mean, pair.error) + (" (noise)" if pair.noise else "")


def _pair(pair: Difference) -> dict[str, str]:
    return {
        "runs": f"{pair.left} - {pair.right}",
        "difference": _plus_minus(pair.mean, pair.error),
        "meaning": "within noise" if pair.noise else f"{pair.left if pair.mean < 0 else pair.right} is better",
    }


def _print(runs: Sequence[Compared], pairs: Sequence[Difference], matrix: bool) -> None:
    console, rows = OutputConsole(), [_row(run, runs, pairs) for run in runs]
    console.print(f"source: {described(runs[0])}", soft_wrap=True)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    if matrix and pairs:
        both = Table(*_pair(pairs[0]))
        for pair in pairs:
            both.add_row(*_pair(pair).values())
        console.print(both)
    console.print(
        f"loss and differences in nats per token, paired by window, +- standard error; noise is less than {NOISE:g} errors"
    )


def _to_json(runs: Sequence[Compared], pairs: Sequence[Difference]) -> dict[str, Any]:
    return {
        "source": described(runs[0]),
        "runs": [_row(run, runs, pairs) | {"losses": run.losses} for run in runs],
        "pairs": [
            {"left": p.left, "right": p.right, "mean": p.mean, "error": p.error, "noise": p.noise} for p in pairs
        ],
    }


def _plus_minus(mean: float | None, error: float | None) -> str:
    return "" if mean is None else f"{mean:+.4f}" + ("" if error is None else f" +- {error:.4f}")


if __name__ == "__main__":
    exit_with(main)
