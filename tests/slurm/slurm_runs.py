"""Batches in a real Slurm: how tests submit them, wait for them and look at their jobs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests.integration.batch_runs import facts, journal, run_batch, summary, wait_for
from tests.slurm.local_cluster import LocalSlurm

#: Blocks of a second or more: long enough to be hit.
DATA = {"dataset": "bundled", "num_samples": 240, "max_seq_length": 256, "batch_size": 1}


def submit(batch: Path, *recipes: Path, resources: tuple[str, ...] = ("hours=1",), tries: int = 3) -> None:
    """`python -m workflows.batch ... --executor slurm`; returns when the jobs are submitted."""
    options = [option for pair in resources for option in ("--resource", pair)]
    options += ["--executor", "slurm", "--backoff", "0.1", "--tries", str(tries)]
    done = run_batch(*recipes, "--directory", batch, *options)
    assert done.returncode == 0, done.stderr


def queue() -> list[str]:
    """The numbers of all jobs that Slurm has."""
    told = subprocess.run(["squeue", "--noheader", "--format=%i"], capture_output=True, text=True, check=True)
    return told.stdout.split()


def ended(batch: Path, cluster: LocalSlurm, seconds: float = 600) -> dict[str, dict[str, Any]]:
    """Waits until every run is done or failed and Slurm has no job of this batch; the rows of its summary."""

    def over() -> bool:
        rows = summary(batch)
        mine = [job_of(batch, name) for name in rows if facts(batch, name, "submitted")]
        return not set(mine) & set(queue()) and all(row["state"] in ("done", "failed") for row in rows.values())

    try:
        wait_for(over, "the batch's end", seconds)
    except AssertionError:
        raise AssertionError(f"{summary(batch)}\n{told(batch)}\n{cluster.logs()}") from None
    return summary(batch)


def told(batch: Path) -> str:
    """What the jobs and the runs of a batch have printed."""
    logs = [
        *(batch / "jobs").glob("*_log.out"),
        *(batch / "runs").glob("*/log*.txt"),
        *(batch / "runs").glob("*/*.jsonl"),
    ]
    return "\n".join(f"--- {path.relative_to(batch)}\n{path.read_text()}" for path in sorted(logs))


def job_of(batch: Path, name: str) -> str:
    return str(facts(batch, name, "submitted")[-1]["job"])


def first_block(folder: Path, name: str) -> None:
    wait_for(lambda: journal(folder, name), "the first block")


def blocks(folder: Path, name: str) -> list[int]:
    """The blocks in the order in which they were finished; none twice where nothing was calculated twice."""
    return [line["block"] for line in journal(folder, name)]


def status(batch: Path) -> str:
    """`--status`, as a table."""
    done = run_batch("--directory", batch, "--status")
    assert done.returncode == 0, done.stderr
    return done.stdout


def processes(*words: str) -> list[int]:
    """Living processes with all `words` in command or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if all(word.encode() in text for word in words):
            found.append(int(process.name))
    return found
