"""One run over two nodes of a real Slurm: the bytes of a single process, whatever happens to a node on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.batch_runs import QWEN, V4, converted, facts, files, single_run, write_recipe
from tests.slurm.local_cluster import NODES, LocalSlurm
from tests.slurm.slurm_runs import DATA, blocks, ended, first_block, job_of, processes, submit, told
from workflows.interrupts import NOTICE

pytestmark = pytest.mark.slurm
TWO = ("hours=1", "nodes=2")


@pytest.mark.parametrize(
    "how",
    ["scancel --signal=USR2", "scancel --signal=TERM", "the first job's process", "the second job's process", "a rank"],
)
def test_two_nodes(
    cluster: LocalSlurm, sources: dict[str, Path], reference: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    batch = tmp_path / "b.run"
    submit(batch, write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=DATA), resources=TWO)
    first_block(tmp_path, "qwen")
    job = job_of(batch, "qwen")
    first, second = (processes(f"SLURMD_NODENAME={node}", f"SLURM_JOB_ID={job}\0") for node in NODES)
    ranks = [pid for pid in second if pid in processes("workflows.run", "RANK=1\0")]
    assert len(ranks) == 1
    if how.startswith("scancel"):
        subprocess.run([*how.split(), job], check=True)
    elif how == "a rank":
        os.kill(ranks[0], signal.SIGKILL)
    else:
        supervisors = processes(f"{sys.executable}\0-u\0-m\0submitit.core._submit")
        (supervisor,) = set(first if "first" in how else second) & set(supervisors)
        os.kill(supervisor, signal.SIGKILL)
    assert ended(batch, cluster)["qwen"]["state"] == "done"
    assert files(tmp_path, "qwen") == reference
    requeued = facts(batch, "qwen", "requeued")
    assert [line["host"] for line in facts(batch, "qwen", "begun")] == ["node1"] * (1 + len(requeued)), told(batch)
    if how == "the second job's process":
        # Where the other node needs more than MessageTimeout (10 s) to end, Slurm repeats after a minute that its step has to.
        assert all(line["why"] == "preempted" for line in requeued[1:]), told(batch)
    else:
        assert len(requeued) == 1, told(batch)
    assert blocks(tmp_path, "qwen") == [0, 1, 2]
    why = requeued[0]["why"]
    if how.startswith("scancel"):
        # Slurm's signal reached both nodes, and the block under way was finished, once.
        told_first, _, later = (batch / "runs/qwen/log.txt").read_bytes().partition(NOTICE)
        assert why == "preempted" and later.count(b"block 1/3") + told_first.count(b"block 1/3") == 1
        assert facts(batch, "qwen", "ended")[0]["outcome"] == "stopped" and later, told(batch)
    else:
        # Where a job's process is lost, Slurm ends the step on the other node with the SIGTERM of a preemption.
        assert why == "loss" or (how == "the second job's process" and why == "preempted"), told(batch)
    assert not processes("SLURMD_NODENAME=node", f"SLURM_JOB_ID={job}\0")


def test_work_for_one_process_leaves_the_second_node_alone(
    cluster: LocalSlurm, sources: dict[str, Path], tmp_path: Path
) -> None:
    batch, recipe = tmp_path / "b.run", write_recipe(tmp_path, "v4", sources["v4"], V4, **converted())
    submit(batch, recipe, resources=TWO)
    assert ended(batch, cluster)["v4"]["state"] == "done", told(batch)
    assert files(tmp_path, "v4") == single_run(recipe, tmp_path / "alone")
    assert not (batch / "runs/v4/log.node2.txt").exists() and len(facts(batch, "v4", "begun")) == 1
