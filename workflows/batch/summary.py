"""The summary of a batch, made from files alone: rows for the terminal, summary.json and summary.html."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calibration.checkpoint.files import inner, no_link, read_json_or_none, write_json, write_text
from recipes.errors import WorkflowError
from recipes.units import clock, size
from verify.checks import LEVELS, SEVERITY
from verify.report.tiles import Tile
from workflows.batch.attempt import resident_peak
from workflows.batch.outcome import one_line
from workflows.batch.preflight import predict_ends
from workflows.batch.state import BatchDirectory, Entry, alive
from workflows.run.status import read_status

#: The states of a run, the most urgent first.
STATES = ("failed", "running", "retrying", "stopped", "waiting", "done")
#: Seconds after which the page loads itself again.
REFRESH = 60
#: GPUs or jobs of a batch at most; batch.json may be damaged.
MOST_SLOTS = 10_000
_STYLE = {
    "done": "green",
    "failed": "bold red",
    "running": "cyan",
    "retrying": "yellow",
    "PASS": "green",
    "FAIL": "red",
}


def summarize(
    batch: BatchDirectory, jobs: Mapping[str, str] | None = None, ended: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The whole batch as JSON: `counts` per state and `runs`, see `_row`. jobs: run -> state of its cluster job; ended: run ->
    how its last job ended, if the cluster no longer has it."""
    entries, facts = batch.load()
    slots = facts.get("slots")
    slots = slots if isinstance(slots, int) and 0 < slots <= MOST_SLOTS else 1
    rows = [_row(batch, entry, (jobs or {}).get(entry.name), (ended or {}).get(entry.name)) for entry in entries]
    pending = [
        entry for entry, row in zip(entries, rows, strict=True) if row["state"] in ("running", "retrying", "waiting")
    ]
    expected = dict(predict_ends(pending, slots)) if all(entry.seconds is not None for entry in pending) else {}
    for row in rows:
        row["expected_end_seconds"] = expected.get(row["name"])
    return {
        "batch": str(batch.path.absolute()),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "counts": {state: sum(row["state"] == state for row in rows) for state in STATES},
        "runs": rows,
    }


