"""A batch on a cluster, through submitit: each run is submitted as a job (`cluster_job`), and Slurm is asked for it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import submitit

from recipes.errors import EnvironmentProblem
from recipes.matrix import Resources
from workflows.batch.attempt import Slot, child_path
from workflows.batch.cluster.job import STOP, Job, end, killed_marker, over, rewrite
from workflows.batch.hooks import Hooks, expect
from workflows.batch.outcome import Outcome
from workflows.batch.queue import Rules
from workflows.batch.state import BatchDirectory, Entry, orphan, standing

_POLL_SECONDS = 0.5
#: squeue's words for a job that has not ended.
_LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING",
         "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip
#: Python starts with both signals held back until the job listens: before, they would end it.
_HOLD_SIGNALS = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIG%s, signal.SIGTERM}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def submit(
    batch: BatchDirectory, entries: Sequence[Entry], executor: str, resources: Mapping[str, Resources], rules: Rules,
    slots: Sequence[Slot], hooks: Hooks, say: Callable[[str, str], None], should_stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Submits every run that is neither done nor under way. Slurm: returns behind the submission. local: works with one
    job per slot at a time until all have ended. The last run to end tells `hooks`. Raises EnvironmentProblem where there
    is no Slurm, or it refuses."""
    _require_private(batch)
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
    expect(batch.path, [entry.name for entry in pending], under_way)
    rewrite(batch, say)
    for entry in entries:
        if entry.problems:
            hooks.notify("failure", entry.name, entry.problems[0])
    if not pending and not under_way:
        end(batch, hooks)

    def jobs_of(some: Sequence[Entry], slot: Slot) -> list[submitit.Job[Any]]:
        asked = resources[some[0].name]
        try:
            chosen = _executor(batch, executor, asked)
            with chosen.batch():
                found = [chosen.submit(Job(batch.path, e.name, rules, asked, slot, hooks)) for e in some]
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
    running: dict[Slot, tuple[str, submitit.Job[Any]]] = {}
    try:
        while pending or running:
            if should_stop():
                (batch.path / STOP).write_text("block")
                while pending:
                    over(batch, pending.pop().name, hooks)
            for slot in [slot for slot, (_, job) in running.items() if job.done()]:
                over(batch, running.pop(slot)[0], hooks)  # a job that was killed has not said so itself
            for slot in slots:
                if pending and slot not in running:
                    with _shielded():
                        running[slot] = (pending[0].name, jobs_of(pending[:1], slot)[0])
                    del pending[0]
            time.sleep(_POLL_SECONDS)
    finally:
        for entry in pending:
            over(batch, entry.name, hooks)


def _require_private(batch: BatchDirectory) -> None:
    """Raises EnvironmentProblem if others could write into the batch's directory: a job unpickles what lies in its jobs/."""
    for path in (path for path in (batch.path, batch.path / "jobs") if path.exists()):
        found = path.stat()
        if path.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            raise EnvironmentProblem(
                f"{path}: belongs to another user, is writable by everybody or is a link, and a job runs what lies in it; "
                "name another --directory"
            )


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
    found, attempts = {}, {entry.name: batch.attempts(entry.name) for entry in entries}
    for name, state in _states(attempts).items():
        if state.partition(" ")[2] in _LIVE:
            found[name] = state.lower()
    return found | {
        name: f"still running since the last call (pid {some[-1]['pid']})"
        for name, some in attempts.items() if orphan(some) is not None
    }  # fmt: skip


def gone(batch: BatchDirectory, entries: Sequence[Entry]) -> dict[str, str]:
    """Run -> how its last job ended, in Slurm's words, of the jobs that are not in the queue any more."""
    attempts = {entry.name: batch.attempts(entry.name) for entry in entries}
    ended = {n: state for n, state in _states(attempts).items() if state.partition(" ")[2] not in _LIVE}
    return {name: f"job {state.lower()}" for name, state in ended.items() if orphan(attempts[name]) is None}


def _states(attempts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Run -> number and state of its last job in Slurm; Slurm forgets a job some minutes behind its end."""
    jobs: dict[str, str] = {}
    for name, some in attempts.items():
        submitted = [attempt for attempt in some if attempt.get("fact") == "submitted"]
        if submitted and submitted[-1]["executor"] == "slurm":
            jobs[submitted[-1]["job"]] = name
    found: dict[str, str] = {}
    if jobs and shutil.which("squeue"):
        wanted = ",".join(sorted({job.partition("_")[0] for job in jobs}))
        command = ["squeue", "--noheader", "--array", "--states=all", "--jobs", wanted, "--format", "%i %T"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if told.returncode == 0 or "Invalid job id" in told.stderr:
            found = {name: f"{job} UNKNOWN to Slurm by now" for job, name in jobs.items()}
        for line in told.stdout.splitlines():
            job, _, state = line.partition(" ")
            if job in jobs:
                found[jobs[job]] = f"{job} {state.strip()}"
    return found


def _executor(batch: BatchDirectory, executor: str, asked: Resources) -> submitit.AutoExecutor:
    chosen = submitit.AutoExecutor(
        batch.path / "jobs",
        cluster=executor,
        slurm_max_num_timeout=asked.requeues,
        slurm_python=shlex.join([sys.executable, "-ISc", _HOLD_SIGNALS % submitit.JobEnvironment.USR_SIG]),
        local_max_num_timeout=asked.requeues,
    )
    marker = shlex.quote(str(killed_marker((batch.path / "jobs").absolute(), "JOB"))).replace("JOB", '"$SLURM_JOB_ID"')
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
        # One node's end ends the step on all of them, and a job whose process was killed begins again.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_teardown=[
            "code=$?",
            'state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)',
            f'if [ $code = 137 ] && [ "$state" = RUNNING ]; then touch {marker}; scontrol requeue "$SLURM_JOB_ID"; fi',
            "exit $code",
        ],
        slurm_additional_parameters={"requeue": True, **asked.extra},
    )
    return chosen


@contextmanager
def _shielded() -> Iterator[None]:
    """Processes started inside ignore a terminal's Ctrl-C and its end, which shall finish their block and not end them."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
