"""A run as a cluster's job: it works like a queue of one run, ends in time, has itself requeued, and goes on at the last
finished block. With several nodes the first one leads, and the others keep torchrun's agents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import submitit
from submitit.core.utils import UncompletedJobError
from submitit.helpers import Checkpointable

from calibration.checkpoint.files import read_text
from recipes.errors import SourceError, WorkflowError, printable
from recipes.matrix import Resources
from recipes.streams import guard_streams
from workflows.batch.attempt import Child, Slot, shared_out, torchrun
from workflows.batch.hooks import Hooks, leave
from workflows.batch.queue import Queue, Rules
from workflows.batch.state import BatchDirectory, Entry
from workflows.batch.summary import summarize, write_summary
from workflows.interrupts import hears_hangup
from workflows.progress import clock

#: A file in the batch's directory that ends every job behind its block: `block`, or at once: `now`.
STOP = "stop"
_POLL_SECONDS = 0.5
#: From Slurm's SIGTERM, which usually reaches the run as well, to our own.
_ECHO_SECONDS = 1.0
#: Slurm sends its signal up to a minute early; the job uses that minute.
_EARLY_SECONDS = 90.0
#: Before the time limit a block that is not finished is given up, so that the job can still be requeued.
_LEAVE_SECONDS = 60.0
#: What a further node waits for the first to say how a run failed.
_VERDICT_SECONDS = 30.0


class Job(Checkpointable):
    """One run as a cluster's job. submitit pickles it, and calls it again in a requeued job."""

    def __init__(
        self, directory: Path, name: str, rules: Rules, resources: Resources, slot: Slot, hooks: Hooks
    ) -> None:
        self.directory, self.name, self.rules = directory.absolute(), name, rules
        self.resources, self.slot, self.cwd = resources, slot, Path.cwd()
        self.notify, self.mlflow = hooks.given, hooks.store

    def __call__(self) -> dict[str, str]:
        """Works until the run is done, failed or stopped; returns its outcome. Ends the process where it is requeued."""
        guard_streams()
        os.chdir(self.cwd)
        environment = submitit.JobEnvironment()
        batch = BatchDirectory(self.directory)
        entry = next(entry for entry in batch.load()[0] if entry.name == self.name)
        signals = _Signals(batch, environment, self.resources.grace_seconds)
        several = environment.num_nodes > 1
        launcher = torchrun(
            self.resources.gpus_per_node or len(self.slot.gpus or ()), list(environment.hostnames) if several else [],
            environment.global_rank, environment.raw_job_id,
        )  # fmt: skip
        if environment.global_rank > 0:
            return _follow(batch, entry, self.slot, launcher)
        hooks = Hooks(batch.path, self.notify, self.mlflow, _say)
        try:
            return self._work(batch, entry, environment, signals, launcher, hooks)
        finally:
            if not isinstance(sys.exception(), SystemExit):  # that one is a requeue
                over(batch, entry.name, hooks)

    def _work(
        self, batch: BatchDirectory, entry: Entry, environment: submitit.JobEnvironment, signals: _Signals,
        launcher: Sequence[str], hooks: Hooks,
    ) -> dict[str, str]:  # fmt: skip
        several = environment.num_nodes > 1

        def give_up(reason: str) -> dict[str, str]:
            batch.record(entry.name, "gave_up", reason=reason)
            _say(f"{entry.name}: failed: {reason}", "error")
            rewrite(batch, _say)
            hooks.notify("failure", entry.name, reason)
            return {"outcome": "failed", "reason": reason}

        taken = batch.claim(Path(entry.output))
        if taken:
            return give_up(taken)
        _note_loss(batch, entry, environment)
        if fruitless(batch.attempts(entry.name)) >= self.rules.tries:
            return give_up(_why_given_up(batch.attempts(entry.name), entry, self.resources))
        before = entry.progress()
        batch.record(entry.name, "job", job=environment.job_id, progress=before)
        queue = Queue(
            batch, [entry], [self.slot], replace(self.rules, once=several), _say,
            launcher=lambda slot: launcher,
            should_stop=signals.stop_asked_for,
            changed=lambda: rewrite(batch, _say),
            failed=lambda entry, reason: hooks.notify("failure", entry.name, reason),
            patience=signals.leave / 2,
        )  # fmt: skip
        with suppress(_OutOfTime):
            queue.work()
        outcome = queue.outcomes[entry.name]
        why = "time" if signals.timed else "preempted" if signals.by_cluster else "loss" if several else ""
        if outcome.kind == "stopped" and why and not signals.by_operator() and _may_requeue(environment):
            reason = outcome.reason if why != "time" or not signals.late else (
                "the time limit came before the block was finished, which is calculated again: give more "
                f"grace_seconds than {self.resources.grace_seconds}"
            )  # fmt: skip
            batch.record(
                entry.name, "requeued", why=why, reason=reason, progressed=entry.progress() > before,
                signalled=signals.signalled, seconds=round(time.monotonic() - signals.began, 1),
            )  # fmt: skip
            if fruitless(batch.attempts(entry.name)) >= self.rules.tries:
                return give_up(_why_given_up(batch.attempts(entry.name), entry, self.resources))
            rewrite(batch, _say)
            batch.close()
            try:
                signals.requeue()
            except UncompletedJobError:
                return give_up(f"stopped at its time limit {self.resources.requeues} times; the same command goes on")
        batch.close()
        return {"outcome": outcome.kind, "reason": outcome.reason}


