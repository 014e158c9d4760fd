"""When a cluster's job has to stop: the cluster's signals, its time limit, and the file by which the batch asks."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

import submitit

from calibration.checkpoint.files import read_text
from recipes.errors import SourceError
from workflows.batch.state import BatchDirectory
from workflows.interrupts import hears_hangup

#: A file in the batch's directory that stops every job: after its block (`block`), or at once (`now`).
STOP = "stop"
#: From Slurm's SIGTERM, which usually reaches the run as well, to our own.
_ECHO_SECONDS = 1.0
#: Slurm sends its signal up to a minute early; the job uses that minute.
_EARLY_SECONDS = 90.0
#: Before the time limit an unfinished block is given up, so that the job can still be requeued.
_REQUEUE_SECONDS = 60.0


class OutOfTime(KeyboardInterrupt):
    """The block cannot be finished before the cluster kills the job."""


class Signals:
    """The cluster's signals and its time limit in a job's main process: they set a flag, the run finishes its block, and
    only then does submitit's handler, which is kept, checkpoint and requeue the job."""

    def __init__(self, batch: BatchDirectory, environment: submitit.JobEnvironment, grace: float) -> None:
        """`grace`: seconds before the time limit at which the run is asked to stop."""
        self.batch, self.grace, self.requeue_seconds = batch, grace, min(_REQUEUE_SECONDS, grace / 2)
        self.number = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
        self._handler: Any = signal.getsignal(self.number)
        self._terminated: float | None = None
        #: Whether the cluster wants the run to stop; because of the time limit; with the block under way unfinished.
        self.by_cluster = self.timed = self.late = False
        #: Whether the cluster sent its signal; otherwise the clock alone says that the time is up.
        self.signalled = False
        signal.signal(self.number, self._note_signal)
        for number in (signal.SIGTERM, *((signal.SIGHUP,) if hears_hangup() else ())):
            signal.signal(number, self._note_termination)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.number, signal.SIGTERM})
        self.began = time.monotonic()
        left = seconds_left(_ask_squeue(environment, "%L"))
        self._ends = None if left is None else self.began + left

    def should_stop(self) -> bool:
        """Whether to finish the block and stop. Raises KeyboardInterrupt if the block must not be finished."""
        if (self.batch.path / STOP).exists():
            with suppress(SourceError):
                if read_text(self.batch.path / STOP, errors="replace").strip() == "now":
                    raise KeyboardInterrupt
            return True
        now = time.monotonic()
        left = float("inf") if self._ends is None else self._ends - now
        # Slurm's own signal is lost if it comes before the job's step has begun.
        terminated = self._terminated is not None and now - self._terminated > _ECHO_SECONDS
        early = self.grace < left < self.grace + _EARLY_SECONDS
        if not self.by_cluster:
            self.by_cluster = terminated or (self.signalled and not early) or left < self.grace
            self.timed = self.by_cluster and left < self.grace
        if self.timed and left < self.requeue_seconds:
            self.late = True
            raise OutOfTime
        return self.by_cluster

    def by_operator(self) -> bool:
        """Whether the file `STOP` asks for the end: then nothing is requeued."""
        return (self.batch.path / STOP).exists()

    def requeue(self) -> NoReturn:
        """Requeues the job as submitit does: `Job.checkpoint`, requeue, exit. Raises UncompletedJobError after too many
        requeues."""
        self._handler(self.number, None)
        raise AssertionError("submitit's handler ends the process")

    def _note_signal(self, number: int, frame: object) -> None:
        self.signalled = True

    def _note_termination(self, number: int, frame: object) -> None:
        self._terminated = self._terminated or time.monotonic()


def ask_jobs_to_stop(batch: BatchDirectory, when: Literal["block", "now"]) -> None:
    """Stops every job of the batch after its block, or at once."""
    (batch.path / STOP).write_text(when)


def may_requeue(environment: submitit.JobEnvironment) -> bool:
    """False if Slurm has canceled the job or requeues it itself."""
    return _ask_squeue(environment, "%T") in ("RUNNING", "")


def killed_marker(jobs: Path, job: str) -> Path:
    """A file that the job's script leaves if a process of the job was killed; `job` is Slurm's own number."""
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


def _ask_squeue(environment: submitit.JobEnvironment, what: str) -> str:
    """What squeue says of this job in the format `what`; empty if it is no job of Slurm or there is no answer."""
    if environment.cluster != "slurm":
        return ""
    command = ["squeue", "--noheader", "--jobs", environment.raw_job_id, "--format", what]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    return ""
