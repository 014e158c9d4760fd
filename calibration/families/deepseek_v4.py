"""DeepSeek-V4: its grammar, the tensors that its config promises, its chat encoding.

Names and shapes are those of the hub's headers (DeepSeek-V4-Flash and -Pro).
"""

from __future__ import annotations

from collections.abc import Iterator

from calibration.families.deepseek_v4_encoding import ENCODING
from calibration.families.family import EXPERT_LEAVES, ROUTER, Family, FP8Dialect
from calibration.families.promised import ConfigReader, Wanted, linear, mtp_blocks, norm

#: Scales of a block's hyper-connection: of what it reads, of what it writes, of how its streams mix.
_MHC_SCALES = 3


def _promised(c: ConfigReader) -> Iterator[tuple[str, Wanted]]:
    d, vocab, mhc = c.number("hidden_size"), c.number("vocab_size"), c.number("hc_mult")
    blocks = c.number("num_hidden_layers")
    ratios = c.numbers("compress_ratios", blocks)
    hashed = c.number("num_hash_layers", 0)
    yield "embed.weight", Wanted((vocab, d), "plain")
    yield "head.weight", Wanted((vocab, d), "linear", c.flag("tie_word_embeddings"))
    yield norm("norm", d)
    yield from _mhc("hc_head", mhc, 1, mhc * d)
    for block in range(blocks):
        yield from _block(c, f"layers.{block}", ratios[block] if ratios else 0, block < hashed)
    for number in range(mtp_blocks(c.values)):
        prefix = f"mtp.{number}"
        yield from _block(c, prefix, 0, False)
        yield from (norm(f"{prefix}.{name}", d) for name in ("enorm", "hnorm", "norm"))
        yield from linear(f"{prefix}.e_proj", d, d)
        yield from linear(f"{prefix}.h_proj", d, d)
        yield from _mhc(f"{prefix}.hc_head", mhc, 1, mhc * d)


def _mhc(prefix: str, outputs: int, scales: int, width: int) -> Iterator[tuple[str, Wanted]]:
    yield f"{prefix}_fn", Wanted((outputs, width), "float32")
    yield f"{prefix}_base", Wanted((outputs,), "float32")
    yield f"{prefix}_scale", Wanted((scales,), "float32")


