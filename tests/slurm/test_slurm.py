"""A batch in a real Slurm: jobs that are preempted and requeued write the same bytes as single runs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.batch_runs import (
    QWEN,
    V4,
    facts,
    files,
    journal,
    run_batch,
    single_run,
    summary,
    wait_for,
    write_recipe,
    write_sources,
)
from tests.slurm.local_cluster import LocalSlurm

pytestmark = pytest.mark.slurm
#: Blocks of some seconds: long enough to be hit.
DATA = {"dataset": "bundled", "num_samples": 48, "max_seq_length": 256, "batch_size": 1}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    with LocalSlurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def reference(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("reference")
    return single_run(write_recipe(root, "qwen", sources["qwen"], QWEN, calibration=DATA), root / "alone")


def submit(batch: Path, *recipes: Path, resources: tuple[str, ...] = ("hours=1",)) -> None:
    options = [option for pair in resources for option in ("--resource", pair)]
    done = run_batch(*recipes, "--directory", batch, "--executor", "slurm", "--backoff", "0.1", *options)
    assert done.returncode == 0, done.stderr


def ended(batch: Path, cluster: LocalSlurm, seconds: float = 900) -> dict[str, dict[str, Any]]:
    def over() -> bool:
        queue = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout
        return not queue.strip() and all(row["state"] in ("done", "failed") for row in summary(batch).values())

    try:
        wait_for(over, "the batch's end", seconds)
    except AssertionError:
        jobs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in (batch / "jobs").glob("*_log.out"))
        raise AssertionError(f"{summary(batch)}\n{jobs}\n{cluster.logs()}") from None
    return summary(batch)


def job_of(batch: Path, name: str) -> str:
    return str(facts(batch, name, "submitted")[-1]["job"])


def first_block(folder: Path, name: str) -> None:
    wait_for(lambda: journal(folder, name), "the first block")


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
    assert "going on with block" in log and [line["block"] for line in journal(tmp_path, "qwen")] == [0, 1, 2]
    if how.startswith("scancel"):
        # The block under way was finished, once: nobody sent the signal that would have stopped it at once.
        assert over[0]["outcome"] == "stopped" and "stopped behind block" in log
        assert facts(batch, "qwen", "requeued")


def test_preempted_by_a_job_of_higher_priority(
    cluster: LocalSlurm, sources: dict[str, Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    batch = tmp_path / "b.run"
    submit(batch, write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=DATA))
    first_block(tmp_path, "qwen")
    subprocess.run(
        ["sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"],
        check=True,
        capture_output=True,
    )
    assert ended(batch, cluster)["qwen"]["state"] == "done"
    assert files(tmp_path, "qwen") == reference
    assert len(facts(batch, "qwen", "begun")) == 2
