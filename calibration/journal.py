"""The run directory `<output>.run/`: what a run has done (journal), what it is doing (events), and its by-products."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from recipes.errors import EnvironmentProblem


class RunDirectory:
    """`<output>.run/` of one output: plan.json, recipe.yaml, journal.jsonl (durable facts), events.jsonl (progress),
    logs/, model_config/, activations/ and verify.json. One process at a time holds its lock."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + ".run")
        self._lock: IO[str] | None = None

    def open(self) -> RunDirectory:
        """Creates the directory and takes its lock. Raises EnvironmentProblem when it cannot be written or another
        process works on the same output."""
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentProblem(
                f"{self.path}: another process works on this output; wait for it, or name another output"
            ) from None
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.path}: cannot be written: {error.strerror}; choose another output"
            ) from None
        return self

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def event(self, name: str, /, **facts: Any) -> dict[str, Any]:
        """Appends one line to events.jsonl and returns it. `time` is seconds since the epoch."""
        line = {"time": round(time.time(), 3), "event": name, **facts}
        with (self.path / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def record(self, name: str, /, **facts: Any) -> None:
        """Appends one durable fact to journal.jsonl: on disk before this returns."""
        with (self.path / "journal.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "fact": name, **facts}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def facts(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The journal's lines, oldest first; a line cut off by a kill is left out."""
        facts = []
        path = self.path / "journal.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                fact = json.loads(line)
            except ValueError:
                continue
            if kind is None or fact.get("fact") == kind:
                facts.append(fact)
        return facts

    def restart(self) -> None:
        """Forgets the journal: the run begins anew."""
        (self.path / "journal.jsonl").unlink(missing_ok=True)
