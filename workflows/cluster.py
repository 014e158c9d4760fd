"""A batch on a cluster, through submitit: each run becomes a job that works like a queue of one run, is requeued when it
is preempted or its time is over, and goes on at the last finished block."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import Checkpointable

from recipes.errors import EnvironmentProblem, WorkflowError
from recipes.matrix import Resources
from workflows.batch_child import Child, Slot, child_path, torchrun
from workflows.batch_hooks import Hooks
from workflows.batch_outcome import Outcome
from workflows.batch_queue import Queue, Rules
from workflows.batch_state import BatchDirectory, Entry, orphan, standing
from workflows.batch_summary import write_summary

#: A file in the batch's directory that ends every job behind its block: `block`, or at once: `now`.
STOP = "stop"
_POLL_SECONDS = 0.5
#: From Slurm's SIGTERM, which usually reaches the run as well, to our own.
_ECHO_SECONDS = 1.0


class Job(Checkpointable):
    """One run as a cluster's job. submitit pickles it, and calls it again in a requeued job."""

    def __init__(
        self, directory: Path, name: str, rules: Rules, resources: Resources, slot: Slot, notify: str | None
    ) -> None:
        self.directory, self.name, self.rules = directory.absolute(), name, rules
        self.resources, self.slot, self.notify, self.cwd = resources, slot, notify, Path.cwd()

    def __call__(self) -> dict[str, str]:
        """Works until the run is done, failed or stopped; returns its outcome. Ends the process where it is requeued."""
        os.chdir(self.cwd)
        environment = submitit.JobEnvironment()
        batch = BatchDirectory(self.directory)
        entry = next(entry for entry in batch.load()[0] if entry.name == self.name)
        signals = _Signals(batch)
        launcher = torchrun(
            self.resources.gpus_per_node or len(self.slot.gpus or ()), _hosts(environment), environment.global_rank,
            environment.job_id,
        )  # fmt: skip
        if environment.global_rank > 0:
            return _follow(batch, entry, self.slot, launcher, signals)
        taken = batch.claim(Path(entry.output))
        if taken:
            batch.record(entry.name, "gave_up", reason=taken)
            return {"outcome": "failed", "reason": taken}
        hooks = Hooks(batch.path, self.notify, None, _say)

        def rewrite() -> None:
            try:
                write_summary(batch)
            except (WorkflowError, OSError) as error:
                _say(f"summary: not written: {error}", "warning")

        queue = Queue(
            batch, [entry], [self.slot], self.rules, _say,
            launcher=lambda slot: launcher,
            should_stop=signals.stop_asked_for,
            changed=rewrite,
            failed=lambda entry, reason: hooks.notify("failure", entry.name, reason),
        )  # fmt: skip
        queue.work()
        batch.close()
        outcome = queue.outcomes[entry.name]
        if outcome.kind == "stopped" and signals.by_cluster:
            batch.record(entry.name, "requeued")
            signals.requeue()
        return {"outcome": outcome.kind, "reason": outcome.reason}


class _Signals:
    """The cluster's signals in a job's main process: they set a flag, the run finishes its block, and only then does
    submitit, whose handler is kept, checkpoint and requeue."""

    def __init__(self, batch: BatchDirectory) -> None:
        self.batch = batch
        self.number = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
        self._handler: Any = signal.getsignal(self.number)
        self._terminated: float | None = None
        self.by_cluster = False
        signal.signal(self.number, self._asked)
        signal.signal(signal.SIGTERM, self._term)

    def stop_asked_for(self) -> bool:
        """Whether to finish the block and stop. Raises KeyboardInterrupt where it shall not be finished."""
        stop = self.batch.path / STOP
        if stop.exists():
            if stop.read_text().strip() == "now":
                raise KeyboardInterrupt
            return True
        if self._terminated is not None and time.monotonic() - self._terminated > _ECHO_SECONDS:
            self.by_cluster = True
        return self.by_cluster

    def requeue(self) -> None:
        """submitit's own way: `Job.checkpoint`, requeue, exit."""
        self._handler(self.number, None)

    def _asked(self, number: int, frame: object) -> None:
        self.by_cluster = True

    def _term(self, number: int, frame: object) -> None:
        self._terminated = self._terminated or time.monotonic()


