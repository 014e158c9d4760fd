"""Writes report.html of a run directory from the journal, the events and the verdicts, and updates it during a run."""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import inner, read_json_or_none, read_text, write_text
from calibration.runs.journal import RunDirectory
from recipes.errors import SourceError
from verify.checks import Check
from verify.levels import samples_of
from verify.report.facts import Facts
from workflows.inspect_checkpoint import headroom
from workflows.run.proofs import PROOFS, one_line
from workflows.run.status import read_status, render_status

NAME = "report.html"
#: Largest fraction of a run's time that writing the page takes, and seconds before the first page.
_SHARE, _FIRST = 0.01, 30.0


class ReportPage:
    """Keeps `<output>.run/report.html` up to date; never fails a run."""

    def __init__(self, output: Path) -> None:
        self.output, self.path = output, RunDirectory(output).path / NAME
        self._due = time.monotonic() + _FIRST

    def update(self, now: bool = False) -> None:
        """Writes the page if the last one is old enough; with `now`, in any case."""
        started = time.monotonic()
        if not now and started < self._due:
            return
        try:
            write_report(self.output)
        except (
            Exception
        ) as error:  # a full disk; or an import that another rank's failure interrupted, which fails from then on
            logging.getLogger(__name__).warning("%s: not written: %s", self.path, error)
        ended = time.monotonic()
        self._due = ended + max(_FIRST, (ended - started) / _SHARE)


def write_report(output: Path) -> Path:
    """Writes `<output>.run/report.html` from the files of that run directory and returns its path. Raises
    EnvironmentProblem if it cannot be written."""
    # Imported late: matplotlib and jinja2 take half a second, which a run that is interrupted at once saves.
    from verify.report.page import Report
    from verify.report.plots import fidelity_figures

    directory = RunDirectory(output)
    status, facts = read_status(output), directory.facts()
    begun = _begun(facts)
    events = _events_since(directory, begun)
    blocks = {int(e["block"]) - 1: e for e in events if e["event"] == "block" and e["time"] >= begun}
    fidelity = read_json_or_none(directory.path / "fidelity.json") or {}
    figures = fidelity_figures(fidelity) if fidelity else _errors_so_far(blocks)
    running, error = status["state"] == "running", status["last_error"]
    # An age would be misread, because the page is read later than it is written.
    state = [line for line in render_status(status) if not line.startswith(("run directory", "last event"))]
    report = Report(
        title=output.name,
        checks=[
            Check(**check) for check in (read_json_or_none(directory.path / "verify.json") or {}).get("checks", ())
        ],
        state=state,
        running=running,
        error=error is not None,
        figures=figures + _block_figures(blocks),
        fidelity=fidelity,
        measured=verdict_facts(output),
        facts=_facts(directory, facts, events),
        recipe=_text(directory.path / "recipe.yaml"),
    )
    path = directory.path / NAME
    write_text(path, report.html())
    return path


def verdict_facts(output: Path) -> Facts:
    """What the verdict at the end of a run shows beside the checks, as that run's directory has it."""
    directory = RunDirectory(output)
    described = read_json_or_none(directory.path / "plan.json") or {}
    served = read_json_or_none(directory.path / "serving.json") or {}
    return Facts(
        source_bytes=_count_in(described, "checkpoint", "bytes"),
        output_bytes=_count_in(described, "plan", "output_bytes"),
        seconds=_seconds(_events_since(directory, _begun(directory.facts()))),
        served=served,
        samples=samples_of(served),
        places={"output": str(output), "report": str(directory.path / NAME)},
    )


def _count_in(described: dict[str, Any], part: str, key: str) -> int | None:
    """A number of plan.json, which may be damaged."""
    value = inner(described, part).get(key)
    return value if isinstance(value, int) else None


def _begun(facts: list[dict[str, Any]]) -> float:
    """When the run began that the journal's last facts are of, in seconds since the epoch."""
    found: float = next((f["time"] for f in reversed(facts) if f.get("fact") in ("fingerprint", "started")), 0.0)
    return found