def write_summary(batch: BatchDirectory, jobs: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Writes summary.json and summary.html and returns the former. Several processes (the jobs of a cluster) may call it
    at the same time. Raises EnvironmentProblem if the files cannot be written."""
    from verify.report.page import render  # jinja2 and matplotlib: not before they are needed
    from verify.report.plots import size_figures

    with open(batch.path / "summary.lock", "a", opener=no_link) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = summarize(batch, jobs)
        write_json(batch.path / "summary.json", found)
        going = any(found["counts"][state] for state in ("running", "retrying", "waiting"))
        rows = sorted(found["runs"], key=lambda row: STATES.index(row["state"]))
        page = render(
            "batch.html.j2", title=batch.path.name, refresh=REFRESH if going else None, counts=found["counts"],
            rows=[_shown(row) for row in rows], tiles=_tiles(found),
            figures=size_figures(
                {row["name"]: (row["size"], row["perplexity"], row["kl"]) for row in rows if row["state"] == "done"}
            ),
        )  # fmt: skip
        write_text(batch.path / "summary.html", page)
    return found


def rewrite_summary(batch: BatchDirectory, say: Callable[[str, str], None]) -> None:
    """`write_summary` for a batch at work: a full disk is reported, as `say(text, level)`, and does not end the batch."""
    try:
        write_summary(batch)
    except (WorkflowError, OSError) as error:
        say(f"summary: not written: {error}", "warning")


def print_summary(found: dict[str, Any], console: Console) -> None:
    """Prints one row per run, and the counts."""
    table = Table("run", "state", "verdict", "size", "bits", "time", "peak memory", "ppl", "KL", "what to know")
    for row in found["runs"]:
        shown = _shown(row)
        state = Text(row["state"], _STYLE.get(row["state"], "white"))
        verdict = Text(row["verdict"], _STYLE.get(row["verdict"], "yellow"))
        cells = [shown[key] for key in ("size", "bits", "time", "memory", "perplexity", "kl")]
        table.add_row(row["name"], state, verdict, *cells, shown["note"])
    console.print(table)
    counts = ", ".join(f"{number} {state}" for state, number in found["counts"].items() if number)
    console.print(f"{counts}; {found['batch']}/summary.html", soft_wrap=True)


def _tiles(found: Mapping[str, Any]) -> list[Tile]:
    """What the page shows of the batch as a whole."""
    counts, rows = found["counts"], found["runs"]
    done = [row for row in rows if row["state"] == "done"]
    verdicts = {verdict: sum(row["verdict"] == verdict for row in done) for verdict in SEVERITY}
    judged = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items() if number)
    tone = "FAIL" if counts["failed"] or verdicts["FAIL"] else ""
    tiles = [Tile("runs finished", f"{len(done)} of {len(rows)}", judged, tone)]
    if written := sum(row["size"] for row in rows):
        tiles.append(Tile("written", size(written), f"of {size(sum(row['planned_size'] for row in rows))}"))
    if any(row["seconds"] for row in rows):
        ends = [row["expected_end_seconds"] for row in rows if row["expected_end_seconds"] is not None]
        left = f"about {clock(max(ends))} to go" if ends else ""
        tiles.append(
            Tile("time", clock(sum(row["seconds"] or 0.0 for row in rows)), f"of all attempts; {left}".rstrip("; "))
        )
    best = min((row for row in done if row["kl"] is not None), key=lambda row: row["kl"], default=None)
    if best is not None:
        tiles.append(Tile("least KL", f"{best['kl']:.2e}", best["name"]))
    return tiles


def _row(batch: BatchDirectory, entry: Entry, job: str | None, job_end: str | None) -> dict[str, Any]:
    """One run. Bytes, seconds, bits per parameter; None if nothing is known or was measured.

    `size` is that of the output's shards now; `peak_memory` the largest resident size of any of the run's processes, as
    the kernel counted it, over all attempts; `seconds` the wall time of all attempts; perplexity and KL as the serving
    engine measured them.
    """
    attempts = batch.attempts(entry.name)
    status = read_status(Path(entry.output)) if entry.output else {}
    state, reason = _state(entry, attempts, status, job, job_end)
    verified = entry.run.facts("verified") if entry.output else []
    verdicts = {level: verified[-1].get(level, "UNCHECKED") for level in LEVELS} if verified else {}
    serving = (verified and read_json_or_none(entry.run.path / "serving.json")) or {}
    ended = [attempt for attempt in attempts if attempt["fact"] == "ended"]
    seconds = sum(attempt.get("seconds") or 0.0 for attempt in ended)
    begun = sum(attempt["fact"] == "begun" for attempt in attempts)
    peaks = [attempt["peak_rss"] for attempt in ended if attempt.get("peak_rss")]
    if attempts and alive(attempts[-1]):
        seconds += time.time() - attempts[-1]["time"]
        peaks += [peak for peak in [resident_peak(attempts[-1]["pid"])] if peak]
    return {
        "name": entry.name,
        "state": state,
        "reason": reason,
        "job": job,
        "verdict": _overall(verdicts),
        "verdicts": verdicts,
        "output": entry.output,
        "size": sum(path.stat().st_size for path in Path(entry.output).glob("*.safetensors")) if entry.output else 0,
        "planned_size": entry.output_bytes,
        "source_size": entry.source_bytes,
        "parameters": entry.parameters,
        "bits_per_parameter": entry.bits_per_parameter,
        "seconds": round(seconds, 1) if begun else None,
        "cpu_seconds": round(sum(attempt.get("cpu_seconds") or 0.0 for attempt in ended), 1) if ended else None,
        "attempts": begun,
        "peak_memory": max(peaks, default=None),
        "perplexity": _number(serving.get("perplexity")),
        "kl": _number(inner(inner(serving, "source"), "agreement").get("kl")),
        "blocks": status.get("blocks"),
        "blocks_finished": status.get("blocks_finished"),
        "eta": status.get("eta"),
        "predicted_seconds": entry.seconds,
        "report": _link(batch, entry.run.path / "report.html") if entry.output else None,
        "log": _link(batch, batch.runs(entry.name) / "log.txt"),
    }


def _state(
    entry: Entry, attempts: Sequence[dict[str, Any]], status: dict[str, Any], job: str | None, job_end: str | None
) -> tuple[str, str]:
    """(state, why in one line)."""
    if entry.problems:
        return "failed", one_line(entry.problems[0])
    last = next((a for a in reversed(attempts) if a["fact"] not in ("stopping", "job", "lost")), {"fact": "none"})
    fact = last["fact"]
    if fact == "gave_up":
        return "failed", last["reason"]
    elsewhere = fact == "begun" and last["host"] != socket.gethostname()
    # Only the cluster knows about a process of another host; without one, the run's own lock decides.
    lives = not job_end and (status.get("holder") if job is None else "pending" not in job)
    if fact == "begun" and (alive(last) or (elsewhere and lives)):
        return "running", job or ""
    if entry.output_state().kind == "done":
        return "done", ""
    if job_end and (last.get("outcome") != "stopped" or not job_end.endswith(("completed", "by now"))):
        return "stopped", f"{job_end}; run the same command to resume"
    if fact == "ended" and last["outcome"] in ("transient", "space"):
        return "retrying", last["reason"]
    if fact == "ended":
        return "stopped", last["reason"]
    if fact == "begun" and not (elsewhere and job):
        return "stopped", "its process is gone; run the same command to resume"
    return "waiting", "; ".join(filter(None, (job, f"requeued: {last['reason']}" if fact == "requeued" else "")))


def _overall(verdicts: Mapping[str, str]) -> str:
    return next((v for v in ("FAIL", "UNCHECKED", "WARN", "PASS") if v in verdicts.values()), "UNCHECKED")


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as text for people."""
    blocks = (
        f"block {row['blocks_finished']}/{row['blocks']} finished" if row["blocks"] and row["state"] != "done" else ""
    )
    eta = f"ETA {clock(row['eta'])}" if row["eta"] is not None else ""
    progress = "; ".join(part for part in (blocks, eta) if part)
    return {
        **row,
        "size": ""
        if not row["size"]
        else size(row["size"]) + (f" of {size(row['planned_size'])}" if row["state"] != "done" else ""),
        "bits": "" if row["bits_per_parameter"] is None else f"{row['bits_per_parameter']:.2f}",
        "time": "" if row["seconds"] is None else clock(row["seconds"]),
        "memory": "" if row["peak_memory"] is None else size(row["peak_memory"]),
        "perplexity": "" if row["perplexity"] is None else f"{row['perplexity']:.4g}",
        "kl": "" if row["kl"] is None else f"{row['kl']:.2e}",
        "progress": progress,
        "note": "; ".join(part for part in (row["reason"], progress) if part),
    }


def _link(batch: BatchDirectory, target: Path) -> str | None:
    return os.path.relpath(target, batch.path) if target.is_file() else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None
