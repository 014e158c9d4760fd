"""Experts as single linear layers compute what transformers' own experts do."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from llmcompressor.modeling.moe import helpers
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from calibration.engine.experts import ExpertCalibration, Pass
from calibration.engine.stacked_experts import Routing
from calibration.families.stacked import projections
from calibration.model.linear_experts import linearize_experts
from tests.models import any_family

#: Limits of single blocks (and no declared layout), limits in a field of the config, factors in others, constants of the class
#: with gate and up interleaved, no gate.
ACTIVATIONS = ("step3p7", "hy_v4", "minimax_m3_vl", "gpt_oss", "nemotron_h")


@pytest.mark.parametrize("family", ACTIVATIONS)
def test_single_experts_compute_what_the_stack_does(family: str) -> None:
    model = any_family.empty_model(family)
    stacks = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "down_proj", None), nn.Parameter)}
    name, stack = list(stacks.items())[-1]
    stack = filled(stack)
    for parameter in stack.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    linearize_experts(model)
    single = filled(model.get_submodule(name))
    assert isinstance(single, LinearExperts2D)
    for leaf, projection, first in projections(stack):
        whole = stack.get_parameter(leaf).detach()
        assert len(whole) == single.num_experts
        for number in range(len(whole)):
            offset = number * whole.stride(0) + first.storage_offset()
            single[number].get_parameter(projection).data.copy_(whole.as_strided(first.shape, first.stride(), offset))
    hidden, routed = torch.randn(6, single[0].up_proj.in_features), torch.tensor([[0, 3]] * 6)
    weights = torch.tensor([[0.25, 0.75]]).expand(6, 2)
    made, expected = single(hidden, routed, weights), stack(hidden, routed, weights)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", [*Pass, None])
def test_experts_without_weights_return_their_input(kind: Pass | None) -> None:
    """LongCat-Flash has 8 experts with weights and 4 without: outside a calibration (None) and in each of its passes."""
    model = any_family.empty_model("longcat_flash")
    stack = filled(model.model.layers[0].mlp.experts)
    for parameter in stack.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    linearize_experts(model)
    single = filled(model.model.layers[0].mlp.experts)
    assert isinstance(single, LinearExperts2D) and single.num_experts == 8
    for number in range(single.num_experts):
        gate, up = stack.gate_up_proj[number].chunk(2)
        for leaf, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", stack.down_proj[number])):
            single[number].get_submodule(leaf).weight.data.copy_(weight)
    hidden = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    routed = torch.tensor([[0, 3, 8], [8, 9, 11], [7, 6, 5], [11, 2, 10], [0, 1, 2], [9, 4, 8]])
    weights = torch.rand(6, 3, generator=torch.Generator().manual_seed(2))
    calibration = ExpertCalibration()
    with ExitStack() as stacked:
        if kind is not None:
            stacked.enter_context(calibration.installed())
            stacked.enter_context(calibration.running(kind))
        made = single(hidden, routed, weights)
    expected = stack(hidden, routed, weights)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
    if kind is Pass.CALIBRATE:
        assert calibration.tokens(single) == {0: 2, 1: 1, 2: 2, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1}


def test_the_sum_over_rows_takes_the_input_for_experts_without_weights() -> None:
    """As accelerators compute it: one product over the rows of the experts with weights, here zero."""
    hidden = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])
    routing = Routing.of(2, 8, torch.tensor([[0, 8, 11], [9, 3, 7]]), weights)
    assert routing.counts == [1, 0, 0, 1, 0, 0, 0, 1]
    made = routing.summed(torch.zeros(sum(routing.counts), 4), hidden)
    assert torch.equal(made, hidden * torch.tensor([[0.375], [0.5]]))


def filled(module: nn.Module) -> nn.Module:
    return module.to_empty(device="cpu").float()


def test_the_source_of_a_class_is_parsed_once_not_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_local_experts=4, num_hidden_layers=3, vocab_size=64
    )
    with torch.device("meta"):
        model, parsed = MixtralForCausalLM(config), list[type]()
    parse = helpers.get_use_experts_implementation_args
    monkeypatch.setattr(helpers, "get_use_experts_implementation_args", lambda kind: parsed.append(kind) or parse(kind))
    linearize_experts(model)
    assert parsed == [MixtralExperts]
    assert sum(isinstance(module, LinearExperts2D) for module in model.modules()) == 3
