"""Experts as single linear layers compute what transformers' own experts do."""

from __future__ import annotations

import pytest
import torch
from llmcompressor.modeling.moe import helpers
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

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
