"""Who works on the runs of a batch: `--executor NAME` looks a class up in `EXECUTORS`. CONTRIBUTING.md says how to add one."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from recipes.errors import EnvironmentProblem
from workflows.batch.outcome import Outcome
from workflows.batch.state import BatchDirectory, Entry, orphan
from workflows.batch.submission import JobState, Submission, end_batch, set_outstanding
from workflows.batch.summary import rewrite_summary


class Executor(Protocol):
    """Turns runs into jobs. A job works on its run by `workflows.batch.cluster.job.Job`, or in a way that leaves the same
    lines in attempts.jsonl and calls `submission.end_run` at its end."""

    #: Whether `submit` returns after the jobs have ended; otherwise it returns after they are queued.
    waits: bool

    def submit(self, work: Submission) -> None:
        """Submits the runs, none of which is done or has a job, and calls `work.record_job` for each. Raises
        EnvironmentProblem if the cluster is not there or refuses."""

    def states(self, jobs: Collection[str]) -> Mapping[str, JobState]:
        """Job -> state, of the jobs that the cluster knows or has forgotten. Empty if it cannot be asked."""

    def stop(self, batch: BatchDirectory) -> None:
        """Ends the jobs of a batch at once; their blocks stay unfinished."""


def _slurm() -> Executor:
    from workflows.batch.cluster.submit import Slurm

    return Slurm()


def _local() -> Executor:
    from workflows.batch.cluster.submit import Local

    return Local()


#: Name on the command line -> how to make the executor; its libraries are imported only then.
EXECUTORS: dict[str, Callable[[], Executor]] = {"local": _local, "slurm": _slurm}


@dataclass(frozen=True)
class Jobs:
    """The jobs of a batch, each in words for people: `under_way` run -> state of its job or process, `ended` run -> how its
    last job ended."""

    under_way: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)


def make_executor(name: str) -> Executor:
    """The executor of that name. Raises EnvironmentProblem if the library that it needs is not installed."""
    try:
        return EXECUTORS[name]()
    except ImportError as error:
        raise EnvironmentProblem(
            f"--executor: {error.name} is not installed here; pip install 'nvfp4-workflows[slurm]', or leave --executor out"
        ) from None


def find_jobs(batch: BatchDirectory, entries: Sequence[Entry]) -> Jobs:
    """Asks every executor for the last jobs of its runs, and looks for their processes on this machine."""
    found = Jobs()
    submitted: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in entries:
        attempts = batch.attempts(entry.name)
        last = next((attempt for attempt in reversed(attempts) if attempt["fact"] == "submitted"), None)
        if last is not None and last["executor"] in EXECUTORS:
            submitted[last["executor"]][last["job"]] = entry.name
        if left := orphan(attempts):
            found.under_way[entry.name] = f"still running since the last call (pid {left['pid']})"
    for executor, jobs in submitted.items():
        for job, state in make_executor(executor).states(jobs).items():
            if jobs[job] in found.under_way:
                continue
            if state.ended:
                found.ended[jobs[job]] = f"job {job} {state.words}"
            else:
                found.under_way[jobs[job]] = f"{job} {state.words}"
    return found


def submit_batch(executor: Executor, work: Submission) -> None:
    """Hands the executor those of the runs that have no problems, are not done and have no job. Raises EnvironmentProblem if
    the executor cannot take them, or others could write into the batch's directory."""
    batch, hooks = work.batch, work.hooks
    _require_private(batch)
    under_way = find_jobs(batch, work.entries).under_way
    pending, refused = [], []
    for entry in work.entries:
        if entry.problems:
            batch.record(entry.name, "gave_up", reason=entry.problems[0])
            refused.append(entry)
        elif entry.output_state().kind == "done":
            hooks.say(f"{entry.name}: done and verified before", "info")
        elif entry.name in under_way:
            hooks.say(f"{entry.name}: {under_way[entry.name]}", "info")
        else:
            batch.record(entry.name, "queued")
            pending.append(entry)
    set_outstanding(batch.path, [entry.name for entry in pending], under_way)
    rewrite_summary(batch, hooks.say)
    for entry in refused:
        hooks.notify("failure", entry.name, entry.problems[0])
    if not pending and not under_way:
        end_batch(batch, hooks)
    executor.submit(replace(work, entries=pending))


def read_outcomes(batch: BatchDirectory, entries: Sequence[Entry]) -> dict[str, Outcome]:
    """What became of the runs, as their jobs wrote it down."""
    found = {}
    for entry in entries:
        last: dict[str, Any] = next(reversed(batch.attempts(entry.name)), {})
        if entry.problems or last.get("fact") == "gave_up":
            found[entry.name] = Outcome("failed", last.get("reason") or entry.problems[0])
        elif entry.output_state().kind == "done":
            found[entry.name] = Outcome("done")
        else:
            found[entry.name] = Outcome("stopped", last.get("reason", ""))
    return found


def _require_private(batch: BatchDirectory) -> None:
    """Raises EnvironmentProblem if others could write into the batch's directory: a job unpickles what lies in its jobs/."""
    for path in (path for path in (batch.path, batch.path / "jobs") if path.exists()):
        found = path.stat()
        if path.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            raise EnvironmentProblem(
                f"{path}: belongs to another user, is writable by everybody or is a link, and a job runs what lies in it; "
                "name another --directory"
            )