def _events_since(directory: RunDirectory, begun: float) -> list[dict[str, Any]]:
    return [event for event in directory.events() if event["time"] >= begun - 60 and event["event"] != "load"]


def _seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """Stage -> wall seconds of the last time that it came to its end."""
    return {e["stage"]: e["seconds"] for e in events if e["event"] == "stage_finished"}


def _errors_so_far(blocks: dict[int, dict[str, Any]]) -> list[Any]:
    """The weight errors that the exporter measured, used until there is a fidelity.json."""
    from verify.report.plots import expert_map, lines

    how = "Largest relative error of an expert's projections, as the exporter measured it; not verified yet."
    errors = {
        (block, int(expert)): error
        for block, event in blocks.items()
        for expert, error in event.get("expert_errors", {}).items()
    }
    worst = {block: event["worst_error"] for block, event in blocks.items() if event.get("worst_error") is not None}
    found = (
        expert_map(errors, "Weight error by block and expert", how, "relative error"),
        None if errors else lines({"worst": worst}, "Weight error by block", how, "relative error"),
    )
    return [figure for figure in found if figure is not None]


def _block_figures(blocks: dict[int, dict[str, Any]]) -> list[Any]:
    from verify.report.plots import expert_map, time_and_memory

    tokens = {
        (block, int(expert)): float(count)
        for block, event in blocks.items()
        for expert, count in event.get("tokens_per_expert", {}).items()
    }
    seconds = {block: event["seconds"] + event.get("export_seconds", 0.0) for block, event in blocks.items()}
    memory = {block: float(event["peak_memory"]) for block, event in blocks.items()}
    low = min((count for count in tokens.values()), default=0.0)
    found = (
        expert_map(
            tokens, "Tokens per expert",
            f"Calibration tokens routed to each expert; least {low:.0f}. Grey: none.", "tokens",
            logarithmic=True,
        ),
        time_and_memory(
            seconds, memory,
            "Wall seconds of calibration and export; anonymous memory, highest of samples 20 ms apart.",
        ),
    )  # fmt: skip
    return [figure for figure in found if figure is not None]


def _facts(directory: RunDirectory, facts: list[dict[str, Any]], events: list[dict[str, Any]]) -> dict[str, str]:
    described = read_json_or_none(directory.path / "plan.json") or {}
    source, plan = described.get("checkpoint", {}), described.get("plan", {})
    rows: dict[str, str] = {}
    if source and plan:
        rows["source"] = (
            f"{source['checkpoint']} ({source['family']}, {source['parameters']:,} parameters, {source['bytes']:,} bytes, "
            f"{source['blocks']} blocks)"
        )
        rows["quantized"] = "; ".join(
            f"{n}: {g['scheme']}, {g['modules']:,} modules" for n, g in plan["groups"].items()
        )
        rows["output"] = f"{plan['output_bytes']:,} bytes, {plan['bits_per_parameter']} bits per parameter"
        if plan.get("input_headroom"):
            rows["input scales"] = headroom(plan["input_headroom"])
        rows["plan"] = plan["digest"]
    if proven := read_json_or_none(directory.path / PROOFS):
        rows["proven"] = one_line(proven)
    calibrated = next((fact for fact in reversed(facts) if fact.get("fact") == "calibrated"), None)
    if calibrated:
        rows["calibration"] = calibrated["data"]
        rows["tokens per expert"] = calibrated["tokens_per_expert"]
    if stages := _seconds(events):
        rows["seconds"] = ", ".join(f"{name} {seconds:,.1f}" for name, seconds in stages.items())
    peaks = [event["peak_memory"] for event in events if event["event"] == "block"]
    if peaks:
        rows["peak memory"] = f"{max(peaks) / 1e9:.2f} GB, median of blocks {statistics.median(peaks) / 1e9:.2f} GB"
    versions: dict[str, str] = next((event["versions"] for event in reversed(events) if event["event"] == "plan"), {})
    if versions:
        rows["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return rows


def _text(path: Path) -> str:
    try:
        return read_text(path, errors="replace")
    except SourceError:
        return ""
