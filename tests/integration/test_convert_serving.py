"""What convert writes, served by the real vLLM and held against the independent reference in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.converted import LINEAR, converting, failing, run, undoing
from tests.models import deepseek_v4, standard
from tests.reference.compare import compare
from tests.reference.engine import random_prompts, serve
from tests.reference.model import decided, logits, reference_model

TOP1, KL = 0.995, 1e-4


@pytest.mark.parametrize("scheme", ["NVFP4A16", "NVFP4"])
@pytest.mark.parametrize("source", ["fp8_mxfp4", "fp8", "bf16", "llama"])
def test_converted_checkpoints_serve_and_agree_with_the_reference(tmp_path: Path, source: str, scheme: str) -> None:
    if source == "llama":
        made = converting(standard.write(tmp_path / "source", source), tmp_path / "out", LINEAR, scheme)
    else:
        made = converting(deepseek_v4.write(tmp_path / "source", source), tmp_path / "out", scheme=scheme)
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


def test_plain_deepseek_v4_serves(tmp_path: Path) -> None:
    made = undoing(deepseek_v4.write(tmp_path / "source", "fp8_mxfp4"), tmp_path / "out")
    run(made)
    checks, served, _, _ = serve(tmp_path / "out", tmp_path / "logs", random_prompts(1024))
    assert {check.id for check in checks.values() if check.verdict == "FAIL"} == set()
    assert served["samples"] and all(sample["text"] is not None for sample in served["samples"])