def rewrite(batch: BatchDirectory, say: Callable[[str, str], None]) -> None:
    """Writes the summary; a full disk must not end the batch."""
    try:
        write_summary(batch)
    except (WorkflowError, OSError) as error:
        say(f"summary: not written: {error}", "warning")


def over(batch: BatchDirectory, name: str, hooks: Hooks) -> None:
    """A run is not worked on any more until the next submission; with the last such run the batch ends."""
    if leave(batch.path, name):
        end(batch, hooks)


def end(batch: BatchDirectory, hooks: Hooks) -> None:
    """Tells the outside that the batch has ended."""
    rewrite(batch, hooks.say)
    hooks.track(summarize(batch))
    hooks.notify("end")


class _OutOfTime(KeyboardInterrupt):
    """The block cannot be finished before the cluster kills the job."""


class _Signals:
    """The cluster's signals and its time limit in a job's main process: they set a flag, the run finishes its block, and
    only then does submitit, whose handler is kept, checkpoint and requeue."""

    def __init__(self, batch: BatchDirectory, environment: submitit.JobEnvironment, grace: float) -> None:
        self.batch, self.grace, self.leave = batch, grace, min(_LEAVE_SECONDS, grace / 2)
        self.number = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
        self._handler: Any = signal.getsignal(self.number)
        self._terminated: float | None = None
        #: The cluster wants the run to stop; because of the time limit; with the block under way unfinished.
        self.by_cluster = self.timed = self.late = False
        #: Whether the cluster sent its signal, and did not leave the run to the clock.
        self.signalled = False
        signal.signal(self.number, self._asked)
        for number in (signal.SIGTERM, *((signal.SIGHUP,) if hears_hangup() else ())):
            signal.signal(number, self._term)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.number, signal.SIGTERM})
        self.began = time.monotonic()
        left = seconds_left(_squeue(environment, "%L"))
        self._ends = None if left is None else self.began + left

    def stop_asked_for(self) -> bool:
        """Whether to finish the block and stop. Raises KeyboardInterrupt where it shall not be finished."""
        if (self.batch.path / STOP).exists():
            with suppress(SourceError):
                if read_text(self.batch.path / STOP, errors="replace").strip() == "now":
                    raise KeyboardInterrupt
            return True
        now = time.monotonic()
        left = float("inf") if self._ends is None else self._ends - now
        # Slurm's own signal is lost where it comes before the job's step has begun.
        terminated = self._terminated is not None and now - self._terminated > _ECHO_SECONDS
        early = self.grace < left < self.grace + _EARLY_SECONDS
        if not self.by_cluster:
            self.by_cluster = terminated or (self.signalled and not early) or left < self.grace
            self.timed = self.by_cluster and left < self.grace
        if self.timed and left < self.leave:
            self.late = True
            raise _OutOfTime
        return self.by_cluster

    def by_operator(self) -> bool:
        """Whether the file `STOP` asks for the end: then nothing is requeued."""
        return (self.batch.path / STOP).exists()

    def requeue(self) -> NoReturn:
        """submitit's own way: `Job.checkpoint`, requeue, exit. Raises UncompletedJobError where it was requeued too often."""
        self._handler(self.number, None)
        raise AssertionError("submitit's handler ends the process")

    def _asked(self, number: int, frame: object) -> None:
        self.signalled = True

    def _term(self, number: int, frame: object) -> None:
        self._terminated = self._terminated or time.monotonic()


