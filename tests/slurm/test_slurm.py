"""A batch in a real Slurm: jobs that are preempted and requeued write the same bytes as single runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.batch_runs import QWEN, V4, facts, files, run_batch, single_run, wait_for, write_recipe
from tests.slurm.local_cluster import NODES, LocalSlurm
from tests.slurm.slurm_runs import DATA, blocks, ended, first_block, job_of, queue, status, submit

pytestmark = pytest.mark.slurm


def test_an_array_of_runs_one_of_them_broken(cluster: LocalSlurm, sources: dict[str, Path], tmp_path: Path) -> None:
    batch = tmp_path / "b.run"
    recipes = [
        write_recipe(tmp_path, "qwen", sources["qwen"], QWEN),
        write_recipe(tmp_path, "v4", sources["v4"], V4),
        write_recipe(tmp_path, "bad", sources["qwen"], QWEN, calibration={"dataset": str(tmp_path / "nothing.txt")}),
    ]
    submit(batch, *recipes)
    assert job_of(batch, "qwen").partition("_")[0] == job_of(batch, "v4").partition("_")[0]  # one array
    status = run_batch("--directory", batch, "--status")
    assert status.returncode == 0 and job_of(batch, "qwen") in status.stdout, status.stdout
    # The same command again submits nothing twice.
    submit(batch, *recipes)
    assert len(facts(batch, "qwen", "submitted")) == 1
    rows = ended(batch, cluster)
    assert {name: row["state"] for name, row in rows.items()} == {"qwen": "done", "v4": "done", "bad": "failed"}
    assert "nothing.txt" in rows["bad"]["reason"]
    for recipe in recipes[:2]:
        assert files(tmp_path, recipe.stem) == single_run(recipe, tmp_path / "alone")
    assert "<b>bad</b>" in (batch / "summary.html").read_text()


@pytest.mark.parametrize(
    "how", ["scancel --signal=USR2", "scancel --signal=TERM", "scontrol requeue", "a kill of the run"]
)
def test_preempted_in_the_middle(
    cluster: LocalSlurm, sources: dict[str, Path], reference: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    batch = tmp_path / "b.run"
    submit(batch, write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=DATA))
    first_block(tmp_path, "qwen")
    if how.startswith("a kill"):
        subprocess.run(["kill", "-9", str(facts(batch, "qwen", "begun")[0]["pid"])], check=True)
    else:
        subprocess.run([*how.split(), job_of(batch, "qwen")], check=True)
    assert ended(batch, cluster)["qwen"]["state"] == "done"
    assert files(tmp_path, "qwen") == reference
    begun, over = facts(batch, "qwen", "begun"), facts(batch, "qwen", "ended")
    assert len(begun) == 2
    log = (batch / "runs" / "qwen" / "log.txt").read_text()
    assert "resuming with block" in log and blocks(tmp_path, "qwen") == [0, 1, 2]
    if how.startswith("scancel"):
        # The block under way was finished, once: nobody sent the signal that would have stopped it at once.
        assert over[0]["outcome"] == "stopped" and "stopped after block" in log
        assert facts(batch, "qwen", "requeued")


def test_preempted_by_a_job_of_higher_priority(
    cluster: LocalSlurm, sources: dict[str, Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    batch = tmp_path / "b.run"
    submit(batch, write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=DATA))
    first_block(tmp_path, "qwen")
    subprocess.run(
        ["sbatch", "--partition=high", "--exclusive", f"--nodes={len(NODES)}", "--output=/dev/null", "--wrap=sleep 1"],
        check=True,
        capture_output=True,
    )
    assert ended(batch, cluster)["qwen"]["state"] == "done"
    assert files(tmp_path, "qwen") == reference
    assert len(facts(batch, "qwen", "begun")) == 2


def test_a_cancelled_job_stays_cancelled(
    cluster: LocalSlurm, sources: dict[str, Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    """scancel's SIGTERM lets the block be finished, as a preemption does; but then nothing is requeued."""
    batch, recipe = tmp_path / "b.run", write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=DATA)
    submit(batch, recipe)
    first_block(tmp_path, "qwen")
    subprocess.run(["scancel", job_of(batch, "qwen")], check=True)
    wait_for(lambda: job_of(batch, "qwen") not in queue(), "the end of the job", 60)
    assert not facts(batch, "qwen", "requeued") and "cancelled" in status(batch), status(batch)
    submit(batch, recipe)
    assert ended(batch, cluster)["qwen"]["state"] == "done" and files(tmp_path, "qwen") == reference