def submit(
    batch: BatchDirectory, entries: Sequence[Entry], executor: str, resources: Mapping[str, Resources], rules: Rules,
    slots: Sequence[Slot], notify: str | None, say: Callable[[str, str], None], should_stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Submits every run that is neither done nor under way. Slurm: returns behind the submission. local: works with one
    job per slot at a time until all have ended. Raises EnvironmentProblem where there is no Slurm, or it refuses."""
    (batch.path / STOP).unlink(missing_ok=True)
    os.environ["PYTHONPATH"] = child_path()  # a job's process imports this module by name
    under_way = queued(batch, entries)
    pending = []
    for entry in entries:
        if entry.problems:
            batch.record(entry.name, "gave_up", reason=entry.problems[0])
        elif standing(entry).kind == "done":
            say(f"{entry.name}: done and verified before", "info")
        elif entry.name in under_way:
            say(f"{entry.name}: {under_way[entry.name]}", "info")
        else:
            batch.record(entry.name, "queued")
            pending.append(entry)

    def jobs_of(some: Sequence[Entry], slot: Slot) -> list[submitit.Job[Any]]:
        asked = resources[some[0].name]
        try:
            chosen = _executor(batch, executor, asked)
            with chosen.batch():
                found = [chosen.submit(Job(batch.path, e.name, rules, asked, slot, notify)) for e in some]
        except (RuntimeError, ValueError, NameError, submitit.core.utils.FailedJobError, OSError) as error:
            raise EnvironmentProblem(
                f"--executor {executor}: {error}; see --resource, or leave --executor out"
            ) from None
        for entry, job in zip(some, found, strict=True):
            batch.record(entry.name, "submitted", executor=executor, job=job.job_id)
            say(f"{entry.name}: submitted as job {job.job_id}", "info")
        return found

    if executor == "slurm":
        # An array per kind of resources: its tasks share one submission.
        for kind in dict.fromkeys(resources[entry.name].model_dump_json() for entry in pending):
            jobs_of([entry for entry in pending if resources[entry.name].model_dump_json() == kind], Slot())
        return
    running: dict[Slot, submitit.Job[Any]] = {}
    while pending or running:
        stopping = should_stop()
        if stopping:
            (batch.path / STOP).write_text("block")
            pending = []
        for slot in [slot for slot, job in running.items() if job.done()]:
            del running[slot]
        for slot in slots:
            if pending and slot not in running:
                with _shielded():
                    running[slot] = jobs_of([pending.pop(0)], slot)[0]
        time.sleep(_POLL_SECONDS)


def stop_at_once(batch: BatchDirectory) -> None:
    """Ends the jobs of a local executor without finishing their blocks."""
    (batch.path / STOP).write_text("now")


def outcomes(batch: BatchDirectory, entries: Sequence[Entry]) -> dict[str, Outcome]:
    """What became of the runs, as their jobs wrote it down."""
    found = {}
    for entry in entries:
        last: dict[str, Any] = next(iter(reversed(batch.attempts(entry.name))), {})
        if entry.problems or last.get("fact") == "gave_up":
            found[entry.name] = Outcome("failed", last.get("reason") or entry.problems[0])
        elif standing(entry).kind == "done":
            found[entry.name] = Outcome("done")
        else:
            found[entry.name] = Outcome("stopped", last.get("reason", ""))
    return found


def queued(batch: BatchDirectory, entries: Sequence[Entry]) -> dict[str, str]:
    """Run -> state, of the runs that have a job in Slurm's queue or a living process here."""
    jobs: dict[str, str] = {}
    found: dict[str, str] = {}
    for entry in entries:
        attempts = batch.attempts(entry.name)
        if orphan(attempts) is not None:
            found[entry.name] = f"still running since the last call (pid {attempts[-1]['pid']})"
        submitted = [attempt for attempt in attempts if attempt.get("fact") == "submitted"]
        if submitted and submitted[-1]["executor"] == "slurm":
            jobs[submitted[-1]["job"]] = entry.name
    if jobs and shutil.which("squeue"):
        wanted = ",".join(sorted({job.partition("_")[0] for job in jobs}))
        command = ["squeue", "--noheader", "--array", "--jobs", wanted, "--format", "%i %T"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        for line in told.splitlines():
            job, _, state = line.partition(" ")
            if job in jobs:
                found[jobs[job]] = f"{job} {state.strip().lower()}"
    return found


def _executor(batch: BatchDirectory, executor: str, asked: Resources) -> submitit.AutoExecutor:
    chosen = submitit.AutoExecutor(
        batch.path / "jobs",
        cluster=executor,
        slurm_max_num_timeout=asked.requeues,
        local_max_num_timeout=asked.requeues,
    )
    chosen.update_parameters(
        name=batch.path.name.removesuffix(".run"),
        timeout_min=max(1, round(asked.hours * 60)),
        nodes=asked.nodes,
        tasks_per_node=1,
        gpus_per_node=asked.gpus_per_node or None,
        cpus_per_task=asked.cpus_per_task,
        mem_gb=None if asked.memory is None else asked.memory / 2**30,
        stderr_to_stdout=True,
        slurm_partition=asked.partition,
        slurm_account=asked.account,
        slurm_qos=asked.qos,
        slurm_constraint=asked.constraint,
        slurm_signal_delay_s=asked.grace_seconds,
        slurm_array_parallelism=asked.parallel,
        slurm_setup=asked.setup or None,
        slurm_additional_parameters={"requeue": True, **asked.extra},
    )
    return chosen


def _follow(
    batch: BatchDirectory, entry: Entry, slot: Slot, launcher: Sequence[str], signals: _Signals
) -> dict[str, str]:
    """A further node of a run: its torchrun agent is started as often as that of the first node, which decides."""
    while standing(entry).kind != "done" and not signals.stop_asked_for():
        attempts = batch.attempts(entry.name)
        if attempts and attempts[-1]["fact"] == "gave_up":
            break
        if attempts and attempts[-1]["fact"] == "begun":
            child = Child.start(batch, entry, slot, False, launcher, first_node=False)
            while not child.poll()[0]:
                if signals.stop_asked_for():
                    child.ask_to_stop(once=True)
                time.sleep(_POLL_SECONDS)
        time.sleep(_POLL_SECONDS)
    return {"outcome": "followed", "reason": ""}


def _hosts(environment: submitit.JobEnvironment) -> list[str]:
    return list(environment.hostnames) if environment.num_nodes > 1 else []


def _say(text: str, level: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {level}: {text}", flush=True)


@contextmanager
def _shielded() -> Iterator[None]:
    """Processes started inside ignore a terminal's Ctrl-C, which shall finish their block and not end them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
