"""Runs on a checkpoint that holds all experts of a block in one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.attempts import Attempt, Case, same
from tests.integration.interrupted_runs import KillAt, finish
from tests.models import any_family


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Llama-4: a stack's slices are columns, and its experts are called in a way of their own."""
    root = tmp_path_factory.mktemp("stacked-runs")
    finish(["--help"], root / "log")
    source = any_family.write(root / "source", "llama4_text")
    return Case(root / "case", source, "QuantizationModifier", ["part:routed expert", "part:shared expert"])


def test_killed_in_the_middle_it_resumes_to_the_same_bytes(case: Case) -> None:
    attempt = Attempt(case, "killed", KillAt(case.steps // 2))
    assert attempt.code == -9, attempt.text
    attempt.go()
    same(attempt, case)


def test_a_killed_conversion_resumes_to_the_same_bytes(case: Case, tmp_path: Path) -> None:
    sections = {"method": "convert", "calibration": None}
    whole = Attempt(case, "converted", KillAt(0, tmp_path / "steps"), **sections)
    assert whole.code == 0, whole.text
    attempt = Attempt(case, "killed-conversion", KillAt(int((tmp_path / "steps").read_text()) // 2), **sections)
    assert attempt.code == -9, attempt.text
    attempt.go()
    assert attempt.code == 0, attempt.text
    assert attempt.files() == whole.files()