def killed_marker(jobs: Path, job: str) -> Path:
    """A file that the job's script leaves where a process of the job was killed; `job` is Slurm's own number."""
    return jobs / f"{job}_killed"


def seconds_left(text: str) -> float | None:
    """squeue's time left, `[days-][hours:]minutes:seconds`, in seconds; None for a word such as UNLIMITED."""
    days, dash, clock_time = text.strip().rpartition("-")
    try:
        seconds = 0
        for part in clock_time.split(":"):
            seconds = 60 * seconds + int(part)
        return seconds + 86400 * int(days if dash else 0)
    except ValueError:
        return None


def fruitless(attempts: Sequence[Mapping[str, Any]]) -> int:
    """How many jobs in a row, up to the last, the time limit or a loss ended before they had finished anything."""
    count = 0
    for attempt in reversed(attempts):
        if attempt["fact"] == "submitted" or (attempt["fact"] == "requeued" and attempt["progressed"]):
            break
        count += attempt["fact"] == "requeued" and attempt["why"] != "preempted"
    return count


def _why_given_up(attempts: Sequence[Mapping[str, Any]], entry: Entry, resources: Resources) -> str:
    count, last = fruitless(attempts), next(a for a in reversed(attempts) if a["fact"] == "requeued")
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


def _note_loss(batch: BatchDirectory, entry: Entry, environment: submitit.JobEnvironment) -> None:
    """Puts into the attempts that the job before this one was killed, where its script said so."""
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


def _may_requeue(environment: submitit.JobEnvironment) -> bool:
    """Not where Slurm has cancelled the job or requeues it itself."""
    return environment.cluster != "slurm" or _squeue(environment, "%T") in ("RUNNING", "")


def _squeue(environment: submitit.JobEnvironment, what: str) -> str:
    """What squeue says of this job; empty where there is no answer."""
    if environment.cluster != "slurm":
        return ""
    command = ["squeue", "--noheader", "--jobs", environment.raw_job_id, "--format", what]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    return ""


def _follow(batch: BatchDirectory, entry: Entry, slot: Slot, launcher: Sequence[str]) -> dict[str, str]:
    """A further node of a run: torchrun's agent, started once. Whether and when to stop is the first node's to say, and what
    its run says to all ranks ends this one too. Raises RuntimeError, which ends the job's step on all nodes, where the
    agent ends and the first node does not notice."""
    followed = {"outcome": "followed", "reason": ""}
    if not shared_out(entry):
        return followed
    known = len(batch.attempts(entry.name))

    def over() -> bool:
        attempts = batch.attempts(entry.name)
        return attempts[-1]["fact"] == "gave_up" or any(a["fact"] == "ended" for a in attempts[known:])

    child = Child.start(batch, entry, slot, False, launcher, first_node=False)
    ended, code, since = False, None, 0.0
    while not ended:
        time.sleep(_POLL_SECONDS)
        ended, code = child.poll()
        since = since or (time.monotonic() if over() else 0.0)
        if not ended and since and time.monotonic() - since > _VERDICT_SECONDS:
            child.kill()
    since = time.monotonic()
    while code and not over():
        if time.monotonic() - since > _VERDICT_SECONDS:
            raise RuntimeError(
                f"torchrun's agent ended with {code}, and the first node goes on; its log is {child.log}"
            )
        time.sleep(_POLL_SECONDS)
    return followed


def _say(text: str, level: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {level}: {printable(text)}", flush=True)
