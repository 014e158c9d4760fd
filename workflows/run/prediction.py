"""Measures what each stage takes, and compares it with the prediction (`calibration.forecast.predict`)."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calibration.runs.memory import PeakMemory
from recipes.units import duration, size

FILE = "estimate.json"


@contextmanager
def measured(facts: dict[str, dict[str, Any]], stage: str) -> Iterator[None]:
    """Adds to `facts` what a stage took: seconds, CPU seconds (including children), bytes read from disk (not from the
    page cache) and bytes written, peak anonymous memory."""
    began, cpu, moved = time.monotonic(), _cpu(), _moved()
    with PeakMemory() as memory:
        try:
            yield
        finally:
            now = _moved()
            facts[stage] = {
                "seconds": round(time.monotonic() - began, 3),
                "cpu_seconds": round(_cpu() - cpu, 3),
                "bytes_read": now[0] - moved[0],
                "bytes_written": now[1] - moved[1],
                "peak_memory": memory.take(),
            }


def compare(predicted: dict[str, Any], facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Prediction and measurement of every stage that has both, for `estimate.json`."""
    both = {
        name: {"predicted": entry, "fact": facts[name]} for name, entry in predicted["stages"].items() if name in facts
    }
    return {"from": predicted["from"], "notes": predicted["notes"], "stages": both}


def render(estimate: dict[str, Any]) -> list[str]:
    """Lines for people: per stage the prediction, and the measurement if there is one."""
    lines = []
    for name, entry in estimate["stages"].items():
        predicted, fact = entry.get("predicted", entry), entry.get("fact")
        least = "at least " if predicted.get("at_least") else ""
        text = f"{name}: {least}{duration(predicted['seconds'])}, {_bytes(predicted)}"
        terms = ", ".join(
            f"{term} {duration(spent[0])}" for term, spent in predicted["terms"].items() if spent[0] >= 0.05
        )
        if fact is None:
            lines.append(f"predicted {text}" + (f" ({terms})" if terms else ""))
        else:
            lines.append(f"{name}: {duration(fact['seconds'])}, {_bytes(fact)}; predicted {text.partition(': ')[2]}")
    return lines


def _bytes(stage: dict[str, Any]) -> str:
    peak = f", peak memory {size(stage['peak_memory'])}" if stage["peak_memory"] is not None else ""
    return f"{size(stage['bytes_read'])} read, {size(stage['bytes_written'])} written{peak}"


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _moved() -> tuple[int, int]:
    """Bytes that this process has read from disk, and bytes that it has written."""
    try:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0, 0
    return int(lines["read_bytes"]), int(lines["wchar"])
