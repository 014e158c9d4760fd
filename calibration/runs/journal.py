"""The run directory `<output>.run/`: the journal (what is finished), the events (what is happening), and
by-products."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from calibration.checkpoint.files import fsync_directory, no_link, read_json_object
from calibration.runs.lines import read_events, read_journal
from recipes.errors import EnvironmentProblem, SourceError
from recipes.places import run_directory


class RunDirectory:
    """`<output>.run/` of one output: plan.json, recipe.yaml, journal.jsonl (durable facts), events.jsonl (progress),
    logs/, skeleton/, activations/ and verify.json. One process at a time holds its lock, even if two spell the output's
    path differently."""

    def __init__(self, output: Path) -> None:
        self.path = run_directory(output)
        self._lock: IO[str] | None = None

    def open(self) -> RunDirectory:
        """Creates the directory and takes its lock. Raises EnvironmentProblem if it cannot be written or another
        process works on the same output. Does nothing if this object holds the lock."""
        if self._lock is not None:
            return self
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            self._refuse_links()
            lock = open(self.path / "lock", "a", opener=no_link)  # noqa: SIM115 (held until `close`)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise
            self._lock = lock
            self._lock.truncate(0)
            self._lock.write(
                json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "began": process_began(os.getpid())})
            )
            self._lock.flush()
        except BlockingIOError:
            raise EnvironmentProblem(
                f"{self.path}: another process works on this output; wait for it, or name another output"
            ) from None
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.path}: cannot be written: {error.strerror}; choose another output"
            ) from None
        return self

    def _refuse_links(self) -> None:
        """Raises EnvironmentProblem if the run directory, which may come from elsewhere, contains a link: a run would
        overwrite the link's target or remove it with old activations."""
        with os.scandir(self.path) as entries:
            links = sorted(entry.name for entry in entries if entry.is_symlink())
        if links:
            raise EnvironmentProblem(
                f"{self.path}: {', '.join(links[:3])}: a run directory holds no links, because a run would write to "
                "their targets; remove them (offload.directory puts activations elsewhere)"
            )

    def close(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def holder(self) -> str | None:
        """The process that works on this output now, as `pid N` or `host H`; None if there is none. Does not touch the
        lock."""
        try:
            lock = read_json_object(self.path / "lock")
        except SourceError:
            return None
        if not isinstance(lock.get("host"), str) or not isinstance(lock.get("pid"), int):
            return None
        if lock["host"] != socket.gethostname():
            return f"host {lock['host']} (if it still lives)"
        return f"pid {lock['pid']}" if process_began(lock["pid"]) == lock.get("began") is not None else None

    def free(self) -> bool:
        """Whether the lock can be taken now. `holder` alone does not know if a process on another host is still
        alive."""
        with contextlib.suppress(OSError), open(self.path / "lock", "a", opener=no_link) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def event(self, name: str, /, **facts: Any) -> dict[str, Any]:
        """Appends one line to events.jsonl and returns it. `time` is seconds since the epoch. On a full disk the line
        is lost: events only inform, the journal alone must be durable."""
        line = {"time": round(time.time(), 3), "event": name, **facts}
        with contextlib.suppress(OSError):
            append_line(self.path / "events.jsonl", line, durable=False)
        return line

    def events(self) -> list[dict[str, Any]]:
        """The valid lines of events.jsonl (`calibration.runs.lines`), oldest first."""
        return read_events(self.path / "events.jsonl")

    def record(self, name: str, /, **facts: Any) -> None:
        """Appends one line to journal.jsonl, durable before this returns. Raises EnvironmentProblem if it cannot be
        written."""
        path = self.path / "journal.jsonl"
        try:
            append_line(path, {"time": round(time.time(), 3), "fact": name, **facts}, durable=True)
        except OSError as error:
            raise EnvironmentProblem(
                f"{path}: cannot be written: {error.strerror}; free some space and run the same command again"
            ) from None

    def facts(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The journal's valid lines (`calibration.runs.lines`), oldest first; only those of `kind` if it is given."""
        return [fact for fact in read_journal(self.path / "journal.jsonl") if kind is None or fact["fact"] == kind]

    def restart(self, name: str | None = None, /, **facts: Any) -> None:
        """Replaces the journal atomically by an empty one, or by one with the single fact `name` if it is given."""
        path = self.path / "journal.jsonl"
        if name is None:
            path.unlink(missing_ok=True)
            return
        partial = path.with_name("journal.jsonl.partial")
        try:
            partial.unlink(missing_ok=True)
            append_line(partial, {"time": round(time.time(), 3), "fact": name, **facts}, durable=True)
            partial.replace(path)
            fsync_directory(self.path)
        except OSError as error:
            raise EnvironmentProblem(f"{path}: cannot be written: {error.strerror}; free some space") from None


def append_line(path: Path, line: dict[str, Any], durable: bool) -> None:
    """Appends one whole JSON line or nothing; with `durable` it is on disk before this returns. Raises OSError."""
    new = not path.exists()
    # Opened for reading too, to see whether the last line is complete: a line that a kill cut off must not absorb this
    # one.
    with open(path, "a+b", buffering=0, opener=no_link) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        text = (b"\n" if size and file.read(1) != b"\n" else b"") + json.dumps(line).encode() + b"\n"
        written = file.write(text)
        if written != len(text):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            os.fsync(file.fileno())
    if durable and new:
        fsync_directory(path.parent)


def process_began(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks, because a pid alone may be reused. None if there is
    no such process or it is a zombie."""
    with contextlib.suppress(OSError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    return None
