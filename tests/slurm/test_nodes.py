"""One run over two nodes of a real Slurm: the bytes of a single process, whatever happens to a node on the way."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.batch_runs import QWEN, V4, converted, facts, files, single_run, write_recipe
from tests.slurm.local_cluster import LocalSlurm
from tests.slurm.slurm_runs import DATA, blocks, ended, first_block, job_of, processes, submit, told
from workflows.interrupts import NOTICE

pytestmark = pytest.mark.slurm
TWO = ("hours=1", "nodes=2")


@pytest.mark.parametrize("how", ["scancel --signal=USR2", "scancel --signal=TERM", "a job's process", "a rank"])
def test_two_nodes(
    cluster: LocalSlurm, sources: dict[str, Path], reference: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    batch = tmp_path / "b.run"
    submit(batch, write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=DATA), resources=TWO)
    first_block(tmp_path, "qwen")
    job = job_of(batch, "qwen")
    second = processes("SLURMD_NODENAME=node2", f"SLURM_JOB_ID={job}\0")
    ranks = [pid for pid in second if pid in processes("workflows.run", "RANK=1\0")]
    assert len(ranks) == 1
    if how.startswith("scancel"):
        subprocess.run([*how.split(), job], check=True)
    elif how == "a rank":
        os.kill(ranks[0], signal.SIGKILL)
    else:
        (supervisor,) = [pid for pid in second if pid in processes("submitit.core._submit")]
        os.kill(supervisor, signal.SIGKILL)
    assert ended(batch, cluster)["qwen"]["state"] == "done"
    assert files(tmp_path, "qwen") == reference
    assert [line["host"] for line in facts(batch, "qwen", "begun")] == ["node1"] * 2, told(batch)
    assert blocks(tmp_path, "qwen") == [0, 1, 2]
    why = facts(batch, "qwen", "requeued")[0]["why"]
    if how.startswith("scancel"):
        # Slurm's signal reached both nodes, and the block under way was finished, once.
        told_first, _, later = (batch / "runs/qwen/log.txt").read_bytes().partition(NOTICE)
        assert why == "preempted" and later.count(b"block 1/3") + told_first.count(b"block 1/3") == 1
        assert facts(batch, "qwen", "ended")[0]["outcome"] == "stopped" and later, told(batch)
    else:
        # Where a job's process is lost, Slurm ends the step on the other node with the SIGTERM of a preemption.
        assert why == "loss" or (how != "a rank" and why == "preempted"), told(batch)
    assert not processes("SLURMD_NODENAME=node", f"SLURM_JOB_ID={job}\0")


def test_work_for_one_process_leaves_the_second_node_alone(
    cluster: LocalSlurm, sources: dict[str, Path], tmp_path: Path
) -> None:
    batch, recipe = tmp_path / "b.run", write_recipe(tmp_path, "v4", sources["v4"], V4, **converted())
    submit(batch, recipe, resources=TWO)
    assert ended(batch, cluster)["v4"]["state"] == "done", told(batch)
    assert files(tmp_path, "v4") == single_run(recipe, tmp_path / "alone")
    assert not (batch / "runs/v4/log.node2.txt").exists() and len(facts(batch, "v4", "begun")) == 1
