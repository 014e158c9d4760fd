"""What a run says that it has proven of a family."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.checkpoint.files import write_json
from calibration.plan.task import Task
from calibration.runs.journal import RunDirectory
from tests.exported import recipe, task_of
from tests.models import standard
from verify.checks import LEVELS, Check
from workflows.run.proofs import REHEARSAL, SERVER, one_line, proofs

LEVEL = dict.fromkeys(LEVELS, "UNCHECKED")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return task_of(recipe(standard.write(tmp_path / "source", "llama"), tmp_path / "output", ["Linear"]))


def test_before_calibration_only_the_names_are_proven(task: Task) -> None:
    found = proofs(task, RunDirectory(task.output), [])
    verdicts = {name: text.partition(":")[0] for name, text in found.items()}
    unchecked = dict.fromkeys(("blocks", "observers", "server", "forward"), "UNCHECKED")
    assert verdicts == {"names": "PASS"} | unchecked | LEVEL


def test_a_run_that_got_through_says_what_that_proves(task: Task) -> None:
    directory = RunDirectory(task.output)
    directory.open()
    directory.record("calibrated", data="text", tokens_per_expert="", seconds=1.0)
    write_json(directory.path / SERVER, {"plan": task.plan.digest, "verdict": "PASS", "figure": "Class of vLLM 0"})
    rehearsed = {"id": "serving.forward", "verdict": "PASS", "figure": "KL 1e-13"}
    write_json(directory.path / REHEARSAL, {"plan": task.plan.digest, "checks": [rehearsed]})
    found = proofs(task, directory, [Check("structure.open", "PASS", "", "", "", "")])
    assert found["blocks"] == "PASS: each of 2 traced blocks equals the model's own forward"
    assert found["observers"] == "PASS: every observer of 14 modules saw tokens"
    assert found["server"] == "PASS: Class of vLLM 0"
    assert found["forward"] == "PASS: KL 1e-13"
    said = "names PASS; blocks PASS; observers PASS; server PASS; forward PASS; structure PASS; "
    said += "fidelity UNCHECKED; serving UNCHECKED"
    assert one_line(found) == said


def test_an_answer_about_another_plan_proves_nothing(task: Task) -> None:
    directory = RunDirectory(task.output)
    directory.open()
    write_json(directory.path / SERVER, {"plan": "other", "verdict": "PASS", "figure": ""})
    rehearsed = {"id": "serving.forward", "verdict": "PASS", "figure": ""}
    write_json(directory.path / REHEARSAL, {"plan": "other", "checks": [rehearsed]})
    found = proofs(task, directory, [])
    assert found["server"] == "UNCHECKED: vLLM's class was not asked in this run"
    assert "server UNCHECKED: vLLM's class" in one_line(found)
    assert found["forward"].startswith("UNCHECKED: no dress rehearsal compared")
