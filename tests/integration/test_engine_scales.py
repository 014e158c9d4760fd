"""Our engine's results against stock llm-compressor's, bit for bit."""

from __future__ import annotations

import pytest
from llmcompressor.modifiers.gptq import GPTQModifier

from tests.integration.engine_runs import (
    TARGETS,
    differing,
    differing_from_stock,
    even_products,
    ours,
    recipe,
    skeleton,
    stock,
)
from tests.uneven import uneven_products

SCALES = {"weight_scale", "weight_global_scale", "input_global_scale"}


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "bf16", "fp8", "fp8_mxfp4", "granitemoe", "llama4_text", "gemma4_text"]
)
def test_scales_equal_stock_llm_compressor(name: str) -> None:
    """Bit for bit where products are even (calibration.runs.row_invariance). For FP8 and MXFP4 the stock side is dequantized by
    transformers, independently of formats.py; for stacks of experts llm-compressor takes them apart."""
    source = skeleton(name)
    run = ours(recipe(name), source)
    theirs = {key: value for key, value in stock(name, source).items() if key.endswith("_scale")}
    assert {key.rpartition(".")[2] for key in theirs} == SCALES
    assert differing_from_stock(run, theirs) == []


def test_scales_are_stocks_up_to_rounding_where_products_depend_on_the_number_of_rows() -> None:
    """As on AMX processors and GPUs. The engine against itself keeps every bit there: the same batches are the same
    products, and the comparison with the model's own forward stays exact."""
    with uneven_products():
        source = skeleton("bf16")
        run = ours(recipe("bf16"), source)
        assert not even_products(run)
        theirs = {key: value for key, value in stock("bf16", source).items() if key.endswith("_scale")}
        assert differing(run.scales, theirs) != [] and differing_from_stock(run, theirs) == []
        assert set(run.summary.parity.values()) == {0.0}
        assert differing(run.parameters, ours(recipe("bf16"), skeleton("bf16")).parameters) == []


def test_weights_that_stay_exact_get_no_scale_and_change_no_input_scale() -> None:
    requantized = ours(recipe("fp8_mxfp4"), skeleton("fp8_mxfp4")).scales
    exact = ours(recipe("fp8_mxfp4", export={"kept": "plain"}), skeleton("fp8_mxfp4")).scales
    inputs = {name: value for name, value in requantized.items() if name.endswith(".input_global_scale")}
    assert inputs and differing({name: value for name, value in exact.items() if name in inputs}, inputs) == []
    weights = {name for name in exact if name.rpartition(".")[2] in ("weight_scale", "weight_global_scale")}
    assert weights and not [name for name in weights if ".ffn.experts." in name]


def test_weights_that_gptq_edited_equal_stock() -> None:
    """Two passes, on one block at a time."""
    source = skeleton("llama")
    groups = {"config_groups": {"group": {"targets": [TARGETS["other"]], "scheme": "NVFP4"}}}
    run = ours(recipe("llama", [{"GPTQModifier": groups}]), source)
    theirs, mine = stock("llama", source, [GPTQModifier()]), run.parameters
    assert differing(mine, {key: value for key, value in theirs.items() if key in mine}) == []
    plain = ours(recipe("llama"), skeleton("llama")).parameters
    leaves = ("q_proj.weight", "gate_proj.weight")
    assert {key for key in plain if key.endswith(leaves)} <= set(differing(run.parameters, plain))


def test_projections_that_are_served_as_one_share_their_weight_global_scale() -> None:
    """vLLM fuses wq_a and wkv; llm-compressor does not know and gives them different scales."""
    targets = [r"re:^layers\.\d+\.attn\.(wq_a|wkv)$"]
    modifiers = [{"QuantizationModifier": {"config_groups": {"attention": {"targets": targets, "scheme": "NVFP4"}}}}]
    scales = ours(recipe("bf16", modifiers), skeleton("bf16")).scales
    for block in range(3):
        pair = [scales[f"layers.{block}.attn.{leaf}.weight_global_scale"] for leaf in ("wq_a", "wkv")]
        assert pair[0] == pair[1]
