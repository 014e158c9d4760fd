"""Before a long run: does the real vLLM compute the model that transformers computes?"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.checkpoint import native
from calibration.model import text_model
from recipes.checks import Serving
from tests.exported import recipe, task_of
from tests.integration.interrupted_runs import finish
from tests.integration.mornings import long_night
from tests.integration.whole_runs import write_recipe
from tests.models import any_family
from tests.reference.engine import FORKED_PYTHON
from verify.checks import Check
from workflows.run.forward_proof import compare_forwards

ROWS = [random.Random(row).choices(range(1000), k=160) for row in range(4)]
#: vLLM rotates queries, transformers does not; no release has such a config (docs/families.md).
DISAGREES = {"layer_types": ["full_attention", "full_attention"]}


def source(directory: Path, family: str, changes: dict[str, Any] | None = None) -> Path:
    any_family.write(directory, family)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | (changes or {})))
    return directory


def compared(place: Path, family: str, changes: dict[str, Any] | None = None) -> Check:
    task = task_of(recipe(source(place / "source", family, changes), place / "output", ["Linear"], ignore=["lm_head"]))
    (place / "work").mkdir()
    return compare_forwards(task, ROWS, Serving(python=FORKED_PYTHON), place / "work", place / "logs")


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("mimo_v2_flash", marks=pytest.mark.slow)])
def test_the_same_model_in_both_passes(tmp_path: Path, family: str) -> None:
    check = compared(tmp_path, family)
    assert check.verdict == "PASS" and "top-1 1.000" in check.figure, check
    assert not list((tmp_path / "work").glob("plain*"))


def test_another_model_in_vllm_fails(tmp_path: Path) -> None:
    check = compared(tmp_path, "exaone_moe", DISAGREES)
    assert check.verdict == "FAIL" and re.search("at 90% of 640 positions, top-1 0.[4-6]", check.figure), check


@pytest.mark.slow
def test_another_model_in_transformers_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniMax-M2 as transformers 5.17 builds it by itself, with whole heads rotated."""
    monkeypatch.setattr(text_model, "_as_the_hub_means", dict)
    assert compared(tmp_path, "minimax_m2").verdict == "FAIL"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "verdict"),
    [("minimax_m2", None, "PASS"), ("qwen2_moe", None, "PASS"), ("exaone_moe", DISAGREES, "FAIL")],
)
def test_in_bf16_rounding_is_measured_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any] | None, verdict: str
) -> None:
    """As on an accelerator, where vLLM has no float32."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(native, "accelerator", lambda: None)
    check = compared(tmp_path, family, changes)
    assert check.verdict == verdict and "rounding alone costs" in check.figure, check


def test_what_vllm_cannot_run_is_unchecked_with_its_reason(tmp_path: Path) -> None:
    check = compared(tmp_path, "jamba")
    assert check.verdict == "UNCHECKED" and "vLLM did not run the source: " in check.figure, check
    assert "runs this model on other hardware only" in check.figure and "selective_scan_fwd" in check.figure


def rehearsed(directory: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    """The exit code, the text and rehearsal.json of a long night of a model that differs, up to its first block."""
    path = directory / "recipe.yaml"
    if not path.exists():
        made = source(directory / "source", "exaone_moe", DISAGREES)
        write_recipe(directory, made, [r"re:^model\.layers\.\d+\..*_proj$"])
    arguments = [str(path), "--stages", "inspect,rehearse", *options]
    code, text = finish(arguments, directory / "log", long_night)
    return code, text, json.loads((directory / "output.run" / "rehearsal.json").read_text())


def test_a_long_run_of_another_model_stops_before_it_begins(tmp_path: Path) -> None:
    code, text, kept = rehearsed(tmp_path)
    assert code == 5, text
    assert "dress rehearsal: serving.forward: KL " in text and "rehearse.forward: warn" in text, text
    assert not (tmp_path / "output").exists() and not list((tmp_path / "output.run").glob("miniature*"))
    assert kept["complete"] is False


@pytest.mark.slow
def test_a_recipe_may_run_it_all_the_same(tmp_path: Path) -> None:
    _, _, stopped = rehearsed(tmp_path)
    code, text, warned = rehearsed(tmp_path, "--set", "rehearse.forward=warn")
    assert code == 0 and "forward: WARN: KL " in text, text
    assert [check["verdict"] for check in warned["checks"] if check["id"] == "serving.forward"] == ["WARN"]
    # What was proven with `warn` holds for no run that wants to stop.
    assert warned["complete"] is True and warned["key"] != stopped["key"]


@pytest.mark.slow
def test_a_short_run_of_a_family_that_no_test_compares_compares_the_forwards_alone(tmp_path: Path) -> None:
    made = source(tmp_path / "source", "granitemoe")
    path = write_recipe(tmp_path, made, [r"re:^model\.layers\.\d+\..*_proj$"])
    code, text = finish([str(path), "--stages", "inspect,rehearse"], tmp_path / "log")
    assert code == 0 and "no dress rehearsal: " in text and "forward: PASS: KL " in text, text
    kept = json.loads((tmp_path / "output.run" / "rehearsal.json").read_text())
    assert [check["id"] for check in kept["checks"]] == ["serving.forward"] and kept["complete"] is False
    assert not list((tmp_path / "output.run").glob("miniature*"))
