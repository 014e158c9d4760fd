"""What vLLM 0.32 computes otherwise on a CPU than on GPUs, or not at all, done as there: the choice of experts with a
correction bias, experts that return their input, rotary embeddings of queries that have an axis of heads, and gated delta nets
on prompts of one token.

Runs inside vLLM's interpreter: imports vLLM only. On every other platform `register` does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router import cpu_router, zero_expert_router
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models import registry
from vllm.platforms import current_platform


def register() -> list[str]:
    """Repairs vLLM's classes; call before the engine is built. Returns what is repaired; empty if the platform is not the
    CPU."""
    if not current_platform.is_cpu():
        return []
    _register_biased_routing()
    _register_identity_experts()
    _register_rotary_heads()
    _register_one_token_convolution()
    registry._run_in_subprocess = _run
    return [
        "experts chosen with a correction bias outside groups: by score + bias, as vLLM's GPU routers do",
        "experts that return their input: in torch, which vLLM does in Triton alone",
        "rotary embeddings of queries [tokens, heads, width]: by vLLM's own torch code, as on GPUs",
        "convolutions of one token: with the stride that vLLM's CPU kernel asks for",
    ]


def _run(function: Callable[[], Any]) -> Any:
    """vLLM inspects the model's class in a process of its own, which would import torchvision without what
    `torchvision_operators` declares, to keep CUDA out of this one."""
    return function()


def _register_biased_routing() -> None:
    """Experts with a correction bias and no groups are chosen by score + bias and weighted by score.

    So do transformers and vLLM's router of other platforms (FusedTopKBiasRouter). vLLM 0.32's CPU router drops the bias
    silently with softmax (Ernie 4.5) and refuses sigmoid (MiniMax-M2), although its own grouped path does both, here with
    one group of all experts.
    """
    without_bias = cpu_router.CPURouter._compute_routing

    def compute_routing(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *rest: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        biased = self.e_score_correction_bias is not None and self.scoring_func in ("softmax", "sigmoid")
        if not biased or self.use_grouped_topk or self.custom_routing_function is not None:
            return without_bias(self, hidden_states, router_logits, *rest, **kwargs)
        return cpu_router._grouped_topk(
            gating_output=router_logits,
            topk=self.top_k,
            renormalize=self.renormalize,
            num_expert_group=1,
            topk_group=1,
            scoring_func=self.scoring_func,
            routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )

    cpu_router.CPURouter._compute_routing = compute_routing


def _register_identity_experts() -> None:
    """The part of the experts that return their input (LongCat-Flash): `x [T, D]` times the sum of their weights.

    vLLM 0.32 has Triton kernels alone, for this part and for the choice of experts (`fused_topk_bias` with softmax).
    """

    def compute_routing(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *rest: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = router_logits.float().softmax(dim=-1)
        chosen = (scores + self.e_score_correction_bias.data).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights * self.routed_scaling_factor
        returned = chosen >= self.num_logical_experts
        self._zero_expert_output = (hidden_states * weights.masked_fill(~returned, 0.0).sum(dim=-1, keepdim=True)).to(
            hidden_states.dtype
        )
        return weights.masked_fill(returned, 0.0), chosen.masked_fill(returned, 0).to(torch.int32)

    zero_expert_router.ZeroExpertRouter._compute_routing = compute_routing


def _register_rotary_heads() -> None:
    """A query or key `[T, H, R]` is rotated by vLLM's torch code.

    The CPU's `ops.rotary_embedding` takes the stride of an axis of heads for that of tokens, and rotates other values: all of
    DeepSeek-V3's attention without YaRN (Moonlight), whose class with YaRN has no CPU kernel. `[T, H * R]` is right there.
    """
    kernel = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat = query.dim() == 2 and (key is None or key.dim() == 2)
        rotated: tuple[torch.Tensor, torch.Tensor | None] = (
            kernel(self, positions, query, key) if flat else self.forward_native(positions, query, key)
        )
        return rotated

    RotaryEmbedding.forward_cpu = forward_cpu


def _register_one_token_convolution() -> None:
    """A prompt of one token has the strides that the kernel asks for.

    `x [D, 1]` is a part of a wider row `[1, D + ...]` in Qwen3.5. torch calls it contiguous as it is and keeps the row's width as
    the stride of the one token, which the kernel refuses ("expect x to be transposed") though it never takes that step.
    """
    convolve = gdn_attention._causal_conv1d_fwd_cpu

    def convolve_with_stride(*, x: torch.Tensor, **rest: Any) -> torch.Tensor:
        one = x.shape[1] == 1 and x.stride(0) == 1
        convolved: torch.Tensor = convolve(x=x.as_strided(x.shape, (1, len(x))) if one else x, **rest)
        return convolved

    gdn_attention._causal_conv1d_fwd_cpu = convolve_with_stride
