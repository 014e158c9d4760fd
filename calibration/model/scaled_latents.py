"""Attention that scales its queries behind a projection in transformers and before it in vLLM: the projection is given here what
it is given when it is served, so that its input scale is that of the served inputs."""

from __future__ import annotations

import torch
from torch import nn


def scale_latents(model: nn.Module) -> None:
    """LongCat-Flash multiplies its queries by (hidden_size / q_lora_rank)^0.5 (`mla_scale_q_lora`; 2 in the release):
    transformers 5.17 the output of `q_b_proj`, vLLM 0.32 the weight of the norm before it (`scale_mla_lora_norms_on_load` of
    models/longcat_flash.py). The norm does it here. Keys and values have the same place in both."""
    for module in model.modules():
        factor, norm = vars(module).get("mla_scale_q_lora"), module._modules.get("q_a_layernorm")
        if isinstance(factor, float) and isinstance(norm, nn.Module):
            kind = type(norm)
            norm.__class__ = type(kind.__name__, (_Scaled, kind), {})
            norm.factor = factor  # type: ignore[assignment]
            module.mla_scale_q_lora = 1.0  # type: ignore[assignment]


class _Scaled(nn.Module):
    factor: float

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = super().forward(hidden) * self.factor
        return scaled
