"""llm-compressor's experts with random weights, its observers on them, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.calibration import calibrate_input_hook, initialize_observer
from llmcompressor.observers import Observer
from torch import nn
from transformers import DeepseekV4Config, MixtralConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from calibration.model.weight_buffer import WeightBuffer

EXPERTS, HIDDEN, TOP_K = 8, 64, 3


def make_experts(kind: str = "mixtral") -> LinearExperts2D:
    """8 experts of 64 -> 96 -> 64 in BF16, with random weights; deepseek_v4 clamps gate and up."""
    sizes = {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "dtype": "bfloat16"}
    if kind == "mixtral":
        config: Any = MixtralConfig(**sizes, intermediate_size=96)
        original: type[nn.Module] = MixtralExperts
    else:
        config, original = DeepseekV4Config(**sizes, moe_intermediate_size=96, swiglu_limit=0.5), DeepseekV4Experts
    experts: LinearExperts2D = LinearExperts2D.get_linear_experts_cls(original)(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.2).to(torch.bfloat16)
    return experts.eval()


def watch(
    experts: LinearExperts2D, observer: str = "static_minmax", leaves: tuple[str, ...] = ()
) -> QuantizationModifier:
    """Puts NVFP4 observers on the linear layers, with llm-compressor's own hooks."""
    preset = preset_name_to_scheme("NVFP4", ["Linear"])
    activations = QuantizationArgs(**preset.input_activations.model_dump(exclude={"observer"}), observer=observer)
    scheme = QuantizationScheme(targets=["Linear"], weights=preset.weights, input_activations=activations)
    modifier = QuantizationModifier(targets=["Linear"], scheme="NVFP4")
    for name, module in experts.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(leaves or ("proj",)):
            initialize_module_for_quantization(module, scheme)
            module.quantization_enabled = False
            initialize_observer(module, "input")
            modifier.register_hook(module, calibrate_input_hook, "forward_pre")
    return modifier


def batches(count: int = 3, tokens: int = 50) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(hidden [T, D], top_k_index [T, k], top_k_weights [T, k]); expert 7 is never chosen, expert 6 by one token
    alone, three times, which is larger than all others."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for number in range(count):
        hidden = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
        index = torch.rand(tokens, EXPERTS - 2, generator=generator).topk(TOP_K).indices
        if number == 0:
            index[3], hidden[3] = EXPERTS - 2, hidden[3] * 10
        weights = torch.rand(tokens, TOP_K, generator=generator).to(torch.bfloat16)
        weights[3, 1:] = 0  # equal sums in any order, where an expert is chosen more than once
        made.append((hidden, index, weights))
    return made


def statistics(experts: LinearExperts2D) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, module in experts.named_modules()
        if isinstance(module, Observer) and module.has_statistics
        for key, value in module.get_statistics().items()
    }


def side_by_side(experts: LinearExperts2D) -> LinearExperts2D:
    """The same experts with their weights in one room, in the order in which SourceModel reads them."""
    linears = [getattr(experts[n], f"{leaf}_proj") for n in range(EXPERTS) for leaf in ("gate", "up", "down")]
    buffer = WeightBuffer(torch.device("cpu"), [linear.weight for linear in linears])
    for linear in linears:
        linear.weight.data = buffer.take(linear.weight).copy_(linear.weight)
    return experts
