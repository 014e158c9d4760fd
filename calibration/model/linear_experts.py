"""Experts that transformers keeps in tensors of three dimensions, as one nn.Linear per projection of every expert."""

from __future__ import annotations

from copy import copy
from functools import cache

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import helpers
from llmcompressor.modeling.moe.linear_experts import ExpertMLPWithGate, LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from llmcompressor.utils.dev import skip_weights_initialize
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import _default_apply_gate

from calibration.families.stacked import UNDECLARED


class ExpertsWithIdentity(LinearExperts2D):  # type: ignore[misc]
    """Experts after whose `num_experts` others follow that return their input and have no weights (LongCat-Flash)."""

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, D], top_k_index and top_k_weights [T, k] -> [T, D]; each expert is called with its own tokens alone."""
        weighted = top_k_index < self.num_experts
        token, slot = torch.where(weighted)
        output = hidden * top_k_weights.masked_fill(weighted, 0).sum(-1, keepdim=True)
        made = super().forward(hidden[token], top_k_index[token, slot, None], top_k_weights[token, slot, None])
        return output.to(hidden.dtype).index_add(0, token, made)


#: Undeclared experts that compute more than their linear layers.
_BASES: dict[str, type[LinearExperts2D]] = {"LongcatFlashExperts": ExpertsWithIdentity}


def linearize_experts(model: PreTrainedModel) -> None:
    """Replaces the experts of an empty model. transformers' class patching would import every lazy module of transformers;
    replacing the empty modules gives the same tree."""
    for module in model.modules():
        _register(type(module))
    # llm-compressor reads and parses the class's module for every block anew, a tenth of a second each.
    parsed = cache(helpers.get_use_experts_implementation_args)
    with patch_attr(helpers, "get_use_experts_implementation_args", parsed):
        found = get_non_linearized_moes(model)
    # As llm-compressor makes them: random numbers for meta tensors take half of the time.
    with skip_weights_initialize():
        for name, experts in found:
            model.set_submodule(name, _gate_first(_linearized(experts, model.config)))


def _register(kind: type[nn.Module]) -> None:
    """Makes experts that transformers does not decorate known to llm-compressor, which else takes them for no experts."""
    if kind.__name__ not in UNDECLARED or LinearExperts2D.get_registration(kind) is not None:
        return
    transposed, halves = UNDECLARED[kind.__name__]
    LinearExperts2D._registry[kind] = type("LinearExperts2D", (_BASES.get(kind.__name__, LinearExperts2D),), {
        "is_transposed": transposed, "is_concatenated": halves, "has_bias": False, "has_gate": True,
        "_apply_gate": vars(kind).get("_apply_gate", _default_apply_gate),
    })  # fmt: skip


def _linearized(experts: nn.Module, config: PreTrainedConfig) -> LinearExperts2D:
    """One nn.Linear per projection of every expert of an empty module."""
    linear = LinearExperts2D.get_linear_experts_cls(type(experts))
    if linear is Llama4LinearExperts:  # takes sizes where the others take a config
        return linear(experts.num_experts, experts.hidden_size, experts.expert_dim, config.get_text_config())
    config = getattr(experts, "config", config).get_text_config()
    if issubclass(linear, ExpertsWithIdentity):  # its width is in a field that llm-compressor does not know
        config = copy(config)
        config.moe_intermediate_size = experts.intermediate_size
    made = linear(config)
    for key, value in vars(experts).items():  # what its own activation reads: limits, factors
        # A number of its own is the block's: llm-compressor reads limits from fields of the config that not all have.
        if not key.startswith("_") and (isinstance(value, float) or not hasattr(made, key)):
            setattr(made, key, value)
    return made


def _gate_first(experts: LinearExperts2D) -> LinearExperts2D:
    """Puts gate before up, as `_apply_gate` expects them: weights are read, and are adjacent in memory, in this
    order."""
    for expert in experts:
        if isinstance(expert, ExpertMLPWithGate):
            expert._modules = {leaf: expert._modules[leaf] for leaf in ("gate_proj", "up_proj", "down_proj")}
    return experts