def _block(c: ConfigReader, prefix: str, ratio: int, hashed: bool) -> Iterator[tuple[str, Wanted]]:
    d, heads, head_dim = c.number("hidden_size"), c.number("num_attention_heads"), c.number("head_dim")
    rank = c.number("q_lora_rank")
    groups, experts, width = c.number("o_groups"), c.number("n_routed_experts"), c.number("moe_intermediate_size")
    attn, ffn, mhc = f"{prefix}.attn", f"{prefix}.ffn", c.number("hc_mult")
    yield from (norm(f"{prefix}.{name}", d) for name in ("attn_norm", "ffn_norm"))
    yield f"{attn}.attn_sink", Wanted((heads,), "float32")
    yield norm(f"{attn}.q_norm", rank)
    yield norm(f"{attn}.kv_norm", head_dim)
    output_rank = groups * c.number("o_lora_rank")
    yield from linear(f"{attn}.wq_a", rank, d)
    yield from linear(f"{attn}.wq_b", heads * head_dim, rank)
    yield from linear(f"{attn}.wkv", head_dim, d)
    yield from linear(f"{attn}.wo_a", output_rank, heads * head_dim // max(groups, 1))
    yield from linear(f"{attn}.wo_b", d, output_rank)
    if ratio:
        yield from _compressor(f"{attn}.compressor", ratio, head_dim, d)
    if ratio == 4:
        index_heads, index_dim = c.number("index_n_heads"), c.number("index_head_dim")
        yield from linear(f"{attn}.indexer.wq_b", index_heads * index_dim, rank)
        yield f"{attn}.indexer.weights_proj.weight", Wanted((index_heads, d), "plain")
        yield from _compressor(f"{attn}.indexer.compressor", ratio, index_dim, d)
    for site in ("attn", "ffn"):
        yield from _mhc(f"{prefix}.hc_{site}", (2 + mhc) * mhc, _MHC_SCALES, mhc * d)
    yield f"{ffn}.gate.weight", Wanted((experts, d), "plain")
    if hashed:
        yield f"{ffn}.gate.tid2eid", Wanted((c.number("vocab_size"), c.number("num_experts_per_tok")), "table")
    else:
        yield f"{ffn}.gate.bias", Wanted((experts,), "float32")
    shared = c.number("n_shared_experts", 0)
    mlps = [(f"{ffn}.experts.{expert}", width) for expert in range(experts)]
    for mlp, size in [*mlps, *([(f"{ffn}.shared_experts", shared * width)] if shared else [])]:
        yield from linear(f"{mlp}.w1", size, d)
        yield from linear(f"{mlp}.w2", d, size)
        yield from linear(f"{mlp}.w3", size, d)


def _compressor(prefix: str, ratio: int, head_dim: int, hidden: int) -> Iterator[tuple[str, Wanted]]:
    # Ratio 4 keeps two overlapping windows, so its projections are twice as wide.
    width = head_dim * (2 if ratio == 4 else 1)
    yield f"{prefix}.ape", Wanted((ratio, width), "float32")
    yield norm(f"{prefix}.norm", head_dim)
    yield f"{prefix}.wkv.weight", Wanted((width, hidden), "plain")
    yield f"{prefix}.wgate.weight", Wanted((width, hidden), "plain")


DEEPSEEK_V4 = Family(
    name="deepseek_v4",
    model_types=("deepseek_v4",),
    block=r"^layers\.(\d+)\.",
    mtp=r"^mtp\.(\d+)?",
    parts=(
        ("mHC", r"(^|\.)hc_\w+$"),
        ("norm", r"(^|[._])[eh]?norm(\.weight)?$"),
        ("MTP projection", r"^mtp\.\d+\.[eh]_proj(\.|$)"),
        ("compressor position", r"\.ape$"),
        ("sink", r"\.attn_sink$"),
        ("indexer", r"\.attn\.indexer\."),
        ("compressor", r"\.attn\.compressor\."),
        ("attention", r"\.attn\."),
        ("routed expert", r"\.ffn\.experts\.\d+\."),
        ("shared expert", r"\.ffn\.shared_experts\."),
        ("router", r"\.ffn\.gate(\.|$)"),
        ("embedding", r"^embed(\.|$)"),
        ("head", r"^head(\.|$)"),
    ),
    fused_leaves=(("w1", "w3"), ("wq_a", "wkv")),
    promised=_promised,
    never_quantized=(
        (r"\.compressor\.(wkv|wgate)$", "vLLM runs the compressor unquantized"),
        (r"\.indexer\.weights_proj$", "vLLM runs the indexer's weights_proj unquantized"),
    ),
    not_observed=r"\.attn\.wo_a$",
    renames=(
        (r"^embed\b", "model.embed_tokens"),
        (r"^head\b", "lm_head"),
        (r"^norm\b", "model.norm"),
        (r"^hc_head_", "model.hc_head.hc_"),
        (r"^layers\.", "model.layers."),
        (r"\.hc_(attn|ffn)_", r".\1_hc."),
        (r"\.attn_norm\b", ".input_layernorm"),
        (r"\.ffn_norm\b", ".post_attention_layernorm"),
        (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
        (r"\.attn\.indexer\.wq_b\b", ".self_attn.compressor.indexer.q_b_proj"),
        (r"\.attn\.indexer\.weights_proj\b", ".self_attn.compressor.indexer.scorer.weights_proj"),
        (r"\.attn\.", ".self_attn."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.q_norm\b", ".q_a_norm"),
        (r"(\.compressor(?:\.indexer)?)\.ape$", r"\1.position_bias"),
        (r"(\.compressor(?:\.indexer)?)\.norm\b", r"\1.kv_norm"),
        (r"(\.compressor(?:\.indexer)?)\.wgate\b", r"\1.gate_proj"),
        (r"\.self_attn\.wq_a\b", ".self_attn.q_a_proj"),
        (r"\.self_attn\.wq_b\b", ".self_attn.q_b_proj"),
        (r"\.wkv\b", ".kv_proj"),
        (r"\.wo_a\b", ".o_a_proj"),
        (r"\.wo_b\b", ".o_b_proj"),
        (r"\.ffn\.", ".mlp."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        *((rf"(\.experts\.\d+|\.shared_experts)\.{hub}\b", rf"\1.{hf}") for hub, hf in EXPERT_LEAVES),
    ),
    serving_leaves=tuple((hub, (served,)) for hub, served in EXPERT_LEAVES),
    serving_renames=(
        (r"^(layers|norm|hc_head)", r"model.\1"),
        (r"^embed\b", "model.embed_tokens"),
        (r"^head\b", "lm_head"),
    ),
    # With "fp4" or no value vLLM renames every `.weight_scale` outside the experts and then misses it.
    serving_config=(("expert_dtype", "nvfp4"),),
    fp8_dialect=FP8Dialect(
        ("*.attn.*", "*.ffn.shared_experts.*", "head"), draft="mtp.*", built_plain=frozenset({ROUTER, "head"})
    ),
    encoding=ENCODING,
)
