"""Float64 logits of a compressed-tensors checkpoint, computed slowly and independently of product and engine.

transformers' model code gives the architecture; every weight is dequantized by `tests.reference.nvfp4` and assigned by
hand (plain transformers loads such checkpoints wrongly and silently). Routed experts run in a loop, each with its own
input global scale, as stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.reference.nvfp4 import block_fp8_dequantize, dequantize, fake_quantize
from tests.reference.rtn import load

DEEPSEEK_V4 = [
    (r"^mtp\..*", None),
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.wq_b\.", ".attn.compressor.indexer.q_b_proj."),
    (r"\.ape$", ".position_bias"),
    (r"(\.compressor\.(?:indexer\.)?)norm\.", r"\1kv_norm."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.attn\.wq_b\.", ".attn.q_b_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.attn\.", ".self_attn."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.ffn\.", ".mlp."),
]
# Not the dense blocks of LFM2, which are called so in transformers too.
GATED = [
    (rf"(?<!feed_forward)\.{hub}\.", f".{own}.")
    for hub, own in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
]
RULES = {
    "deepseek_v4": DEEPSEEK_V4,
    "ernie4_5_moe": [(r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics.")],
    "exaone_moe": [(r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias")],
    "mimo_v2_flash": [(r"\.attention_sink_bias$", ".sinks")],
    "minimax_m2": [(r"\.block_sparse_moe\.", ".mlp.")],
    "mixtral": [(r"\.block_sparse_moe\.", ".mlp.")],
}
EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(.*)$")
LINEAR = re.compile(r"^(.*)\.(weight_packed|weight_scale|weight_global_scale|input_global_scale)$")


def rename(name: str, model_type: str) -> str | None:
    """A checkpoint's tensor name in transformers' spelling, None for tensors that its model does not have."""
    for pattern, replacement in [*RULES.get(model_type, []), *GATED]:
        if replacement is None:
            if re.search(pattern, name):
                return None
            continue
        name = re.sub(pattern, replacement, name)
    return name


#: Noise of `decided`, relative to a vector's root mean square: what float32 sums in another order differ by.
NOISE = 5e-7
PAIRS = 4  # pairs of runs with opposite noise
#: Log-probability difference that noise of NOISE makes only through a changed code or expert.
CHAOS = 1e-3


class Projection(nn.Module):
    """A linear layer as the checkpoint stores it: plain, NVFP4 (weights and activations) or block FP8 (weights only, as
    vLLM does on CPUs).

    quantize_inputs=False leaves activations alone: the control that must not agree with a W4A4 engine.
    """

    def __init__(self, stored: dict[str, torch.Tensor], quantize_inputs: bool = True) -> None:
        super().__init__()
        self.divisor: torch.Tensor | None = None
        self.quantize_inputs = quantize_inputs
        if "weight_packed" in stored:
            weight = dequantize(stored["weight_packed"], stored["weight_scale"], stored["weight_global_scale"])
            # Weight-only checkpoints (NVFP4A16) have none.
            self.divisor = stored["input_global_scale"].double() if "input_global_scale" in stored else None
        elif "weight_scale" in stored:
            weight = block_fp8_dequantize(stored["weight"], stored["weight_scale"])
        else:
            weight = stored["weight"].double()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(stored["bias"].double(), requires_grad=False) if "bias" in stored else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K] -> [..., M]`."""
        if self.quantize_inputs and self.divisor is not None:
            x = fake_quantize(x, self.divisor)
        return F.linear(x, self.weight, self.bias)


