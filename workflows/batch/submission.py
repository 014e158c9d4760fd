"""Runs as jobs: what an executor is given, what it says of its jobs, and the end of the batch with the last of them."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from calibration.checkpoint.files import no_link
from recipes.matrix import Resources
from workflows.batch.attempt import Slot
from workflows.batch.hooks import Hooks
from workflows.batch.queue import Rules
from workflows.batch.state import BatchDirectory, Entry
from workflows.batch.summary import rewrite_summary, summarize


@dataclass(frozen=True)
class Submission:
    """What an executor is given: its own name on the command line, the runs to submit in their order, and what they need.
    `resources`: by the name of a run; `should_stop`: whether the operator asked for the end."""

    executor: str
    batch: BatchDirectory
    entries: Sequence[Entry]
    resources: Mapping[str, Resources]
    rules: Rules
    slots: Sequence[Slot]
    hooks: Hooks
    should_stop: Callable[[], bool] = lambda: False

    def record_job(self, entry: Entry, job: str) -> None:
        """Notes that a run was submitted, and the number of its job."""
        self.batch.record(entry.name, "submitted", executor=self.executor, job=job)
        self.hooks.say(f"{entry.name}: submitted as job {job}", "info")


@dataclass(frozen=True)
class JobState:
    """What a cluster says of a job. `words` are lower case: `pending` before it begins, `completed` if it ended by itself, and
    `... by now` at the end if the cluster has forgotten it; `ended`: it does not run any more and is not in the queue."""

    words: str
    ended: bool


def end_run(batch: BatchDirectory, name: str, hooks: Hooks) -> None:
    """Says that nothing works on a run until the next submission. The batch ends with the last such run."""
    if remove_outstanding(batch.path, name):
        end_batch(batch, hooks)


def end_batch(batch: BatchDirectory, hooks: Hooks) -> None:
    """Writes the summary and reports the end of the batch to the user's hooks."""
    rewrite_summary(batch, hooks.say)
    hooks.track(summarize(batch))
    hooks.notify("end")


def set_outstanding(batch: Path, pending: Sequence[str], under_way: Iterable[str]) -> None:
    """Notes the runs that have still to end: those `pending`, and of those `under_way` the ones that have not been removed
    since they were noted. The note is the file `expected` of the batch's directory."""
    with _locked_note(batch) as file:
        known = set(_read_names(file))
        _write_names(file, [*(name for name in under_way if name in known), *pending])


def remove_outstanding(batch: Path, name: str) -> bool:
    """Takes a run off that note. True if it was the last one: once, whichever process asks."""
    with _locked_note(batch) as file:
        before = _read_names(file)
        after = [other for other in before if other != name]
        _write_names(file, after)
    return name in before and not after


def _read_names(file: IO[str]) -> list[str]:
    file.seek(0)
    return file.read().splitlines()


def _write_names(file: IO[str], names: Sequence[str]) -> None:
    file.truncate(0)
    file.write("\n".join(names))


@contextmanager
def _locked_note(batch: Path) -> Iterator[IO[str]]:
    with open(batch / "expected", "a+", opener=no_link) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
