"""A run as a cluster's job: a queue of one run that stops in time, has itself requeued, and resumes after the last finished
block. With several nodes the first one leads; the others run torchrun's agents."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import UncompletedJobError
from submitit.helpers import Checkpointable

from recipes.errors import printable
from recipes.matrix import Resources
from recipes.streams import guard_streams
from recipes.units import clock
from workflows.batch.attempt import Child, Slot, has_work_for_ranks, torchrun
from workflows.batch.cluster.signals import OutOfTime, Signals, killed_marker, may_requeue
from workflows.batch.hooks import Hooks
from workflows.batch.queue import Queue, Rules
from workflows.batch.state import BatchDirectory, Entry
from workflows.batch.submission import end_run
from workflows.batch.summary import rewrite_summary

_POLL_SECONDS = 0.5
#: How long a further node waits for the first to say how a run failed, and then to act on its loss.
_VERDICT_SECONDS = 30.0


class LostRanks(KeyboardInterrupt):
    """The ranks of a further node are gone: those of the first one would wait for them."""


class Job(Checkpointable):
    """One run as a cluster's job. submitit pickles it, and calls it again in a requeued job."""

    def __init__(
        self, directory: Path, name: str, rules: Rules, resources: Resources, slot: Slot, hooks: Hooks
    ) -> None:
        self.directory, self.name, self.rules = directory.absolute(), name, rules
        self.resources, self.slot, self.cwd = resources, slot, Path.cwd()
        self.notify, self.mlflow = hooks.given, hooks.store

    def __call__(self) -> dict[str, str]:
        """Works until the run is done, failed or stopped; returns its outcome. Ends the process if it is requeued."""
        guard_streams()
        os.chdir(self.cwd)
        environment = submitit.JobEnvironment()
        batch = BatchDirectory(self.directory)
        entry = next(entry for entry in batch.load()[0] if entry.name == self.name)
        signals = Signals(batch, environment, self.resources.grace_seconds)
        launcher = torchrun(
            self.resources.gpus_per_node or len(self.slot.gpus or ()),
            list(environment.hostnames) if environment.num_nodes > 1 else [],
            environment.global_rank, environment.raw_job_id,
        )  # fmt: skip
        if environment.global_rank > 0:
            return _run_further_node(batch, entry, self.slot, launcher)
        hooks = Hooks(batch.path, self.notify, self.mlflow, _say)
        try:
            return _FirstNode(self, batch, entry, environment, signals, hooks).work(launcher)
        finally:
            if not isinstance(sys.exception(), SystemExit):  # that one is a requeue
                end_run(batch, entry.name, hooks)


@dataclass
class _FirstNode:
    """The node that works through the queue of one run, and decides whether its job is requeued."""

    job: Job
    batch: BatchDirectory
    entry: Entry
    environment: submitit.JobEnvironment
    signals: Signals
    hooks: Hooks

    def work(self, launcher: Sequence[str]) -> dict[str, str]:
        """`Job.__call__`; `launcher`: torchrun's arguments, none for one process."""
        taken = self.batch.claim(Path(self.entry.output))
        if taken:
            return self.give_up(taken)
        _record_loss(self.batch, self.entry, self.environment)
        if self.has_used_its_tries():
            return self.give_up_for_good()
        before, several = self.entry.progress(), self.environment.num_nodes > 1
        self.batch.record(self.entry.name, "job", job=self.environment.job_id, progress=before)

        def should_stop() -> bool:
            if several and self.lost_ranks():
                queue.patience = 0.0  # its ranks would answer only after they had waited for the lost ones
                raise LostRanks
            return self.signals.should_stop()

        queue = Queue(
            self.batch, [self.entry], [self.job.slot], replace(self.job.rules, once=several), _say,
            launcher=lambda slot: launcher,
            should_stop=should_stop,
            changed=lambda: rewrite_summary(self.batch, _say),
            failed=lambda entry, reason: self.hooks.notify("failure", entry.name, reason),
            patience=self.signals.requeue_seconds / 2,
        )  # fmt: skip
        with suppress(OutOfTime, LostRanks):
            queue.work()
        outcome, signals, lost = queue.outcomes[self.entry.name], self.signals, self.lost_ranks()
        why = "time" if signals.timed else "preempted" if signals.by_cluster and not lost else "loss" if several else ""
        if outcome.kind == "stopped" and why and not signals.by_operator() and may_requeue(self.environment):
            return self.requeue(why, lost or outcome.reason, self.entry.progress() > before)
        self.batch.close()
        return {"outcome": outcome.kind, "reason": outcome.reason}

    def requeue(self, why: str, reason: str, progressed: bool) -> dict[str, str]:
        """Ends the process and has the job started again; returns only if the run is given up instead."""
        signals, resources = self.signals, self.job.resources
        if why == "time" and signals.late:
            reason = (
                "the time limit came before the block was finished, so the block starts over: give more "
                f"grace_seconds than {resources.grace_seconds}"
            )
        self.batch.record(
            self.entry.name, "requeued", why=why, reason=reason, progressed=progressed, signalled=signals.signalled,
            seconds=round(time.monotonic() - signals.began, 1),
        )  # fmt: skip
        if self.has_used_its_tries():
            return self.give_up_for_good()
        rewrite_summary(self.batch, _say)
        self.batch.close()
        try:
            signals.requeue()
        except UncompletedJobError:
            return self.give_up(f"stopped at its time limit {resources.requeues} times; run the same command to resume")

    def lost_ranks(self) -> str:
        """What a further node has said of ranks that it lost since this job began; empty if it has said nothing."""
        for attempt in reversed(self.batch.attempts(self.entry.name)):
            if attempt["fact"] in ("job", "lost"):
                return str(attempt.get("reason", ""))
        return ""

    def has_used_its_tries(self) -> bool:
        """Whether as many jobs in a row as the rules allow finished nothing."""
        return count_jobs_without_progress(self.batch.attempts(self.entry.name)) >= self.job.rules.tries

    def give_up_for_good(self) -> dict[str, str]:
        """Gives the run up with the limits that its jobs met, and the remedy."""
        return self.give_up(_explain_limits(self.batch.attempts(self.entry.name), self.entry, self.job.resources))

    def give_up(self, reason: str) -> dict[str, str]:
        """Records that the run failed and calls the user's hooks; the job's outcome."""
        self.batch.record(self.entry.name, "gave_up", reason=reason)
        _say(f"{self.entry.name}: failed: {reason}", "error")
        rewrite_summary(self.batch, _say)
        self.hooks.notify("failure", self.entry.name, reason)
        return {"outcome": "failed", "reason": reason}