class Experts(nn.Module):
    """The routed experts of one block, one after the other, with transformers' call signature."""

    def __init__(self, experts: list[dict[str, Projection]], limit: float | None) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict(expert) for expert in experts)
        self.limit = limit
        #: Which of the `T` tokens the expert under way is given, as parts of `T`.
        self.places = torch.empty(0)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`x [T, D]`, `chosen [T, k]`, `weights [T, k]` -> `[T, D]`."""
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            self.places = token / len(x)
            if token.numel():
                gate, up = expert["gate_proj"](x[token]), expert["up_proj"](x[token])
                if self.limit is not None:
                    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
                down = expert["down_proj"](F.silu(gate) * up)
                out.index_add_(0, token, down * weights[token, slot].unsqueeze(-1))
        token, slot = torch.where(chosen >= len(self.experts))  # LongCat-Flash: these return their input
        out.index_add_(0, token, x[token] * weights[token, slot].unsqueeze(-1))
        return out


def reference_model(checkpoint: Path, *, quantize_inputs: bool = True) -> nn.Module:
    """The checkpoint as a float64 transformers model whose quantized layers are those of this module.

    Raises KeyError or AssertionError when a tensor of the checkpoint has no place in the model, or the reverse.
    """
    content: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    content.pop("quantization_config", None)
    content["dtype"] = "float64"
    content.pop("torch_dtype", None)
    if content["model_type"] == "minimax_m2":  # transformers 5.17 ignores rotary_dim
        content["partial_rotary_factor"] = content["rotary_dim"] / content["head_dim"]
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    stored: dict[str, dict[str, torch.Tensor]] = {}
    # GLM numbers its MTP blocks after the others; transformers has none of them.
    first, count = config.num_hidden_layers, content.get("num_nextn_predict_layers") or 0
    mtp = tuple(f"model.layers.{number}." for number in range(first, first + count))
    for name, tensor in load(checkpoint).items():
        renamed = rename(name, config.model_type)
        if renamed is not None and not renamed.startswith(mtp):
            module, _, leaf = renamed.rpartition(".")
            stored.setdefault(module, {})[leaf] = tensor

    experts: dict[str, dict[int, dict[str, Projection]]] = {}
    assigned: set[str] = set()
    for module, tensors in stored.items():
        if (found := EXPERT.match(f"{module}.")) is not None:
            expert = experts.setdefault(found[1], {}).setdefault(int(found[2]), {})
            expert[found[3]] = Projection(tensors, quantize_inputs)
            continue
        target = model.get_submodule(module)
        if "weight_packed" in tensors or "weight_scale" in tensors:
            projection = Projection(tensors, quantize_inputs)
            if type(target) is nn.Linear:
                _replace(model, module, projection)
                continue
            tensors = {"weight": projection.weight}  # the grouped output projection: vLLM does not quantize its input
        for leaf, tensor in tensors.items():
            place = getattr(target, leaf)
            assert place.shape == tensor.shape, f"{module}.{leaf}: {tuple(tensor.shape)}, model {tuple(place.shape)}"
            place.data = tensor.to(torch.int64) if not tensor.is_floating_point() else tensor.double()
            assigned.add(f"{module}.{leaf}")
    limit = getattr(config, "swiglu_limit", None)
    for module, numbered in experts.items():
        _replace(model, module, Experts([numbered[i] for i in range(len(numbered))], limit))
    left = set(model.state_dict()) - assigned
    left = {n for n in left if not isinstance(model.get_submodule(n.rpartition(".")[0]), Projection)}
    left -= {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not left, f"no tensor in the checkpoint for {sorted(left)}"
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if config.model_type == "longcat_flash":  # vLLM scales queries before q_b_proj, transformers behind it
        for attention in (module for module in model.modules() if hasattr(module, "mla_scale_q_lora")):
            attention.q_a_layernorm.weight.data *= attention.mla_scale_q_lora
            attention.mla_scale_q_lora = 1.0
    return model


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, replacement)


@torch.no_grad()
def logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Float64 logits `[T, V]` of each prompt, without a cache. Prompts of one length are one batch: an expert's products cost
    what calling it does, and not its few rows."""
    found: dict[int, torch.Tensor] = {}
    for length in sorted({len(ids) for ids in prompts}):
        numbers = [number for number, ids in enumerate(prompts) if len(ids) == length]
        batch = torch.tensor([list(prompts[number]) for number in numbers])
        found |= zip(numbers, model(input_ids=batch, use_cache=False).logits, strict=True)
    return [found[number] for number in range(len(prompts))]


@torch.no_grad()
def decided(
    model: nn.Module, prompts: Sequence[Sequence[int]], reference: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Positions `[T]` (bool) per prompt where the reference agrees with itself under float32-sized noise.

    An activation that lies on the border of two E2M1 codes, or a token between two experts, goes either way with the
    last bit of a float32 sum, and changes every later token of a model with random weights. Such positions say nothing
    about the engine. The reference finds them by running copies of the prompts with noise of NOISE on the input of every
    quantized layer, PAIRS of them, and as many with the opposite noise: a value next to a border crosses it in one of the two.
    (One of qwen2_moe's values lies 1.6e-7 from a border: 25 % of 40 runs cross it, 72 % of 40 pairs, and four runs missed it.)
    All copies are one batch, which costs a fifth of running them one after the other.
    """
    copies = 2 * PAIRS
    generators = [torch.Generator().manual_seed(pair) for pair in range(PAIRS)]

    def shake(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """`rows [R, K]` with noise, the first `counts[0]` of copy 0, and so on; copy 1 has the opposite noise of copy 0."""
        noise = []
        for generator, (one, other) in zip(generators, counts.view(PAIRS, 2).tolist(), strict=True):
            drawn = torch.randn(max(one, other), rows.shape[1], generator=generator, dtype=rows.dtype)
            noise += [drawn[:one], -drawn[:other]]
        return rows + NOISE * rows.square().mean(-1, keepdim=True).sqrt() * torch.cat(noise)

    def of_all_tokens(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        rows = inputs[0].flatten(0, -2)
        return shake(rows, torch.full((copies,), len(rows) // copies)).view(inputs[0].shape), *inputs[1:]

    def of_an_expert(experts: Experts, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return shake(inputs[0], (experts.places * copies).long().bincount(minlength=copies))

    layers = {module: of_all_tokens for module in model.modules() if isinstance(module, Projection | Experts)}
    for experts in [module for module in layers if isinstance(module, Experts)]:
        layers |= {m: partial(of_an_expert, experts) for m in experts.modules() if isinstance(m, Projection)}
    hooks = [module.register_forward_pre_hook(hook) for module, hook in layers.items()]
    try:
        found = logits(model, [*prompts] * copies)
    finally:
        for hook in hooks:
            hook.remove()
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in prompts]
    for number, other in enumerate(found):
        expected = reference[number % len(prompts)]
        masks[number % len(prompts)] &= (expected.log_softmax(-1) - other.log_softmax(-1)).abs().amax(-1) < CHAOS
    return masks
