"""What a cluster's job decides from what it reads: time left, when it is given up, what a batch says of its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit

from recipes.matrix import Resources
from tests.unit.batch.batches import entry_of, recipe
from workflows.batch.attempt import Slot, torchrun
from workflows.batch.cluster import job as cluster_job
from workflows.batch.cluster.job import Job, _explain_limits, _FirstNode, _run_further_node, count_jobs_without_progress
from workflows.batch.cluster.signals import Signals, seconds_left
from workflows.batch.hooks import Hooks
from workflows.batch.queue import Rules
from workflows.batch.state import BatchDirectory, Entry
from workflows.batch.summary import _state

SUBMITTED = {"fact": "submitted"}


def requeued(why: str, progressed: bool = False, **facts: Any) -> dict[str, Any]:
    return {"fact": "requeued", "why": why, "progressed": progressed, "reason": why, "seconds": 55.0, **facts}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:07", 7), ("59:59", 3599), ("12:00:01", 43201), ("1-02:03:04", 93784), ("UNLIMITED", None), ("", None)],
)
def test_time_left_as_squeue_writes_it(text: str, seconds: float | None) -> None:
    assert seconds_left(text) == seconds


@pytest.mark.parametrize(
    ("attempts", "count"),
    [
        ([SUBMITTED], 0),
        ([SUBMITTED, requeued("time"), {"fact": "begun"}, requeued("time")], 2),
        ([SUBMITTED, requeued("time"), requeued("preempted"), requeued("loss")], 2),  # not the run's own fault
        ([SUBMITTED, requeued("time"), requeued("time", progressed=True), requeued("time")], 1),
        ([requeued("time"), requeued("time"), SUBMITTED, requeued("time")], 1),  # somebody has changed something
    ],
)
def test_jobs_in_a_row_that_finished_nothing(attempts: list[dict[str, Any]], count: int) -> None:
    assert count_jobs_without_progress(attempts) == count


def test_the_reason_for_giving_up_names_the_limit_and_the_remedy() -> None:
    entry = Entry("a", "a.yaml", "a.yaml", "/nowhere/output")
    reason = _explain_limits([SUBMITTED, requeued("time"), requeued("time")], entry, Resources(hours=12))
    assert "2 jobs in a row" in reason and "limit 12:00:00" in reason and "--resource hours=24" in reason
    lost = [SUBMITTED, requeued("loss", reason="killed by SIGKILL")]
    assert _explain_limits(lost, entry, Resources()) == "killed by SIGKILL (1 jobs in a row finished nothing)"


@pytest.mark.parametrize(
    ("fact", "gone", "state"),
    [
        ({"fact": "submitted"}, "job 7 node_fail", "stopped"),
        ({"fact": "begun", "pid": 1, "began": "0", "host": "elsewhere"}, "job 7 timeout", "stopped"),
        ({"fact": "ended", "outcome": "transient", "reason": "killed"}, "job 7 cancelled", "stopped"),
        ({"fact": "ended", "outcome": "transient", "reason": "killed"}, None, "retrying"),
        ({"fact": "requeued", "reason": "preempted"}, None, "waiting"),
    ],
)
def test_a_job_that_the_cluster_no_longer_has(fact: dict[str, Any], gone: str | None, state: str) -> None:
    entry = Entry("a", "a.yaml", "a.yaml", "/nowhere/output")
    found, why = _state(entry, [fact, {"fact": "job"}], {"holder": "host elsewhere (if it still lives)"}, None, gone)
    assert found == state and (gone or "") in why


@pytest.mark.parametrize(
    ("job", "holder", "state"),
    [("7 running", None, "running"), ("7 pending", "host elsewhere", "waiting"), (None, "host elsewhere", "running"),
     (None, None, "stopped")],
)  # fmt: skip
def test_a_run_on_another_host(job: str | None, holder: str | None, state: str) -> None:
    begun = {"fact": "begun", "pid": 1, "began": "0", "host": "elsewhere"}
    found, why = _state(Entry("a", "a.yaml", "a.yaml", "/nowhere/output"), [begun], {"holder": holder}, job, None)
    assert found == state and (job or "") in why


def test_torchrun_stands_before_a_run_of_several_gpus_or_nodes_alone() -> None:
    assert torchrun(0) == torchrun(1) == torchrun(0, ["a"], 0, "77") == []
    assert torchrun(4)[1:3] == ["torch.distributed.run", "--nproc-per-node=4"] and "--standalone" in torchrun(4)
    first, second = (torchrun(8, ["a", "b"], rank, "77") for rank in (0, 1))
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=a"} <= set(second)
    assert {one for one in first if one not in second} == {"--node-rank=0"}
    assert "--nproc-per-node=1" in torchrun(0, ["a", "b"], 0, "77")
    assert torchrun(8, ["a", "b"], 0, "78")[-1] != first[-1]  # two jobs may share their first node


def test_a_local_job_ignores_what_a_terminal_sends() -> None:
    """The batch hears it, and lets the jobs finish their blocks by the file `stop`."""
    cluster = pytest.importorskip("workflows.batch.cluster.submit")
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with cluster._shielded():
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 2
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_job_takes_a_lost_terminal_for_its_end(tmp_path: Path) -> None:
    environment = SimpleNamespace(cluster="local")
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"])
    before = [signal.getsignal(number) for number in numbers]
    try:
        signals = Signals(BatchDirectory(tmp_path / "b.run"), environment, 60)  # type: ignore[arg-type]
        assert not signals.should_stop()
        signal.raise_signal(signal.SIGHUP)
        signals._terminated = (signals._terminated or 0) - 10  # past the echo of a SIGTERM
        assert signals.should_stop()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


SHARED: dict[str, Any] = {
    "method": "calibrate", "calibration": {"dataset": "bundled", "num_samples": 1, "max_seq_length": 8},
}  # fmt: skip


def test_a_further_node_says_that_its_ranks_are_gone_before_it_ends_the_step(
    tmp_path: Path, source: Path, batch: BatchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(batch, recipe(tmp_path, "a", source, **SHARED))
    batch.record("a", "submitted", executor="slurm", job="7_0")
    monkeypatch.setattr(cluster_job, "_VERDICT_SECONDS", 0.1)
    monkeypatch.setattr(cluster_job, "_POLL_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match="ended with 7, and the first node went on"):
        _run_further_node(batch, entry, Slot(), ["-c", "raise SystemExit(7)"])
    _, lost = batch.attempts("a")
    assert lost["fact"] == "lost" and "ended with 7" in lost["reason"]


def test_the_first_node_gives_the_block_up_at_once_if_another_has_lost_its_ranks(
    tmp_path: Path, source: Path, batch: BatchDirectory
) -> None:
    """Its own ranks would wait for them; Slurm, which ends them late, would end the requeued job's too."""
    entry = entry_of(batch, recipe(tmp_path, "a", source, **SHARED))
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"])
    before = [signal.getsignal(number) for number in numbers]
    hooks = Hooks(batch.path, None, None, lambda text, level: None)
    environment: Any = SimpleNamespace(
        cluster="local", num_nodes=2, job_id="7_0", raw_job_id="7", paths=SimpleNamespace(folder=tmp_path)
    )

    def lose() -> None:
        while not any(attempt["fact"] == "begun" for attempt in batch.attempts("a")):
            time.sleep(0.01)
        batch.record("a", "lost", reason="the agent on node2 ended with 1")

    def requeue(number: int, frame: object) -> None:
        raise SystemExit(-1)

    batch.record("a", "lost", reason="a job before this one")
    watcher = threading.Thread(target=lose)
    try:
        signal.signal(numbers[-1], requeue)
        first = _FirstNode(
            Job(batch.path, "a", Rules(), Resources(), Slot(), hooks), batch, entry, environment,
            Signals(batch, environment, 600), hooks,
        )  # fmt: skip
        watcher.start()
        with pytest.raises(SystemExit):
            first.work(["-c", "import time; time.sleep(60)"])
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    watcher.join()
    attempts = {attempt["fact"]: attempt for attempt in batch.attempts("a")}
    assert os.waitpid(attempts["begun"]["pid"], 0)[1] == signal.SIGKILL
    assert attempts["requeued"]["why"] == "loss" and "node2 ended with 1" in attempts["requeued"]["reason"]
    assert attempts["requeued"]["seconds"] < 60
