"""Runs with group scales weighted by importance: killed, on several ranks, and against round to nearest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.attempts import TARGETS, Attempt, Case, same
from tests.integration.interrupted_runs import KillAt, finish
from tests.integration.rank_runs import go
from tests.models import deepseek_v4, standard

DEEPSEEK = [r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$"]


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("deepseek_v4", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("weighted")
    finish(["--help"], root / "log")
    if request.param == "deepseek_v4":
        source, targets = deepseek_v4.write(root / "source", "fp8", o_lora_rank=64), DEEPSEEK
    else:
        source, targets = standard.write(root / "source", request.param), TARGETS
    return Case(root / "case", source, "QuantizationModifier", targets, weight_observer="nvfp4_weighted")


def test_killed_in_the_middle_it_resumes_to_the_same_bytes(case: Case) -> None:
    attempt = Attempt(case, "killed", KillAt(case.steps // 2))
    assert attempt.code == -9, attempt.text
    attempt.go()
    same(attempt, case)


def test_two_ranks_write_the_bytes_of_one(case: Case) -> None:
    attempt = Attempt(case, "ranks", run=False)
    assert go(attempt) == [0, 0], attempt.text
    same(attempt, case)


def test_its_scales_are_not_those_of_round_to_nearest_and_pass_fidelity(case: Case, tmp_path: Path) -> None:
    source, modifier = Path(case.body["source"]["checkpoint"]), case.body["modifiers"][0]["QuantizationModifier"]
    nearest = Case(tmp_path / "nearest", source, "QuantizationModifier", modifier["targets"])
    mine, other = case.reference.files(), nearest.reference.files()
    assert any(mine[name] != other[name] for name in mine if name.endswith(".safetensors"))
    checked = Attempt(case, "checked", verify={"structure": True, "fidelity": True})
    assert checked.code == 0 and "fidelity FAIL" not in checked.text, checked.text