def count_jobs_without_progress(attempts: Sequence[Mapping[str, Any]]) -> int:
    """How many jobs in a row, up to the last, the time limit or a loss ended before they had finished anything."""
    count = 0
    for attempt in reversed(attempts):
        if attempt["fact"] == "submitted" or (attempt["fact"] == "requeued" and attempt["progressed"]):
            break
        count += attempt["fact"] == "requeued" and attempt["why"] != "preempted"
    return count


def _explain_limits(attempts: Sequence[Mapping[str, Any]], entry: Entry, resources: Resources) -> str:
    count = count_jobs_without_progress(attempts)
    last = next(attempt for attempt in reversed(attempts) if attempt["fact"] == "requeued")
    if last["why"] != "time":
        return f"{last['reason']} ({count} jobs in a row finished nothing)"
    blocks = [event for event in entry.run.events() if event["event"] == "block"]
    longest = max((block["seconds"] + block["export_seconds"] for block in blocks), default=None)
    known = "no block is finished yet" if longest is None else f"the longest finished block took {clock(longest)}"
    return (
        f"the time limit ended {count} jobs in a row before they had finished a block: limit "
        f"{clock(3600 * resources.hours)}, the last one was stopped after {clock(last['seconds'])}, {known}; give each job "
        f"more time than start and block take, for example --resource hours={2 * resources.hours:.3g}, and more "
        "grace_seconds than a block takes"
    )


def _record_loss(batch: BatchDirectory, entry: Entry, environment: submitit.JobEnvironment) -> None:
    """Puts into the attempts that the job before this one was killed, if its script said so."""
    marker = killed_marker(environment.paths.folder, environment.raw_job_id)
    if not marker.exists():
        return
    marker.unlink()
    last = next((a for a in reversed(batch.attempts(entry.name)) if a["fact"] in ("job", "requeued")), None)
    if last is not None and last["fact"] == "job":
        batch.record(
            entry.name, "requeued", why="loss", reason="a process of the job was killed (out of memory?)",
            progressed=entry.progress() > last["progress"],
        )  # fmt: skip


def _run_further_node(batch: BatchDirectory, entry: Entry, slot: Slot, launcher: Sequence[str]) -> dict[str, str]:
    """A further node of a run: torchrun's agent, started once. The first node decides whether and when to stop; what its run
    says to all ranks ends this one too. If the agent ends and the first node does not notice, this one says so in the
    attempts; if that changes nothing it raises RuntimeError, which ends the job's step on all nodes."""
    followed = {"outcome": "followed", "reason": ""}
    if not has_work_for_ranks(entry):
        return followed
    known = len(batch.attempts(entry.name))

    def has_ended() -> bool:
        attempts = batch.attempts(entry.name)
        return attempts[-1]["fact"] == "gave_up" or any(a["fact"] == "ended" for a in attempts[known:])

    child = Child.start(batch, entry, slot, False, launcher, first_node=False)
    ended, code, since = False, None, 0.0
    while not ended:
        time.sleep(_POLL_SECONDS)
        ended, code = child.poll()
        since = since or (time.monotonic() if has_ended() else 0.0)
        if not ended and since and time.monotonic() - since > _VERDICT_SECONDS:
            child.kill()
    if code and not _within(_VERDICT_SECONDS, has_ended):
        loss = f"torchrun's agent on {socket.gethostname()} ended with {code}, and the first node went on; its log is {child.log}"
        batch.record(entry.name, "lost", reason=loss)
        if not _within(_VERDICT_SECONDS, has_ended):
            raise RuntimeError(loss)
    return followed


def _within(seconds: float, happened: Callable[[], bool]) -> bool:
    """Waits until it has happened, at most so long; whether it has."""
    until = time.monotonic() + seconds
    while not (found := happened()) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return found


def _say(text: str, level: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {level}: {printable(text)}", flush=True)
