"""Families that name their modules as most of the hub does, `model.layers.N.self_attn.q_proj`: Llama, Mistral, Qwen3,
Qwen3-MoE, Mixtral. What their configs promise follows transformers/models/*/modeling_*.py (5.17)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from calibration.families.family import EXPERT_LEAVES, Family
from calibration.families.promised import ConfigReader, Wanted, linear, norm

_PARTS = (
    ("norm", r"norm\.weight$"),
    ("routed expert", r"\.experts\.\d+\."),
    ("shared expert", r"\.shared_experts?\."),
    ("router", r"\.(mlp|block_sparse_moe)\.gate(\.|$)"),
    ("attention", r"\.self_attn\."),
    ("mlp", r"\.mlp\."),
    ("embedding", r"^model\.embed_tokens(\.|$)"),
    ("head", r"^lm_head(\.|$)"),
    ("norm", r"norm(\.weight)?$"),
)
_BLOCK = r"^model\.layers\.(\d+)\."
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class _Experts:
    """What a family calls its routed experts: their module in a block, the projections of each, and the config's fields
    for their number (the first that is there) and their width (None: that of a dense MLP)."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    number: tuple[str, ...] = ("num_experts",)
    width: str | None = "moe_intermediate_size"


def _promised(
    c: ConfigReader, experts: _Experts | None = None, head_norms: bool = False, usual_head_dim: int | None = None
) -> Iterator[tuple[str, Wanted]]:
    """A decoder of this kind; `usual_head_dim` instead of the hidden width by heads if the config names none."""
    d, heads = c.number("hidden_size"), c.number("num_attention_heads")
    given = c.values.get("head_dim")
    head_dim = given if isinstance(given, int) else usual_head_dim or d // max(heads, 1)
    kv, vocab, bias = c.number("num_key_value_heads", heads), c.number("vocab_size"), c.flag("attention_bias")
    dense_width, routed, width = c.number("intermediate_size"), 0, 0
    if experts is not None:
        routed = c.number(next((key for key in experts.number if key in c.values), experts.number[-1]))
        width = dense_width if experts.width is None else c.number(experts.width)
    step, dense_blocks = c.number("decoder_sparse_step", 1), c.values.get("mlp_only_layers") or []
    yield "model.embed_tokens.weight", Wanted((vocab, d), "plain")
    for block in range(c.number("num_hidden_layers")):
        prefix = f"model.layers.{block}"
        yield norm(f"{prefix}.input_layernorm", d)
        yield norm(f"{prefix}.post_attention_layernorm", d)
        yield from linear(f"{prefix}.self_attn.q_proj", heads * head_dim, d, bias)
        yield from linear(f"{prefix}.self_attn.k_proj", kv * head_dim, d, bias)
        yield from linear(f"{prefix}.self_attn.v_proj", kv * head_dim, d, bias)
        yield from linear(f"{prefix}.self_attn.o_proj", d, heads * head_dim, bias)
        if head_norms:
            yield norm(f"{prefix}.self_attn.q_norm", head_dim)
            yield norm(f"{prefix}.self_attn.k_norm", head_dim)
        if experts is not None and routed and block not in dense_blocks and (block + 1) % max(step, 1) == 0:
            moe = f"{prefix}.{experts.module}"
            yield f"{moe}.gate.weight", Wanted((routed, d), "plain")
            for expert in range(routed):
                yield from linear(f"{moe}.experts.{expert}.{experts.gate}", width, d)
                yield from linear(f"{moe}.experts.{expert}.{experts.up}", width, d)
                yield from linear(f"{moe}.experts.{expert}.{experts.down}", d, width)
            continue
        mlp_bias = c.flag("mlp_bias")
        yield from linear(f"{prefix}.mlp.gate_proj", dense_width, d, mlp_bias)
        yield from linear(f"{prefix}.mlp.up_proj", dense_width, d, mlp_bias)
        yield from linear(f"{prefix}.mlp.down_proj", d, dense_width, mlp_bias)
    yield norm("model.norm", d)
    yield "lm_head.weight", Wanted((vocab, d), "linear", c.flag("tie_word_embeddings"))


_QWEN3 = partial(_promised, head_norms=True, usual_head_dim=128)

FAMILIES = (
    Family("dense", ("llama", "mistral"), _BLOCK, _PARTS, _FUSED, _promised),
    Family("dense", ("qwen3",), _BLOCK, _PARTS, _FUSED, _QWEN3),
    Family(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        block=_BLOCK,
        parts=_PARTS,
        fused_leaves=_FUSED,
        # transformers 5 writes num_experts as num_local_experts, and its config class reads both.
        promised=partial(_QWEN3, experts=_Experts(number=("num_local_experts", "num_experts"))),
        serving_quantizes=("router",),
    ),
    Family(
        name="mixtral",
        model_types=("mixtral",),
        block=_BLOCK,
        parts=_PARTS,
        fused_leaves=(*_FUSED, ("w1", "w3")),
        promised=partial(
            _promised,
            experts=_Experts("block_sparse_moe", "w1", "w3", "w2", ("num_local_experts",), width=None),
        ),
        renames=(
            (r"\.block_sparse_moe\.", ".mlp."),
            *((rf"(\.experts\.\d+)\.{hub}\b", rf"\1.{hf}") for hub, hf in EXPERT_LEAVES),
        ),
    ),
)
