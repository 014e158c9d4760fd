"""Reads and validates the lines of journal.jsonl, events.jsonl (run directory) and attempts.jsonl (batch).

A run directory may come from another machine or another person. A line that a kill cut off, that is not JSON, or whose
fields have other types than the code reads is ignored, as if it had never been written: the work it records is done
again.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calibration.checkpoint.files import MissingFile, read_text

Number = Annotated[int, Field(ge=0, le=1 << 53)]
Block = Annotated[int, Field(ge=0, le=100_000)]
Seconds = Annotated[float, Field(ge=-1e11, le=1e11, allow_inf_nan=False)]
#: The number of an expert as a key; plots have a column for each, hence the limit.
Expert = Annotated[str, Field(pattern=r"^[0-9]{1,4}$")]


class _Line(BaseModel):
    """`time` is seconds since the epoch. Unknown fields are kept and never read; absent fields get their default."""

    model_config = ConfigDict(extra="allow", strict=True)
    time: Seconds = 0.0


class _Saved(BaseModel):
    model_config = ConfigDict(strict=True)
    directory: str
    files: dict[str, str]


class _Result(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    modules: Number = 0
    tokens_per_expert: dict[Expert, Number] = {}
    filled_experts: list[Number] = []
    rounded_to_nearest: list[str] = []
    parity: float = 0.0
    peak_rss: Number = 0


class _Shards(_Line):
    plan: str | None = None
    shards: dict[str, str] = {}
    block: Block | None = None
    activations: _Saved | None = None
    result: _Result | None = None
    lossless: Number = 0
    requantized: Number = 0


class _Boundary(_Line):
    plan: str | None = None
    block: Block
    activations: _Saved | None = None


class _Fingerprint(_Line):
    plan: str | None = None
    blocks: Block | None = None
    parts: dict[str, Any] = {}
    source: dict[str, list[int]] = {}


class _Started(_Line):
    plan: str | None = None
    settings: dict[str, Any] = {}
    source: dict[str, list[int]] = {}


class _Calibrated(_Line):
    data: str
    tokens_per_expert: str
    rows: list[str] = []
    revision: str | None = None


class _Products(_Line):
    device: str
    digest: str


class _StageEvent(_Line):
    stage: str
    seconds: Seconds = 0.0


class _BlockEvent(_Line):
    block: Block
    blocks: Block
    seconds: Seconds = 0.0
    export_seconds: Seconds = 0.0
    peak_memory: Number = 0
    worst_error: float | None = None
    tokens_per_expert: dict[Expert, Number] = {}
    expert_errors: dict[Expert, float] = {}


class _Load(_Line):
    block: Block | None = None


class _Error(_Line):
    exit_code: int | None = None
    problems: Annotated[list[str], Field(min_length=1)]


class _Measured(_Line):
    block: int | None = None
    sample: int | None = None


class _PlanEvent(_Line):
    recipe: str = ""
    versions: dict[str, str] = {}


class _Begun(_Line):
    host: str
    pid: int
    began: str | None


class _Ended(_Line):
    outcome: str
    reason: str = ""
    seconds: Seconds | None = None
    cpu_seconds: Seconds | None = None
    peak_rss: Number | None = None


class _Reason(_Line):
    reason: str


class _Requeued(_Line):
    why: str
    reason: str
    progressed: bool
    seconds: Seconds = 0.0


class _Job(_Line):
    progress: Number


class _Submitted(_Line):
    executor: str
    job: str


#: Kind -> the fields that are read from such a line; from other kinds only `time` is read.
_JOURNAL: dict[str, type[_Line]] = {
    "shards": _Shards, "boundary": _Boundary, "fingerprint": _Fingerprint, "started": _Started, "calibrated": _Calibrated,
    "products": _Products,
}  # fmt: skip
_EVENTS: dict[str, type[_Line]] = {
    "stage_started": _StageEvent, "stage_finished": _StageEvent, "stage_failed": _StageEvent, "block": _BlockEvent,
    "load": _Load, "error": _Error, "plan": _PlanEvent, "measured": _Measured,
}  # fmt: skip
_ATTEMPTS: dict[str, type[_Line]] = {
    "begun": _Begun, "ended": _Ended, "gave_up": _Reason, "requeued": _Requeued, "job": _Job, "submitted": _Submitted,
    "lost": _Reason,
}  # fmt: skip


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal.jsonl, oldest first, their kind under `fact`. Raises SourceError if it cannot be read."""
    return _read(path, "fact", _JOURNAL)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of an events.jsonl, oldest first, their kind under `event`. Raises SourceError if it cannot be read."""
    return _read(path, "event", _EVENTS)


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """The lines of an attempts.jsonl, oldest first, their kind under `fact`. Raises SourceError if it cannot be read."""
    return _read(path, "fact", _ATTEMPTS)


def _read(path: Path, key: str, kinds: dict[str, type[_Line]]) -> list[dict[str, Any]]:
    try:
        text = read_text(path, errors="replace")
    except MissingFile:
        return []
    parsed = filter(None, map(_parsed, text.split("\n")))
    return [line for line in (_typed(line, key, kinds) for line in parsed) if line is not None]


def _parsed(text: str) -> dict[str, Any] | None:
    # Python's own parser: what Python wrote may hold NaN, and names of other bytes than UTF-8.
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _typed(line: dict[str, Any], key: str, kinds: dict[str, type[_Line]]) -> dict[str, Any] | None:
    """The line with defaults for absent fields; None if it is invalid."""
    kind = line.get(key)
    if not isinstance(kind, str):
        return None
    model = kinds.get(kind, _Line)
    try:
        model.model_validate(line)
    except ValidationError:
        return None
    absent = {
        name: field.default
        for name, field in model.model_fields.items()
        if name not in line and not field.is_required()
    }
    return {**line, **copy.deepcopy(absent)}
