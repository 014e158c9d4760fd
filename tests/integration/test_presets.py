"""The presets: killed and resumed to the same bytes, written out in full, served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from recipes.presets import PRESETS
from tests.integration.attempts import TARGETS, Attempt, Case, same
from tests.integration.interrupted_runs import KillAt, finish
from tests.integration.whole_runs import LINEAR, SERVING, run, write_recipe
from tests.models import deepseek_v4, smollm2, standard
from tests.reference.engine import FORKED_PYTHON

DEEPSEEK = [r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$"]
SMALL = {"dataset": "bundled", "num_samples": 4, "max_seq_length": 64, "batch_size": 2}


def model(name: str, root: Path) -> tuple[Path, list[str]]:
    """The source, and what a recipe quantizes of it."""
    if name == "deepseek_v4":
        return deepseek_v4.write(root / "source", "fp8", o_lora_rank=64), DEEPSEEK
    if name == "smollm2":
        return smollm2.write(root / "source"), TARGETS
    return standard.write(root / "source", "qwen3_moe"), TARGETS


@pytest.mark.parametrize(
    "name", ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v4", "smollm2"))]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_killed_in_the_middle_it_resumes_to_the_same_bytes(tmp_path: Path, preset: str, name: str) -> None:
    finish(["--help"], tmp_path / "log")
    source, targets = model(name, tmp_path)
    case = Case(tmp_path / "case", source, "QuantizationModifier", targets, SMALL, preset)
    attempt = Attempt(case, "killed", KillAt(case.steps // 2))
    assert attempt.code == -9, attempt.text
    attempt.go()
    same(attempt, case)
    kept = yaml.safe_load((attempt.output / "recipe.yaml").read_text())
    assert "preset" not in kept
    assert PRESETS[preset].arguments.items() <= kept["modifiers"][-1][PRESETS[preset].modifier].items()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v4"])
@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_served_and_passes_every_check(tmp_path: Path, preset: str, name: str) -> None:
    source, _ = model(name, tmp_path)
    targets = DEEPSEEK if name == "deepseek_v4" else LINEAR
    recipe = write_recipe(tmp_path, source, targets, preset=preset, verify={"serving": SERVING})
    done = run(recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdicts"]["serving"] == "PASS"


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_smollm2_speaks_better_than_rounded_to_nearest(tmp_path: Path, preset: str) -> None:
    source = smollm2.write(tmp_path / "source")
    calibration = {"dataset": "bundled", "num_samples": 16, "max_seq_length": 512, "batch_size": 4}
    serving = {"python": FORKED_PYTHON, "max_tokens": 8, "prompts": ["The capital of France is"], "windows": 6}
    losses = {}
    for name in (None, preset):
        place = tmp_path / str(name)
        place.mkdir()
        sections = {"calibration": calibration, "verify": {"serving": serving}} | ({"preset": name} if name else {})
        done = run(write_recipe(place, source, LINEAR, **sections), "--json")
        assert done.returncode == 0, done.stderr
        losses[name] = json.loads((place / "output.run" / "serving.json").read_text())["source"]["agreement"]["kl"]
    assert losses[preset] < 0.85 * losses[None], losses
