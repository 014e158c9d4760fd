"""`--status`: reads the progress of a run from its journal and events. Takes no lock, so it works at any time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import read_json_or_none
from calibration.runs.journal import RunDirectory
from recipes.units import clock
from workflows.run.prediction import FILE, render

#: Number of the last blocks over which the rate is averaged: early blocks of a model often differ from the others.
_RATE_BLOCKS = 8


def read_status(output: Path, now: float | None = None) -> dict[str, Any]:
    """The state of the run of `output` as JSON.

    `state` is one of `not started`, `running`, `complete` (every stage has ended), `stopped` (by an error, a signal or
    a kill; it can be resumed). Times in seconds; `eta` only covers calibration and is None if it is unknown.
    """
    directory, now = RunDirectory(output), time.time() if now is None else now
    facts, events, holder = directory.facts(), directory.events(), directory.holder()
    begun: dict[str, Any] = next((fact for fact in reversed(facts) if fact.get("fact") == "fingerprint"), {})
    finished = {fact["block"] for fact in facts if fact.get("fact") == "shards" and fact.get("block") is not None}
    total = begun.get("blocks")
    session = _session(events)
    per_block = _seconds_per_block(session)
    last_block = next((event["time"] for event in reversed(session) if event["event"] == "block"), None)
    eta = None
    if per_block is not None and total is not None and holder is not None:
        eta = max(per_block * (total - len(finished)) - (now - (last_block or now)), 0.0)
    stages = _stages(events, running=holder is not None)
    complete = any(fact.get("fact") == "verified" for fact in facts)
    state = "running" if holder else "complete" if complete else "stopped" if events or facts else "not started"
    return {
        "state": state,
        "holder": holder,
        "output": str(output),
        "run_directory": str(directory.path),
        "stages": stages,
        "blocks": total,
        "blocks_finished": len(finished),
        "block_under_way": _under_way(session) if holder else None,
        "seconds_per_block": None if per_block is None else round(per_block, 3),
        "eta": None if eta is None else round(eta, 1),
        "shards": len({name for fact in facts if fact.get("fact") == "shards" for name in fact.get("shards", ())}),
        "last_event_age": round(now - events[-1]["time"], 1) if events else None,
        "last_error": _last_error(events, now),
        "estimate": _estimate(directory.path / FILE),
    }


def render_status(status: dict[str, Any]) -> list[str]:
    """The status as lines for people, one fact per line."""
    lines = [f"{status['state']}: {status['output']}" + (f" ({status['holder']})" if status["holder"] else "")]
    if status["state"] == "not started":
        return lines
    lines.append("stages: " + (", ".join(f"{name} {how}" for name, how in status["stages"].items()) or "none begun"))
    if status["blocks"] is not None:
        rate, eta, under_way = status["seconds_per_block"], status["eta"], status["block_under_way"]
        lines.append(
            f"blocks: {status['blocks_finished']}/{status['blocks']} finished"
            + (f", block {under_way} under way" if under_way is not None else "")
            + (f", {rate:.1f} s per block" if rate is not None else "")
            + (f", ETA {clock(eta)}" if eta is not None else "")
        )
    lines.append(f"shards: {status['shards']} written")
    lines += render(status["estimate"]) if status["estimate"] else []
    if status["last_event_age"] is not None:
        lines.append(f"last event: {clock(status['last_event_age'])} ago")
    error = status["last_error"]
    if error is not None:
        lines.append(f"last error, {clock(error['age'])} ago: {'; '.join(error['problems'])}")
    if status["state"] == "stopped":
        lines.append("the same command without --status resumes")
    lines.append(f"run directory: {status['run_directory']}")
    return lines


def _estimate(path: Path) -> dict[str, Any] | None:
    """The prediction of the last rehearsal; after the end of the run, with the measurements beside it."""
    found = read_json_or_none(path)
    try:
        render(found or {"stages": {}})
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ):  # written by another version, or damaged
        return None
    return found


def _session(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events since calibration last started."""
    for index in range(len(events) - 1, -1, -1):
        if events[index]["event"] == "stage_started" and events[index].get("stage") == "calibrate":
            return events[index:]
    return []


def _seconds_per_block(session: list[dict[str, Any]]) -> float | None:
    ends = [event["time"] for event in session if event["event"] == "block"]
    begins = [event["time"] for event in session if event["event"] == "load"]
    times = ([begins[0]] if begins else []) + ends
    times = times[-_RATE_BLOCKS - 1 :]
    return (times[-1] - times[0]) / (len(times) - 1) if ends and len(times) > 1 else None


def _under_way(session: list[dict[str, Any]]) -> int | None:
    """The number, from 1, of the block that was loaded last and is unfinished."""
    for event in reversed(session):
        if event["event"] == "block":
            return None
        if event["event"] == "load":
            return None if event.get("block") is None else int(event["block"]) + 1
    return None


def _stages(events: list[dict[str, Any]], running: bool) -> dict[str, str]:
    stages: dict[str, str] = {}
    for event in events:
        if event["event"] in ("stage_started", "stage_finished", "stage_failed"):
            stages[event["stage"]] = event["event"].removeprefix("stage_")
    return {
        name: ("running" if running else "interrupted") if how == "started" else how for name, how in stages.items()
    }


def _last_error(events: list[dict[str, Any]], now: float) -> dict[str, Any] | None:
    """The last error, unless its stage has finished since then."""
    for event in reversed(events):
        if event["event"] == "stage_finished" and event.get("stage") not in ("inspect", "rehearse"):
            return None
        if event["event"] == "error":
            return {"age": round(now - event["time"], 1), "problems": event["problems"]}
    return None
