"""Jobs that run into the time limit of a real Slurm. Its smallest is one minute, so the three batches work side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from calibration.runs.journal import RunDirectory
from tests.integration.batch_runs import QWEN, facts, files, journal, wait_for, write_recipe
from tests.slurm.local_cluster import LocalSlurm
from tests.slurm.slurm_runs import DATA, blocks, ended, job_of, processes, queue, status, submit, told

pytestmark = pytest.mark.slurm
MINUTE = 1 / 60
#: Seconds that a block takes at least: three are more than a job of two minutes may work.
SLOW = 30


@dataclass
class Batches:
    """Three batches under way."""

    slow: Path
    stuck: Path
    hung: Path


@pytest.fixture(scope="module")
def batches(
    cluster: LocalSlurm, sources: dict[str, Path], reference: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Batches]:
    root = tmp_path_factory.mktemp("limits")
    names = ("slow", "stuck", "hung")
    recipes = {name: write_recipe(root / name, "qwen", sources["qwen"], QWEN, calibration=DATA) for name in names}
    batch = {name: root / name / "b.run" for name in recipes}
    over = threading.Event()

    def each(work: Callable[[], None]) -> threading.Thread:
        def repeat() -> None:
            while not over.wait(0.05):
                work()

        thread = threading.Thread(target=repeat)
        thread.start()
        return thread

    def stop(pids: list[int], how: int = signal.SIGSTOP) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, how)

    def runs(name: str) -> list[int]:
        return [line["pid"] for line in facts(batch[name], "qwen", "begun")][-1:]

    stops: set[int] = set()

    def slow() -> None:
        """The run stands still for `SLOW` seconds in each of its three blocks."""
        loaded = {e["block"] for e in RunDirectory(root / "slow/qwen/output").events() if e["event"] == "load"}
        finished = len(journal(root / "slow", "qwen"))
        if finished in loaded and finished not in stops:
            stops.add(finished)
            run, until = runs("slow"), time.monotonic() + SLOW
            while time.monotonic() < until and not over.wait(0.05):
                stop(run)  # again and again: ahead of its own signal, Slurm sends all processes of a job SIGCONT
            stop(run, signal.SIGCONT)

    def stuck() -> None:
        """The run stands still whenever it has begun: its block takes longer than any limit, in the first two jobs."""
        if not facts(batch["stuck"], "qwen", "gave_up"):
            stop(runs("stuck"))

    def hung() -> None:
        """All processes of the first job stand still once a block is finished, and answer no signal."""
        if journal(root / "hung", "qwen") and len(facts(batch["hung"], "qwen", "submitted")) == 1:
            stop(first_of_hung())

    def first_of_hung() -> list[int]:
        job = f"SLURM_JOB_ID={facts(batch['hung'], 'qwen', 'submitted')[0]['job']}\0"
        return [*processes("workflows.run", job), *processes("submitit.core._submit", job)]

    submit(batch["slow"], recipes["slow"], resources=(f"hours={2 * MINUTE}", "grace_seconds=50"))
    # Without Slurm's signal: the job itself must look at the clock.
    silent = "extra={signal: CONT@10}"
    submit(batch["stuck"], recipes["stuck"], resources=(f"hours={MINUTE}", "grace_seconds=10", silent), tries=2)
    submit(batch["hung"], recipes["hung"], resources=(f"hours={2 * MINUTE}", "grace_seconds=10"))
    threads = [each(work) for work in (slow, stuck, hung)]
    try:
        yield Batches(batch["slow"], batch["stuck"], batch["hung"])
    finally:
        over.set()
        for thread in threads:
            thread.join()
        stop(first_of_hung(), signal.SIGKILL)  # srun among them, which Slurm leaves standing
        # Slurm may have drained the node where it could not end them ("Kill task failed"); an idle node refuses this.
        subprocess.run(["scontrol", "update", "nodename=ALL", "state=resume"], check=False, capture_output=True)


def test_a_block_that_no_limit_is_long_enough_for(
    cluster: LocalSlurm, batches: Batches, sources: dict[str, Path], reference: dict[str, bytes]
) -> None:
    """No endless requeue: the run is given up with the remedy, and what it names helps."""
    batch = batches.stuck
    rows = ended(batch, cluster)
    assert rows["qwen"]["state"] == "failed", told(batch)
    reason = rows["qwen"]["reason"]
    assert "ended 2 jobs in a row before they had finished a block: limit 0:01:00" in reason
    assert "no block is finished yet" in reason and "--resource hours=0.0333" in reason
    requeued = facts(batch, "qwen", "requeued")
    assert [line["why"] for line in requeued] == ["time"] * 2 and not any(line["signalled"] for line in requeued)
    assert "more grace_seconds than 10" in requeued[0]["reason"]
    submit(batch, batch.parent / "qwen.yaml")
    assert ended(batch, cluster)["qwen"]["state"] == "done", told(batch)
    assert files(batch.parent, "qwen") == reference and blocks(batch.parent, "qwen") == [0, 1, 2]


def test_a_job_that_slurm_kills_at_its_limit(
    cluster: LocalSlurm, batches: Batches, reference: dict[str, bytes]
) -> None:
    """It hangs and answers no signal. Slurm requeues nothing, the status says so, and the same command goes on."""
    batch = batches.hung
    wait_for(lambda: job_of(batch, "qwen") not in queue(), "Slurm's end of the job", 300)
    assert "timeout" in status(batch) and not facts(batch, "qwen", "requeued"), status(batch) + told(batch)
    done_before = blocks(batch.parent, "qwen")
    assert done_before and len(done_before) < 3
    submit(batch, batch.parent / "qwen.yaml")
    assert ended(batch, cluster)["qwen"]["state"] == "done", told(batch)
    assert files(batch.parent, "qwen") == reference and blocks(batch.parent, "qwen") == [0, 1, 2]


def test_work_that_is_longer_than_the_limit(cluster: LocalSlurm, batches: Batches, reference: dict[str, bytes]) -> None:
    """Slurm's own signal before the limit, block finished, requeued, resumed: the bytes of a run without a limit."""
    batch = batches.slow
    assert ended(batch, cluster)["qwen"]["state"] == "done", told(batch)
    requeued = facts(batch, "qwen", "requeued")
    assert requeued and all(line["why"] == "time" and line["signalled"] for line in requeued), told(batch)
    assert requeued[0]["progressed"], told(batch)
    assert sum(line["seconds"] for line in facts(batch, "qwen", "ended")) > 3 * SLOW, told(batch)
    assert len(facts(batch, "qwen", "begun")) == len(requeued) + 1 and len(facts(batch, "qwen", "submitted")) == 1
    assert files(batch.parent, "qwen") == reference and blocks(batch.parent, "qwen") == [0, 1, 2]


def test_a_signal_before_anything_listens(
    cluster: LocalSlurm, sources: dict[str, Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    """Python has begun, submitit's handler is not installed: the signal must not end the job, nor be lost."""
    batch = tmp_path / "b.run"
    submit(batch, write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=DATA))
    job = job_of(batch, "qwen")
    # srun's command ends alike, and a signal before there is a step is lost.
    started = f"{sys.executable}\0-u\0-m\0submitit.core._submit"
    wait_for(lambda: processes(started, f"SLURM_JOB_ID={job}\0"), "the job's process")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    assert not facts(batch, "qwen", "job"), "too late: the job has begun"
    assert ended(batch, cluster)["qwen"]["state"] == "done", told(batch)
    assert [line["why"] for line in facts(batch, "qwen", "requeued")] == ["preempted"]
    assert files(tmp_path, "qwen") == reference
