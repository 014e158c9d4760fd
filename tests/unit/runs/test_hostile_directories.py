"""Run and batch directories that came from elsewhere: nothing outside them is written, removed, killed or executed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibration.checkpoint.index import Checkpoint
from calibration.families.registry import family_of
from calibration.model.skeleton import _clean_config
from calibration.runs.journal import RunDirectory, process_began
from calibration.runs.resume import is_boundary
from recipes.errors import EnvironmentProblem
from recipes.places import own_scratch
from tests.models import standard
from workflows.batch import attempt as batch_child
from workflows.batch import executors
from workflows.batch.attempt import Child, Slot, _mark
from workflows.batch.state import BatchDirectory, Entry
from workflows.batch.submission import set_outstanding
from workflows.batch.summary import write_summary

NAMES = ("lock", "journal.jsonl", "events.jsonl", "logs", "activations", "plain-source", "skeleton", "report.html")


@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_a_run_directory_is_refused(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir() if name in NAMES[3:7] else precious.write_text("precious")
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / name).symlink_to(precious)
    with pytest.raises(EnvironmentProblem, match=rf"out\.run: {name}: a run directory holds no links"):
        RunDirectory(tmp_path / "out").open()
    assert precious.is_dir() or precious.read_text() == "precious"


def test_a_link_that_comes_later_is_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    run = RunDirectory(tmp_path / "out").open()
    for name in ("journal.jsonl", "events.jsonl"):
        (run.path / name).symlink_to(precious)
    run.event("stage_started", stage="x")
    with pytest.raises(EnvironmentProblem, match=r"journal\.jsonl: cannot be written"):
        run.record("shards")
    run.close()
    (run.path / "lock").unlink()
    (run.path / "lock").symlink_to(precious)
    assert not run.free()
    assert precious.read_text() == "precious"


def test_a_batch_directory_writes_through_no_link(tmp_path: Path) -> None:
    precious, batch = tmp_path / "precious", BatchDirectory(tmp_path / "b.run")
    precious.write_text("precious")
    (batch.path / "runs" / "a").mkdir(parents=True)
    for name in ("lock", "expected", "summary.lock", "runs/a/attempts.jsonl"):
        (batch.path / name).symlink_to(precious)
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        batch.open()
    batch.save([])
    for write in (lambda: set_outstanding(batch.path, ["a"], []), lambda: write_summary(batch)):
        with pytest.raises(OSError, match="symbolic links"):
            write()
    batch.record("a", "queued")
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "batch.lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        batch.claim(tmp_path / "out")
    assert precious.read_text() == "precious"


def test_a_journal_names_no_activations_of_others(tmp_path: Path) -> None:
    """They would be loaded, and removed when the block is finished."""
    output, files = tmp_path / "out", {"batch-000000.pt": "d"}
    run = RunDirectory(output)
    ours = [run.path / "activations" / "boundary-0002", own_scratch(tmp_path / "nvme", output) / "boundary-0002"]
    others = [
        tmp_path / "other.run" / "activations" / "boundary-0002",
        own_scratch(tmp_path / "nvme", tmp_path / "other") / "boundary-0002",
        run.path / "activations" / ".." / "logs",
        run.path / "activations",
        run.path / "activations" / "boundary-0002" / ".." / ".." / ".." / "boundary-0002",
        tmp_path / "boundary-0002",
        Path("/"),
    ]
    for place in ours:
        place.mkdir(parents=True)
        assert is_boundary(place, files, run, output)
    assert not any(is_boundary(place, files, run, output) for place in others)
    ours[0].rmdir()
    ours[0].symlink_to(tmp_path)
    assert not is_boundary(ours[0], files, run, output)
    assert not is_boundary(ours[1], {"../x.pt": "d"}, run, output)


def test_the_skeleton_is_written_over_no_file(tmp_path: Path) -> None:
    source, precious = standard.write(tmp_path / "source", "llama"), tmp_path / "precious"
    precious.write_text("precious")
    (source / "modeling.py").write_text("code")
    (tmp_path / "run" / "skeleton").mkdir(parents=True)
    for name in ("config.json", "config.json.partial", "modeling.py", "modeling.py.partial"):
        (tmp_path / "run" / "skeleton" / name).symlink_to(precious)
    checkpoint = Checkpoint.open(source)
    family = family_of(checkpoint.config, str(source), checkpoint.tensors)
    made = _clean_config(checkpoint, family, tmp_path / "run", True)
    assert (made / "modeling.py").read_text() == "code" and precious.read_text() == "precious"


@pytest.mark.parametrize("ours", [True, False])
def test_a_process_that_an_attempts_file_names_is_only_ended_if_the_batch_started_it(
    tmp_path: Path, ours: bool
) -> None:
    batch, entry = BatchDirectory(tmp_path / "b.run"), Entry("a", "a", "a.yaml", str(tmp_path / "out"))
    environment = os.environ | ({batch_child.MARK: _mark(batch, entry)} if ours else {})
    with subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], env=environment,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline()
        told: dict[str, Any] = {"pid": process.pid, "began": process_began(process.pid), "time": 0, "log_from": 0}
        child = Child.adopt(batch, entry, told, Slot())
        child.ask_to_stop()
        child.kill()
        if ours:
            assert process.wait(10) in (-signal.SIGTERM, -signal.SIGKILL)
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            process.kill()


def test_jobs_are_only_given_to_a_directory_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = BatchDirectory(tmp_path / "b.run")
    (batch.path / "jobs").mkdir(parents=True)
    executors._require_private(batch)
    (batch.path / "jobs").chmod(0o777)
    with pytest.raises(EnvironmentProblem, match=r"jobs: belongs to another user, is writable by everybody"):
        executors._require_private(batch)
    (batch.path / "jobs").chmod(0o755)
    monkeypatch.setattr(executors, "os", SimpleNamespace(geteuid=lambda: os.geteuid() + 1))
    with pytest.raises(EnvironmentProblem, match=r"b\.run: belongs to another user"):
        executors._require_private(batch)
