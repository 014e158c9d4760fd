"""Our engine's scales against stock llm-compressor's, bit for bit."""

from __future__ import annotations

import pytest

from tests.integration.engine_runs import differing, ours, recipe, skeleton, stock


@pytest.mark.parametrize("name", ["llama", "qwen3", "bf16", "fp8", "fp8_mxfp4"])
def test_scales_equal_stock_llm_compressor(name: str) -> None:
    """For FP8 and MXFP4 the stock side is dequantized by transformers, independently of formats.py."""
    source = skeleton(name)
    run = ours(recipe(name), source)
    theirs = stock(name, source)
    assert run.scales.keys() == theirs.keys()
    assert {name.rpartition(".")[2] for name in theirs} == {"weight_scale", "weight_global_scale", "input_global_scale"}
    assert differing(run.scales, theirs) == []
