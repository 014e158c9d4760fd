"""What every executor is given and asked, whichever it is: a table, one that only notes what it is told, and the real ones."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from recipes.matrix import Resources
from tests.unit.batch.batches import finish, looked_at, recipe
from workflows.batch import executors
from workflows.batch.__main__ import main
from workflows.batch.attempt import Slot
from workflows.batch.executors import EXECUTORS, find_jobs, make_executor, submit_batch
from workflows.batch.hooks import Hooks
from workflows.batch.queue import Rules
from workflows.batch.state import BatchDirectory
from workflows.batch.submission import JobState, Submission


class Noted:
    """Submits nothing; its jobs are in the states that a test gives them."""

    waits = False

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.asked: list[list[str]] = []
        self.known: dict[str, JobState] = {}

    def submit(self, work: Submission) -> None:
        for entry in work.entries:
            self.submitted.append(entry.name)
            work.record_job(entry, f"{len(self.submitted)}_0")

    def states(self, jobs: Collection[str]) -> dict[str, JobState]:
        self.asked.append(sorted(jobs))
        return {job: state for job, state in self.known.items() if job in jobs}

    def stop(self, batch: BatchDirectory) -> None: ...


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    made = Noted()
    monkeypatch.setitem(EXECUTORS, "noted", lambda: made)
    return made


def test_an_executor_gets_what_is_sound_not_done_and_has_no_job(
    tmp_path: Path, source: Path, batch: BatchDirectory, noted: Noted
) -> None:
    paths = [recipe(tmp_path, name, source) for name in ("done", "a", "b")]
    paths.append(recipe(tmp_path, "broken", tmp_path / "nowhere"))
    entries, said = looked_at(batch, *paths).entries, list[str]()
    finish(entries[0])
    hooks = Hooks(batch.path, None, None, lambda text, level: said.append(text))
    batch.save(entries, slots=1)
    resources = {entry.name: Resources() for entry in entries}
    work = Submission("noted", batch, entries, resources, Rules(), [Slot()], hooks)
    submit_batch(noted, work)
    assert noted.submitted == ["a", "b"] and batch.attempts("a")[-1]["executor"] == "noted"
    assert batch.attempts("broken")[-1]["fact"] == "gave_up"
    # One of them is pending, the other was canceled: the next call submits that one alone.
    noted.known = {"1_0": JobState("pending", ended=False), "2_0": JobState("cancelled", ended=True)}
    jobs = find_jobs(batch, entries)
    assert jobs.under_way == {"a": "1_0 pending"} and jobs.ended == {"b": "job 2_0 cancelled"}
    assert noted.asked[-1] == ["1_0", "2_0"]  # one question for all of them
    submit_batch(noted, work)
    assert noted.submitted == ["a", "b", "b"] and "a: 1_0 pending" in said


def test_jobs_of_an_executor_that_is_not_in_the_table_are_left_alone(
    tmp_path: Path, source: Path, batch: BatchDirectory
) -> None:
    entries = looked_at(batch, recipe(tmp_path, "a", source)).entries
    batch.record("a", "submitted", executor="of a later version", job="1")
    assert find_jobs(batch, entries) == executors.Jobs()


@pytest.mark.parametrize("name", sorted(EXECUTORS))
def test_an_executor_knows_nothing_of_jobs_that_nobody_submitted(name: str) -> None:
    assert make_executor(name).states([]) == {}


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_an_executor_without_its_library_is_refused_before_the_preflight(
    tmp_path: Path, source: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "workflows.batch.cluster.submit", raising=False)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([str(recipe(tmp_path, "a", source)), "--executor", name, "--dry-run"]) == 4
    text = "".join(capsys.readouterr())
    assert "submitit is not installed here; pip install 'nvfp4-workflows[slurm]'" in text and "preflight" not in text
