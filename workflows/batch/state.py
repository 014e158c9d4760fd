"""The directory of a batch: its runs, their attempts, their outputs. What it says is all that a batch remembers.

<batch>/batch.json             the runs as the preflight found them
<batch>/lock                   held while a batch process works
<batch>/runs/<name>/           recipe.yaml (frozen), log.txt, attempts.jsonl
<batch>/summary.json .html     see `summary`
<batch>/expected               the runs that an executor has still to end, see `submission`
<batch>/jobs/                  submitit's own files, with --executor
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from pydantic import TypeAdapter, ValidationError

from calibration.checkpoint.files import no_link, read_json_object, write_json
from calibration.runs.journal import RunDirectory, append_line, process_began
from calibration.runs.lines import read_attempts
from recipes.errors import EnvironmentProblem, SourceError
from recipes.loader import load_recipe, recipe_digest
from recipes.schema import Recipe
from workflows.run.budget import settled
from workflows.run.output_state import OutputState, read_output_state

#: Facts of a run's journal that mean progress. Not `verified`: an engine that is killed leaves one each time.
_PROGRESS = ("shards", "boundary", "calibrated", "converted", "exported")


@dataclass(frozen=True)
class Entry:
    """One run of a batch as the preflight found it. `given`: as the user spelled it; `recipe`: the frozen copy. Bytes and files
    are the plan's; a run with `problems` is not started; `seconds` is predicted, None if it is not."""

    name: str
    given: str
    recipe: str
    output: str
    problems: list[str] = field(default_factory=list)
    method: str = ""
    recipe_digest: str = ""
    plan_digest: str = ""
    output_bytes: int = 0
    source_bytes: int = 0
    activation_bytes: int = 0
    files: int = 0
    activation_files: int = 0
    scratch: str | None = None
    parameters: int = 0
    bits_per_parameter: float | None = None
    seconds: float | None = None
    #: What a size budget asks for (`workflows.run.budget.asked`): the run finds its plan itself. Empty without one.
    budget: str = ""

    @property
    def run(self) -> RunDirectory:
        """The run directory beside the output."""
        return RunDirectory(Path(self.output))

    def output_state(self) -> OutputState:
        """What the output holds, seen from the frozen recipe; with a budget, from what the run chose."""
        if not self.budget:
            return read_output_state(
                Path(self.output),
                self.run,
                self.plan_digest,
                self.recipe_digest,
                lambda: load_recipe(Path(self.recipe)),
            )
        chosen = self.chosen()
        if chosen is None:
            return read_output_state(Path(self.output), self.run, "", "", lambda: load_recipe(Path(self.recipe)))
        plan, recipe = chosen
        return read_output_state(Path(self.output), self.run, plan, recipe_digest(recipe), lambda: recipe)

    def chosen(self) -> tuple[str, Recipe] | None:
        """The plan's digest and the recipe that the run chose for its budget; None before that, or without a budget."""
        return settled(self.run, self.budget, load_recipe(Path(self.recipe))) if self.budget else None

    def progress(self) -> int:
        """A count that grows whenever the run finishes something for the first time."""
        facts = [fact for fact in self.run.facts() if fact.get("fact") in _PROGRESS]
        events = self.run.events() if self.budget else ()
        measured = {(event.get("block"), event.get("sample")) for event in events if event["event"] == "measured"}
        return len({(fact["fact"], fact.get("block"), str(fact.get("shards"))) for fact in facts}) + len(measured)


