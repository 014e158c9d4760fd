"""A vision model's output in the real vLLM: text prompts, its tower loaded."""

from __future__ import annotations

from pathlib import Path

from tests import converted
from tests.models import any_family
from tests.reference.engine import random_prompts, serve


def test_a_vision_model_is_served_with_its_tower(tmp_path: Path) -> None:
    """Qwen3.5-MoE: experts, gated delta nets (which vLLM runs in BF16 here, and a prompt of one token only as repaired)."""
    source, output = any_family.write(tmp_path / "source", "qwen3_5_moe"), tmp_path / "output"
    converted.run(converted.converting(source, output, ["Linear"], ignore=["part:head"]))
    checks, result, _, _ = serve(output, tmp_path / "logs", random_prompts(1000, (1, 40)), dtype="bfloat16")
    assert {check.id: check.figure for check in checks.values() if check.verdict == "FAIL"} == {}
    assert checks["serving.tensors"].verdict == checks["serving.w4a4"].verdict == "PASS"
    assert [entry["tokens"] for entry in result["prompts"]] == [1, 40]
