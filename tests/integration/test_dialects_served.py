"""Both dialects of one checkpoint in the real vLLM: the same logits in float32, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.converted import LINEAR, converting, run
from tests.models import deepseek_v4, standard
from tests.reference.engine import random_prompts, serve
from workflows import convert_dialect

ROUTED = [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"]
#: Base -> scheme. Every reader of vLLM's: FP8 with NVFP4 experts, the same with plain attention, modelopt's dense, weight-only
#: and expert layers.
CASES = {
    "deepseek_v4 fp8_mxfp4": "NVFP4", "deepseek_v4 bf16": "NVFP4", "llama": "NVFP4", "llama weight-only": "NVFP4A16",
    "qwen3_moe": "NVFP4", "mixtral": "NVFP4",
}  # fmt: skip
ALWAYS = ("deepseek_v4 fp8_mxfp4", "llama weight-only")


@pytest.mark.parametrize("base", [pytest.param(b, marks=() if b in ALWAYS else pytest.mark.slow) for b in CASES])
def test_both_dialects_are_served_to_the_same_logits(base: str, tmp_path: Path) -> None:
    family, _, form = base.partition(" ")
    source, ours, theirs = tmp_path / "source", tmp_path / "compressed_tensors", tmp_path / "nvidia"
    if family == "deepseek_v4":
        deepseek_v4.write(source, form)  # type: ignore[arg-type]
    else:
        standard.write(source, family)  # type: ignore[arg-type]
    # A power of two has an exact inverse, so that both dialects mean the same activations.
    options = {"convert": {"input_amax": 2688.0 / 256}}
    run(converting(source, ours, ROUTED if family == "deepseek_v4" else LINEAR, CASES[base], **options))
    assert convert_dialect.main([str(ours), str(theirs), "--to", "nvidia"]) == 0
    logits, given = [], []
    for output in (ours, theirs):
        checks, result, _, found = serve(output, tmp_path / f"logs of {output.name}", random_prompts(1024))
        assert {check.id for check in checks.values() if check.verdict == "FAIL"} == set(), checks
        assert result["w4a4"] is (CASES[base] == "NVFP4")
        logits.append(found)
        given.append(result["given_inputs"])
    assert len(logits[0]) == len(logits[1]) == 4
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))
    # One meaning of the scale: a divisor in one dialect, a factor in the other.
    assert given[0] == given[1] and (given[0] is None) == (CASES[base] == "NVFP4A16"), given
    assert given[0] is None or (given[0]["saturated"], given[0]["not_looked_at"]) == (0, {}), given
