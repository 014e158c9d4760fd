"""The traced blocks compute what the model's own forward computes, and the run notices where they do not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.helpers import calibration_forward_context

from calibration.data.padding import without_padding
from calibration.engine.results import BlockResult
from calibration.model import tracing
from calibration.model.parity import BF16_STEP, ParityError, require_parity
from tests.integration.engine_runs import STANDARD, Run, batches, even_products, ours, recipe, skeleton, stock_model


def run_and_watch_head(name: str) -> tuple[Run, list[torch.Tensor]]:
    """A run, and the final hidden states [batch, tokens, D] that the traced chain hands the head, per batch."""
    source, final = skeleton(name), list[torch.Tensor]()
    head = source.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: final.append(args[0].clone()))
    return ours(recipe(name), source), final


@pytest.mark.parametrize("name", [*STANDARD, "bf16", "fp8_mxfp4"])
def test_traced_chain_equals_the_whole_models_own_forward(name: str) -> None:
    """Against transformers' own load and untraced forward of the whole model, on every batch, one that came padded included."""
    run, final = run_and_watch_head(name)
    assert set(run.summary.parity.values()) == {0.0}
    assert len(run.summary.parity) == run.source.model.config.num_hidden_layers
    model, own = stock_model(name), list[torch.Tensor]()
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: own.append(args[0].clone()))
    with calibration_forward_context(model), moe_calibration_context():
        for batch in without_padding(batches()):
            model(**batch)
    assert len(own) == len(final) == 4
    for ours_, theirs in zip(final, own, strict=True):
        if even_products(run):
            assert torch.equal(ours_, theirs)
        else:  # a token between two experts may go to the other one: no bound on its largest value
            distance = float((ours_.float() - theirs.float()).norm() / theirs.float().norm())
            print(f"relative distance {distance:.4f}")
            assert distance <= 8 * BF16_STEP  # 0.002 to 0.038 with tests.uneven


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "mistral"])
def test_lost_causal_mask_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock llm-compressor's tracer loses the mask of these families."""
    monkeypatch.setattr(tracing, "repaired_tracing", nullcontext)
    done: list[BlockResult] = []
    with pytest.raises(ParityError, match=r"block 0: traced output differs .*max abs diff [0-9.]+"):
        ours(recipe(name), skeleton(name), watch=done.append)
    assert done == []


@pytest.mark.parametrize("name", ["llama", "qwen3", "bf16"])
def test_unrepaired_tracing_is_right_for_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "repaired_tracing", nullcontext)
    assert set(ours(recipe(name), skeleton(name)).summary.parity.values()) == {0.0}


def test_a_block_that_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per cent in one value of a later block stops the run at that block."""
    source = skeleton("qwen3")
    block = source.blocks["model.layers.1"]
    original = block.forward

    def unsteady(*args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = original(*args, **kwargs).clone()
        if HooksMixin._HOOKS_DISABLED:  # the comparison's own call
            output[0, 0, 0] *= 1.01
        return output

    monkeypatch.setattr(block, "forward", unsteady)
    with pytest.raises(ParityError, match="block 1: "):
        ours(recipe("qwen3"), source)


def test_parity_covers_odd_batches() -> None:
    """One sample per shape of batch is compared: a row of the padded batch is the second shape."""
    source, compared = skeleton("llama"), list[torch.Size]()
    require = require_parity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "calibration.engine.passes.require_parity",
            lambda what, traced, own: compared.append(traced.shape) or require(what, traced, own),
        )
        ours(recipe("llama"), source)
    assert len(compared) == 2 * (2 + 1)
