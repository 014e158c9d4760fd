"""Why an attempt at a run ended, and what follows: done, failed for good, or worth another try."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import read_json_or_none
from recipes.errors import EnvironmentProblem, Interrupted, VerificationFailed
from workflows.batch.state import Entry

#: How an attempt can end. `transient` is tried again after a while, `space` when the disk has space again, `stopped` by
#: the next call of the batch, `failed` after somebody has changed something.
OUTCOMES = ("done", "transient", "space", "stopped", "failed")

_FULL = (os.strerror(errno.ENOSPC), "free some space", "no inode is left", " inodes free, the run needs ")
#: Problems of exit code 4 that pass by themselves: another run, ranks that were killed (`calibration.runs.torchrun`), no
#: memory for a mapping.
_PASSES = ("another process works on this output", "is gone without a word", "no sign of life", "torchrun's store at",
           os.strerror(errno.ENOMEM))  # fmt: skip
#: `failed to map segment` is the dynamic loader's; it adds `Operation not permitted` if a mount forbids execution.
_MEMORY = re.compile(
    r"OutOfMemoryError|MemoryError|CUDA out of memory|Cannot allocate memory|std::bad_alloc|"
    r"failed to map segment from shared object(?!: Operation not permitted)|can't start new thread"
)
#: torchrun ends with 1 whatever ended its workers, and logs what it was.
_WORKER_KILLED = re.compile(r"Signal (\d+) \((SIG\w+)\) received by PID|exitcode\s*:\s*-(\d+)")
#: Python's exit code if its last lines could not be written.
_FLUSH_FAILED = 120
#: With less free space than this, a run could not write why it failed.
_LOG_BYTES = 1 << 16
_TAIL_BYTES = 1 << 16
_REASON_LENGTH = 300


@dataclass(frozen=True)
class Outcome:
    """`kind` is one of OUTCOMES, `reason` one line for people."""

    kind: str
    reason: str = ""


def judge_attempt(
    entry: Entry, code: int | None, began: float, log: Path, log_from: int, asked_to_stop: bool
) -> Outcome:
    """Why an attempt ended.

    code: the exit code, negative for a signal, None if nobody saw it (an orphan of a killed batch). began: seconds since
    the epoch. log_from: where this attempt's lines begin in `log`. asked_to_stop: whether the batch asked for the end.
    """
    error = _error_event(entry, began)
    tail = _tail(log, log_from)
    full = code in (1, _FLUSH_FAILED) and _is_full(tail, log.parent)
    if entry.output_state().kind == "done" and (full or code in (0, None)):
        return Outcome("done")
    known = error.get("exit_code")
    if known is not None and code in (None, 1):  # torchrun hides the code of its workers
        code = int(known)
    reason = one_line((error.get("problems") or [""])[0] or _last_words(tail))
    if code is None:
        seen = one_line((error.get("problems") or ["ended while no batch was watching"])[0])
        return Outcome("stopped" if asked_to_stop else "transient", seen)
    if code < 0:
        return Outcome("transient", killed_by(-code))
    if code == Interrupted.exit_code:
        if asked_to_stop:
            return Outcome("stopped", "stopped after a finished block")
        return Outcome("transient", "stopped by a signal from outside")
    if code == VerificationFailed.exit_code:
        return _verification(entry, error, reason)
    if code == EnvironmentProblem.exit_code:
        text = "\n".join(error.get("problems") or [tail])
        if any(words in text for words in _FULL):
            return Outcome("space", reason)
        return Outcome("transient" if any(words in text for words in _PASSES) else "failed", reason)
    if full:
        return Outcome("space", reason or f"{log}: {_FULL[0]}")
    if code == 1:
        memory = _MEMORY.search(tail)
        if memory:
            return Outcome("transient", one_line(_line_around(tail, memory.start())))
        worker = _WORKER_KILLED.search(tail)
        if worker:
            return Outcome("transient", killed_by(int(worker[1] or worker[3])))
    return Outcome("failed", reason or f"exit code {code}")


def killed_by(number: int) -> str:
    """`killed by SIGKILL (out of memory?)`."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    whys = {
        int(signal.SIGKILL): " (out of memory?)",
        int(signal.SIGBUS): " (a mapped file was cut off, or its disk failed)",
    }
    return f"killed by {name}{whys.get(number, '')}"


def one_line(text: str) -> str:
    """The first line that is not blank, cut to a length that a table can show."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first if len(first) <= _REASON_LENGTH else first[: _REASON_LENGTH - 3] + "..."


def _verification(entry: Entry, error: dict[str, Any], reason: str) -> Outcome:
    """A FAIL is final, unless the engine itself was killed: then nothing is known about the checkpoint."""
    engine = (read_json_or_none(entry.run.path / "serving.json") or {}).get("exit_code")
    if isinstance(engine, int) and engine < 0:
        return Outcome("transient", f"vLLM {killed_by(-engine)}")
    problems = error.get("problems") or [reason]
    return Outcome("failed", one_line(problems[1] if len(problems) > 1 else problems[0]))


def _error_event(entry: Entry, began: float) -> dict[str, Any]:
    since = [event for event in entry.run.events() if event["event"] == "error" and event["time"] >= began]
    return since[-1] if since else {}


def _is_full(tail: str, place: Path) -> bool:
    """Whether a full disk caused a crash: the log says so, or its own disk is too full to say so."""
    return _FULL[0] in tail or shutil.disk_usage(place).free < _LOG_BYTES


def _tail(log: Path, begin: int) -> str:
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(begin, size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _last_words(tail: str) -> str:
    """The last `error:` line of a log, else its last line."""
    lines = [line for line in tail.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else lines[-1] if lines else ""


def _line_around(text: str, position: int) -> str:
    return text[text.rfind("\n", 0, position) + 1 :].partition("\n")[0]
