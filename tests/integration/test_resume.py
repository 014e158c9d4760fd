"""Killed at any moment, the same command goes on at the first unfinished block and writes the very same bytes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.attempts import Attempt, Case, same
from tests.integration.interrupted_runs import KillAt, finish, start
from tests.models import standard

MODIFIERS = ("QuantizationModifier", "GPTQModifier")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("resume")
    source = standard.write(root / "source", "qwen3_moe")
    finish(["--help"], root / "log")  # the first start imports everything, and would be measured
    return {modifier: Case(root / modifier, source, modifier) for modifier in MODIFIERS}


def kill_once(case: Case, name: str, moment: float) -> None:
    """One kill, `moment` seconds after the start or, where the run was done by then, earlier; then the same command."""
    for number in range(20):
        attempt = Attempt(case, f"{name}-{number}", run=False)
        process = start([str(attempt.recipe), "--no-rehearsal"], attempt.log)
        process.join(moment * 0.7**number)
        process.kill()
        process.join()
        if process.exitcode == -9:
            settle(attempt, case)
            return
    pytest.fail("every run was done before it could be killed")


def settle(attempt: Attempt, case: Case) -> None:
    """The same command again. No block that the journal names is calculated again, and nothing at all where the last thing
    before the kill was that the run was complete."""
    finished = {line["block"] for line in attempt.journal()}
    complete = bool(attempt.journal("verified"))
    attempt.go()
    if complete:
        assert "done and verified before" in attempt.text
    else:
        assert [block for block in attempt.loaded() if block is not None] == [b for b in range(3) if b not in finished]
    same(attempt, case)


def parts(modifier: str, count: int, kills: int) -> list[Any]:
    """Slow loops in parts: a test may take ten minutes (pyproject.toml), on a busy machine too."""
    return [pytest.param(modifier, part, kills, marks=pytest.mark.slow) for part in range(1, count + 1)]


@pytest.mark.parametrize(
    ("modifier", "part", "kills"),
    [
        ("QuantizationModifier", 0, 6),
        ("GPTQModifier", 0, 2),
        *parts("QuantizationModifier", 6, 10),
        *parts("GPTQModifier", 4, 10),
    ],
)
def test_killed_at_random_moments(cases: dict[str, Case], modifier: str, part: int, kills: int) -> None:
    case, moments = cases[modifier], random.Random(f"{modifier} {part}")
    for number in range(kills):
        kill_once(case, f"random-{part}-{number}", moments.uniform(0.1, 0.95) * case.seconds)


def crash_at(case: Case, step: int, name: str) -> None:
    attempt = Attempt(case, name, KillAt(step))
    assert attempt.code == -9, f"step {step} of {case.steps} was not reached: {attempt.text}"
    settle(attempt, case)


@pytest.mark.parametrize("part", range(8))
def test_killed_at_a_step_that_changes_files(cases: dict[str, Case], part: int) -> None:
    """Between shard and activations, activations and journal line, journal line and removal, last block and index."""
    case = cases["QuantizationModifier"]
    crash_at(case, 1 + part * (case.steps - 1) // 7, f"step-{part}")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_killed_at_every_step_that_changes_files(cases: dict[str, Case], modifier: str, part: int) -> None:
    case = cases[modifier]
    for step in range(1 + part, case.steps + 1, 8):
        crash_at(case, step, f"every-{step}")


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_lost_activations_are_calculated_again(cases: dict[str, Case], modifier: str) -> None:
    """Round to nearest repeats the forward pass alone; edited weights must be calibrated again to be known."""
    case = cases[modifier]
    for step in range(case.steps // 4, case.steps, case.steps // 8):  # the first of these after a block
        attempt = Attempt(case, f"lost-{step}", KillAt(step))
        lost = list(attempt.run_directory.glob("activations/*"))
        if lost and attempt.journal():
            break
    assert attempt.code == -9 and lost
    for folder in lost:
        shutil.rmtree(folder)
    attempt.go()
    assert "are calculated again from the text" in attempt.text
    same(attempt, case)


def test_topped_up_experts_are_the_same_after_a_kill(tmp_path: Path) -> None:
    """The tokens that they are shown further are chosen again from the same candidates, with and without activations."""
    source = standard.write(tmp_path / "source", "qwen3_moe")
    data = {"dataset": "bundled", "num_samples": 3, "max_seq_length": 16, "batch_size": 2, "experts": {"topped_up": 20}}
    case = Case(tmp_path / "case", source, "QuantizationModifier", calibration=data)
    assert all(line["result"]["topped_up"] for line in case.reference.journal())
    for name, lost in (("kept", False), ("lost", True)):
        attempt = Attempt(case, name, KillAt(case.steps // 3))
        assert attempt.code == -9 and 0 < len(attempt.journal()) < 3
        for folder in attempt.run_directory.glob("activations/*") if lost else ():
            shutil.rmtree(folder)
        attempt.go()
        same(attempt, case)