class BatchDirectory:
    """The directory of a batch. `open` takes its lock, `claim` that of an output. If `dry`, both only check whether the lock
    could be taken, and nothing is created but a temporary directory."""

    def __init__(self, path: Path, dry: bool = False) -> None:
        self.path = path
        self._locks: list[IO[str]] = []
        self._temporary = TemporaryDirectory(prefix="batch-") if dry else None

    def open(self) -> None:
        """Creates the directory and takes its lock. Raises EnvironmentProblem if another batch process has it."""
        try:
            if self._temporary is None:
                (self.path / "runs").mkdir(parents=True, exist_ok=True)
            holder = self._take(self.path / "lock")
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.path}: cannot be written: {error.strerror}; name another --directory"
            ) from None
        if holder is not None:
            raise EnvironmentProblem(
                f"{self.path}: this batch is already at work ({holder}); look at it with --status, or name another "
                "--directory"
            )

    def claim(self, output: Path) -> str | None:
        """Takes an output for this batch until `close`, or says which batch has it."""
        directory = RunDirectory(output).path
        if self._temporary is None:
            directory.mkdir(parents=True, exist_ok=True)
        holder = self._take(directory / "batch.lock")
        return (
            None if holder is None else f"{output}: belongs to the batch {holder}; wait for it, or name another output"
        )

    def close(self) -> None:
        """Releases every lock."""
        self._release_locks(0)
        if self._temporary is not None:
            self._temporary.cleanup()

    def release_claims(self) -> None:
        """Releases the claims only: the jobs of a cluster take them."""
        self._release_locks(1)

    def _release_locks(self, keep: int) -> None:
        for file in self._locks[keep:]:
            with contextlib.suppress(OSError):
                file.truncate(0)
            file.close()
        del self._locks[keep:]

    def runs(self, name: str) -> Path:
        """The batch's own directory of one run, with recipe.yaml, log.txt and attempts.jsonl."""
        return self.path / "runs" / name

    def frozen(self, name: str) -> Path:
        """Where the preflight writes the recipe of a run."""
        return (self.runs(name) if self._temporary is None else Path(self._temporary.name) / name) / "recipe.yaml"

    def record(self, name: str, fact: str, /, **facts: Any) -> None:
        """Appends a line to the attempts of a run. A full disk loses it; the run's own journal then says what happened."""
        line = {"time": round(time.time(), 3), "fact": fact, **facts}
        with contextlib.suppress(OSError):
            append_line(self.runs(name) / "attempts.jsonl", line, durable=True)

    def attempts(self, name: str) -> list[dict[str, Any]]:
        """The lines of `record`, oldest first."""
        return read_attempts(self.runs(name) / "attempts.jsonl")

    def save(self, entries: Iterable[Entry], **facts: Any) -> None:
        """Writes batch.json."""
        write_json(self.path / "batch.json", {**facts, "runs": [asdict(entry) for entry in entries]})

    def load(self) -> tuple[list[Entry], dict[str, Any]]:
        """The runs and the other facts of batch.json. Raises EnvironmentProblem if there is none or it is damaged."""
        where, remedy = self.path / "batch.json", "the file is damaged or of another version: name another --directory"
        if not os.path.lexists(where):
            raise EnvironmentProblem(f"{self.path}: no batch was started there; name its --directory")
        try:
            facts = read_json_object(where)
        except SourceError as error:
            raise EnvironmentProblem(f"{error}; {remedy}") from None
        try:
            entries = TypeAdapter(list[Entry]).validate_json(json.dumps(facts.pop("runs", None)), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, ("runs", *first["loc"])))
            raise EnvironmentProblem(f"{where}: {place}: {first['msg']}; {remedy}") from None
        for entry in entries:
            if entry.name in ("", ".", "..") or "/" in entry.name or "\0" in entry.name:
                raise EnvironmentProblem(f"{where}: runs: {entry.name!r:.80} is no name of a run; {remedy}")
            if "\0" in entry.output or (entry.output and not Path(entry.output).name):
                raise EnvironmentProblem(f"{where}: runs: {entry.output!r:.80} is no output; {remedy}")
        return entries, facts

    def _take(self, path: Path) -> str | None:
        """Locks a file, or says who has it. In a dry batch only files that exist are locked."""
        if self._temporary is None or path.exists():
            return self._lock(path)
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)} ({there})")
        return None

    def _lock(self, path: Path) -> str | None:
        file = open(path, "a+", opener=no_link)  # noqa: SIM115 (held until `close`)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            return holder or "unknown"
        file.truncate(0)
        file.write(f"{self.path.absolute()}, pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._locks.append(file)
        return None


def alive(attempt: dict[str, Any]) -> bool:
    """Whether the process of a `begun` attempt still lives on this machine."""
    if attempt.get("fact") != "begun" or attempt.get("host") != socket.gethostname():
        return False
    began = process_began(int(attempt["pid"]))
    return began is not None and began == str(attempt["began"])


def orphan(attempts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last attempt if its process lives: only one whose batch is gone still does when a batch starts."""
    return attempts[-1] if attempts and alive(attempts[-1]) else None
