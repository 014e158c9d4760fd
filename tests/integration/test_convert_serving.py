"""What convert writes, served by the real vLLM and held against the independent reference in float32."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from calibration.plan import planner
from tests.converted import LINEAR, converting, failing, run, undoing
from tests.models import deepseek_v4, deepseek_v41, standard, torn
from tests.reference.compare import compare
from tests.reference.engine import random_prompts, serve
from tests.reference.model import decided, logits, reference_model

TOP1, KL = 0.995, 1e-4
ROUTED = [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"]


@pytest.mark.parametrize("scheme", ["NVFP4A16", "NVFP4"])
@pytest.mark.parametrize("source", ["fp8_mxfp4", "fp8", "bf16", "llama"])
def test_converted_checkpoints_serve_and_agree_with_the_reference(tmp_path: Path, source: str, scheme: str) -> None:
    if source == "llama":
        made = converting(standard.write(tmp_path / "source", source), tmp_path / "out", LINEAR, scheme)
    else:
        # As released today: FP8 with MXFP4 has a DSpark draft head, which vLLM on a CPU passes by.
        draft = {"draft_blocks": 3} if source == "fp8_mxfp4" else {}
        made = converting(deepseek_v4.write(tmp_path / "source", source, **draft), tmp_path / "out", scheme=scheme)
    run(made)
    assert failing(made) == set()
    checks, served, ids, engine = serve(tmp_path / "out", tmp_path / "logs", random_prompts(1024))
    assert {check.id for check in checks.values() if check.verdict == "FAIL"} == set()
    assert served["w4a4"] is (scheme == "NVFP4")
    model = reference_model(tmp_path / "out", quantize_inputs=scheme == "NVFP4")
    expected = logits(model, ids)
    masks = decided(model, ids, expected)
    agreement = compare(expected, engine, masks)
    print(source, scheme, agreement)
    assert agreement.top1 >= TOP1 and agreement.kl < KL, agreement


@pytest.mark.parametrize("shape", torn.SHAPES)
def test_vllm_loads_the_merged_weights_that_are_planned_in_tiles_and_refuses_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    source = torn.write(tmp_path / "source", monkeypatch, shape)

    def served(name: str) -> dict[str, Any]:
        made = converting(source, tmp_path / name, "Linear", "FP8_BLOCK", ignore=["lm_head"])
        run(made)
        return serve(tmp_path / name, tmp_path / f"{name}-logs", random_prompts(1024))[1]

    result = served("planned")
    assert result["ok"], result["error"]
    if shape != "whole":
        monkeypatch.setattr(planner, "stacked_heights", lambda *_: {})
        result = served("unasked")
        assert result["stage"] == "load" and "Weight output_partition_size = 192 is not divisible" in json.dumps(result)


def test_a_model_that_vllm_has_for_gpus_alone_is_unchecked_with_the_reason(tmp_path: Path) -> None:
    sizes = deepseek_v41.Sizes(experts=8, draft_experts=4)
    made = converting(
        deepseek_v41.write(tmp_path / "source", sizes=sizes), tmp_path / "out", ROUTED, export={"kept": "plain"}
    )
    run(made)
    checks, result, _, _ = serve(tmp_path / "out", tmp_path / "logs", random_prompts(1024))
    assert {check.verdict for check in checks.values()} == {"UNCHECKED"}
    why = r"vLLM [\d.]+ has no cpu variant of DeepseekV41ForCausalLM: \S+ is there for nvidia and amd alone"
    assert all(re.fullmatch(why, check.figure) for check in checks.values()), checks
    assert result["seconds"].get("load") is None


def test_plain_deepseek_v4_serves(tmp_path: Path) -> None:
    made = undoing(deepseek_v4.write(tmp_path / "source", "fp8_mxfp4"), tmp_path / "out")
    run(made)
    checks, served, _, _ = serve(tmp_path / "out", tmp_path / "logs", random_prompts(1024))
    assert {check.id for check in checks.values() if check.verdict == "FAIL"} == set()
    assert served["samples"] and all(sample["text"] is not None for sample in served["samples"])
