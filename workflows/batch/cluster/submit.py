"""The executors `slurm` and `local`: submitit makes a job (`job.Job`) of each run, and Slurm says how its jobs are."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import submitit

from recipes.errors import EnvironmentProblem
from recipes.matrix import Resources
from workflows.batch.attempt import Slot, child_path
from workflows.batch.cluster.job import Job
from workflows.batch.cluster.signals import STOP, ask_jobs_to_stop, killed_marker
from workflows.batch.state import BatchDirectory, Entry
from workflows.batch.submission import JobState, Submission, end_run

_POLL_SECONDS = 0.5
#: Slurm repeats after a minute what a node did not answer in time (MessageTimeout), such as the end of a step whose processes it
#: waited for (KillWait): the requeued job's step has the same number, and would be ended in turn. Seen in Slurm 22.05.
_REPEAT_SECONDS = 75
#: squeue's words for a job that has not ended.
_LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING",
         "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip
#: Python starts with both signals blocked until the job listens: before that, they would end it.
_HOLD_SIGNALS = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIG%s, signal.SIGTERM}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Slurm:
    """Submits all runs at once, and returns when they are queued."""

    waits = False

    def submit(self, work: Submission) -> None:
        """Submits an array per kind of resources: its tasks share one submission."""
        _prepare_submission(work.batch)
        kinds: dict[str, list[Entry]] = {}
        for entry in work.entries:
            kinds.setdefault(work.resources[entry.name].model_dump_json(), []).append(entry)
        for alike in kinds.values():
            _submit_jobs(work, alike, Slot(), "slurm")

    def states(self, jobs: Collection[str]) -> dict[str, JobState]:
        """What squeue says; it forgets a job some minutes after its end."""
        if not jobs or not shutil.which("squeue"):
            return {}
        wanted = ",".join(sorted({job.partition("_")[0] for job in jobs}))
        command = ["squeue", "--noheader", "--array", "--states=all", "--jobs", wanted, "--format", "%i %T"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        found: dict[str, JobState] = {}
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:
            found = dict.fromkeys(jobs, JobState("unknown to slurm by now", ended=True))
        for line in answer.stdout.splitlines():
            job, _, state = line.partition(" ")
            if job in jobs:
                found[job] = JobState(state.strip().lower(), ended=state.strip() not in _LIVE)
        return found

    def stop(self, batch: BatchDirectory) -> None:
        ask_jobs_to_stop(batch, "now")


class Local:
    """Works with one job per slot at a time on this machine, and returns when all have ended."""

    waits = True

    def submit(self, work: Submission) -> None:
        """Submits a run whenever a slot is free. If the operator asks for the end, the jobs finish their blocks."""
        _prepare_submission(work.batch)
        pending = list(work.entries)
        running: dict[Slot, tuple[str, submitit.Job[Any]]] = {}
        try:
            while pending or running:
                if work.should_stop():
                    ask_jobs_to_stop(work.batch, "block")
                    while pending:
                        end_run(work.batch, pending.pop().name, work.hooks)
                for slot in [slot for slot, (_, job) in running.items() if job.done()]:
                    # A job that was killed has not done so itself.
                    end_run(work.batch, running.pop(slot)[0], work.hooks)
                for slot in work.slots:
                    if pending and slot not in running:
                        with _shielded():
                            running[slot] = (pending[0].name, _submit_jobs(work, pending[:1], slot, "local")[0])
                        del pending[0]
                time.sleep(_POLL_SECONDS)
        finally:
            for entry in pending:
                end_run(work.batch, entry.name, work.hooks)

    def states(self, jobs: Collection[str]) -> dict[str, JobState]:
        """Nothing: these jobs are processes of this machine, which attempts.jsonl names."""
        return {}

    def stop(self, batch: BatchDirectory) -> None:
        ask_jobs_to_stop(batch, "now")


def _prepare_submission(batch: BatchDirectory) -> None:
    (batch.path / STOP).unlink(missing_ok=True)
    os.environ["PYTHONPATH"] = child_path()  # a job's process imports `job` by name


def _submit_jobs(
    work: Submission, entries: Sequence[Entry], slot: Slot, cluster: Literal["slurm", "local"]
) -> list[submitit.Job[Any]]:
    """Submits runs that ask for the same resources, together."""
    asked = work.resources[entries[0].name]
    try:
        chosen = _make_submitter(work.batch, cluster, asked)
        with chosen.batch():
            jobs = [
                chosen.submit(Job(work.batch.path, entry.name, work.rules, asked, slot, work.hooks))
                for entry in entries
            ]
    except (RuntimeError, ValueError, NameError, submitit.core.utils.FailedJobError, OSError) as error:
        raise EnvironmentProblem(
            f"--executor {work.executor}: {error}; see --resource, or leave --executor out"
        ) from None
    for entry, job in zip(entries, jobs, strict=True):
        work.record_job(entry, job.job_id)
    return jobs


def _make_submitter(
    batch: BatchDirectory, cluster: Literal["slurm", "local"], asked: Resources
) -> submitit.AutoExecutor:
    chosen = submitit.AutoExecutor(
        batch.path / "jobs",
        cluster=cluster,
        slurm_max_num_timeout=asked.requeues,
        slurm_python=shlex.join([sys.executable, "-ISc", _HOLD_SIGNALS % submitit.JobEnvironment.USR_SIG]),
        local_max_num_timeout=asked.requeues,
    )
    # Where one process is the whole step, nothing is left that Slurm could wait for.
    pause = f"sleep {_REPEAT_SECONDS}; " if asked.nodes > 1 else ""
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
        # One node's end ends the step on all of them, and a job whose process was killed starts over.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_teardown=[
            "code=$?",
            'state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)',
            f'if [ $code = 137 ] && [ "$state" = RUNNING ]; then touch {marker}; {pause}scontrol requeue "$SLURM_JOB_ID"; fi',
            "exit $code",
        ],
        slurm_additional_parameters={"requeue": True, **asked.extra},
    )
    return chosen


@contextmanager
def _shielded() -> Iterator[None]:
    """Processes started inside ignore a terminal's Ctrl-C and its end: they finish their block and are not killed by it."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
