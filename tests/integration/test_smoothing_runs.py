"""Whole runs of recipes that smooth: killed, on several ranks, verified and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from recipes.checks import Fidelity
from tests.integration.attempts import Attempt, Case, same
from tests.integration.interrupted_runs import KillAt, finish
from tests.integration.rank_runs import go, messages
from tests.integration.whole_runs import LINEAR, SERVING, run, write_recipe
from tests.models import standard, uneven_norms
from verify.fidelity.fidelity import verify_with_forward

SMOOTH: dict[str, dict[str, Any]] = {
    "SmoothQuantModifier": {"SmoothQuantModifier": {}},
    "AWQModifier": {"AWQModifier": {"n_grid": 4, "duo_scaling": "both"}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smoothing")
    finish(["--help"], root / "log")
    uneven_norms.write(standard.write(root / "even", "qwen3_moe"), root / "qwen3_moe")
    return root


@pytest.mark.parametrize(("modifier", "quantizes"), [
    ("SmoothQuantModifier", "QuantizationModifier"), ("AWQModifier", "QuantizationModifier"), ("AWQModifier", "GPTQModifier"),
])  # fmt: skip
def test_killed_runs_resume_to_the_same_bytes(root: Path, modifier: str, quantizes: str) -> None:
    """Round to nearest repeats finished blocks from the source's weights: smoothing has changed no output of theirs."""
    case = Case(root / f"{modifier}-{quantizes}", root / "qwen3_moe", quantizes, smooth=SMOOTH[modifier])
    for part in range(1, 4):
        attempt = Attempt(case, f"step-{part}", KillAt(part * case.steps // 4))
        assert attempt.code == -9, attempt.text
        attempt.go()
        same(attempt, case)
    lost = Attempt(case, "lost", KillAt(case.steps // 2))
    for folder in lost.run_directory.glob("activations/*"):
        for path in folder.iterdir():
            path.unlink()
    lost.go()
    same(lost, case)


def test_two_ranks_write_the_bytes_of_one_and_a_search_is_refused(root: Path) -> None:
    case = Case(root / "ranks", root / "qwen3_moe", "QuantizationModifier", smooth=SMOOTH["SmoothQuantModifier"])
    attempt = Attempt(case, "two", run=False)
    assert go(attempt) == [0, 0], attempt.text
    same(attempt, case)
    refused = Attempt(case, "refused", run=False)
    refused.write(case.body | {"modifiers": [SMOOTH["AWQModifier"], case.body["modifiers"][1]]})
    assert go(refused) == [2, 2]
    assert "modifiers.0.AWQModifier" in messages(refused)[0] and "start it without torchrun" in messages(refused)[0]


@pytest.mark.parametrize(("model", "modifier"), [
    ("qwen3_moe", "SmoothQuantModifier"), ("mixtral", "AWQModifier"), ("llama", "SmoothQuantModifier"),
])  # fmt: skip
def test_a_smoothed_checkpoint_passes_and_is_served(model: Any, modifier: str, tmp_path: Path) -> None:
    source = uneven_norms.write(standard.write(tmp_path / "even", model), tmp_path / "source")
    modifiers = [SMOOTH[modifier], {"QuantizationModifier": {"targets": LINEAR, "scheme": "NVFP4"}}]
    # Random experts behind uneven norms: rounding to nearest without smoothing ends at 0.64, with it at 0.68.
    verify = {"serving": SERVING, "fidelity": {"min_propagated_cosine": 0.6}}
    recipe = write_recipe(tmp_path, source, LINEAR, modifiers=modifiers, verify=verify)
    done = run(recipe, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {level: result["verdicts"][level] for level in ("structure", "fidelity")} == {
        "structure": "PASS", "fidelity": "PASS"}  # fmt: skip
    checks = json.loads((tmp_path / "output.run" / "verify.json").read_text())["checks"]
    verdicts = {check["id"]: check["verdict"] for check in checks}
    assert verdicts["fidelity.smoothing"] == verdicts["fidelity.rounding"] == verdicts["serving.w4a4"] == "PASS"
    assert {name for name, verdict in verdicts.items() if verdict != "PASS"} <= {
        "serving.coherent", "serving.saturated_inputs", "fidelity.saturated_inputs", "fidelity.block_cosine"}  # fmt: skip
    # And without a recipe: the factors are found in the output.
    limits, formats = Fidelity(min_propagated_cosine=0.6), Formats(Checkpoint.open(source))
    found = {c.id: c for c in verify_with_forward(tmp_path / "output", None, formats, limits, None).checks}
    assert [check for check in found.values() if check.verdict == "FAIL"] == []
    assert found["fidelity.rescaled"].verdict == "WARN"
