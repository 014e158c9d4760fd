"""DeepSeek-V4: its grammar, the tensors that its config promises, and its chat encoding.

Names and shapes are those of the hub's headers (DeepSeek-V4-Flash and -Pro). The draft head under `mtp.*` has one of two
layouts. The first releases have MTP blocks. DeepSeek-V4-Flash-0731 and V4-Pro-0813 have DSpark: names by vllm 0.32
(models/deepseek_v4/nvidia/dspark.py, `_remap_dspark_name`); counts by the index of Flash-0731 (1568, 1565 and 1572 tensors in
its three blocks: vllm-project/vllm pull request 41834), and by the parameters of Pro-0813 that the hub counts.
"""

from __future__ import annotations

from collections.abc import Iterator

from calibration.families.deepseek_v4_encoding import ENCODING
from calibration.families.family import EXPERT_LEAVES, ROUTER, Family, FP8Dialect
from calibration.families.promised import ConfigReader, Wanted, linear, norm

#: The scales of a block's hyper-connection: for reading, for writing, and for mixing its streams.
_MHC_SCALES = 3


def _promised(c: ConfigReader) -> Iterator[tuple[str, Wanted]]:
    d, vocab, mhc = c.number("hidden_size"), c.number("vocab_size"), c.number("hc_mult")
    blocks = c.number("num_hidden_layers")
    ratios = c.numbers("compress_ratios", blocks)
    hashed = c.number("num_hash_layers", 0)
    yield "embed.weight", Wanted((vocab, d), "plain")
    yield "head.weight", Wanted((vocab, d), "linear", c.flag("tie_word_embeddings"))
    yield norm("norm", d)
    yield from hyper_connection("hc_head", mhc, 1, mhc * d)
    for block in range(blocks):
        yield from _block(c, f"layers.{block}", ratios[block] if ratios else 0, block < hashed)
    if any(key in c.values for key in ("dspark_target_layer_ids", "dspark_markov_rank", "dspark_block_size")):
        # num_nextn_predict_layers is 1 although there are three blocks: vLLM reads n_mtp_layers, SGLang takes one per
        # target layer.
        count = c.number("n_mtp_layers", 0) or len(c.numbers("dspark_target_layer_ids", 1))
        for number in range(count):
            yield from _block(c, f"mtp.{number}", 0, False)
        yield from hyper_connection(f"mtp.{count - 1}.hc_head", mhc, 1, mhc * d)
        yield from dspark_ends(c, count, ("markov_w1", "markov_w2"))
        return
    for number in range(c.number("num_nextn_predict_layers", 0)):
        prefix = f"mtp.{number}"
        yield from _block(c, prefix, 0, False)
        yield from (norm(f"{prefix}.{name}", d) for name in ("enorm", "hnorm", "norm"))
        yield from linear(f"{prefix}.e_proj", d, d)
        yield from linear(f"{prefix}.h_proj", d, d)
        yield from hyper_connection(f"{prefix}.hc_head", mhc, 1, mhc * d)


def dspark_ends(c: ConfigReader, blocks: int, markov: tuple[str, str]) -> Iterator[tuple[str, Wanted]]:
    """The tensors of a DSpark draft head besides its blocks: input of the target's hidden states before the first
    block, output of tokens after the last. `markov` are the leaf names of the Markov head's two factors, [vocabulary,
    rank] each."""
    d, vocab, rank = c.number("hidden_size"), c.number("vocab_size"), c.number("dspark_markov_rank")
    last, (embed, head) = f"mtp.{blocks - 1}", markov
    yield from linear("mtp.0.main_proj", d, d * len(c.numbers("dspark_target_layer_ids", 1)))
    yield norm("mtp.0.main_norm", d)
    yield norm(f"{last}.norm", d)
    yield f"{last}.markov_head.{embed}.weight", Wanted((vocab, rank), "plain")
    yield f"{last}.markov_head.{head}.weight", Wanted((c.number("draft_vocab_size", 0) or vocab, rank), "plain")
    if c.values.get("enable_confidence_head") is not False:
        yield f"{last}.confidence_head.proj.weight", Wanted((1, d + rank), "plain")


def hyper_connection(prefix: str, outputs: int, scales: int, width: int) -> Iterator[tuple[str, Wanted]]:
    yield f"{prefix}_fn", Wanted((outputs, width), "float32")
    yield f"{prefix}_base", Wanted((outputs,), "float32")
    yield f"{prefix}_scale", Wanted((scales,), "float32")


def block_frame(c: ConfigReader, prefix: str, experts: int) -> Iterator[tuple[str, Wanted]]:
    """The tensors that every block has, regardless of compression and routing: norms, attention, hyper-connections,
    experts."""
    d, heads, head_dim = c.number("hidden_size"), c.number("num_attention_heads"), c.number("head_dim")
    rank, groups, width = c.number("q_lora_rank"), c.number("o_groups"), c.number("moe_intermediate_size")
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
    for site in ("attn", "ffn"):
        yield from hyper_connection(f"{prefix}.hc_{site}", (2 + mhc) * mhc, _MHC_SCALES, mhc * d)
    yield f"{ffn}.gate.weight", Wanted((experts, d), "plain")
    shared = c.number("n_shared_experts", 0)
    mlps = [(f"{ffn}.experts.{expert}", width) for expert in range(experts)]
    for mlp, size in [*mlps, *([(f"{ffn}.shared_experts", shared * width)] if shared else [])]:
        yield from linear(f"{mlp}.w1", size, d)
        yield from linear(f"{mlp}.w2", d, size)
        yield from linear(f"{mlp}.w3", size, d)


def _block(c: ConfigReader, prefix: str, ratio: int, hashed: bool) -> Iterator[tuple[str, Wanted]]:
    d, head_dim, rank = c.number("hidden_size"), c.number("head_dim"), c.number("q_lora_rank")
    experts, attn = c.number("n_routed_experts"), f"{prefix}.attn"
    yield from block_frame(c, prefix, experts)
    if ratio:
        yield from _compressor(f"{attn}.compressor", ratio, head_dim, d)
    if ratio == 4:
        index_heads, index_dim = c.number("index_n_heads"), c.number("index_head_dim")
        yield from linear(f"{attn}.indexer.wq_b", index_heads * index_dim, rank)
        yield f"{attn}.indexer.weights_proj.weight", Wanted((index_heads, d), "plain")
        yield from _compressor(f"{attn}.indexer.compressor", ratio, index_dim, d)
    if hashed:
        yield f"{prefix}.ffn.gate.tid2eid", Wanted((c.number("vocab_size"), c.number("num_experts_per_tok")), "table")
    else:
        yield f"{prefix}.ffn.gate.bias", Wanted((experts,), "float32")


def _compressor(prefix: str, ratio: int, head_dim: int, hidden: int) -> Iterator[tuple[str, Wanted]]:
    # Ratio 4 keeps two overlapping windows, so its projections are twice as wide.
    width = head_dim * (2 if ratio == 4 else 1)
    yield f"{prefix}.ape", Wanted((ratio, width), "float32")
    yield norm(f"{prefix}.norm", head_dim)
    yield f"{prefix}.wkv.weight", Wanted((width, hidden), "plain")
    yield f"{prefix}.wgate.weight", Wanted((width, hidden), "plain")


NVIDIA_WORDS = FP8Dialect(
    ("*.attn.*", "*.ffn.shared_experts.*", "head"),
    draft="mtp.*",
    built_plain=frozenset({ROUTER, "head", "Markov head", "confidence head"}),
    # With another value vLLM does not look at moe_quant_algo.
    config=(("expert_dtype", "fp4"),),
)
DEEPSEEK_V4 = Family(
    name="deepseek_v4",
    model_types=("deepseek_v4",),
    block=r"^layers\.(\d+)\.",
    mtp=r"^mtp\.(\d+)?",
    parts=(
        ("mHC", r"(^|\.)hc_\w+$"),
        ("norm", r"(^|[._])[eh]?norm(\.weight)?$"),
        ("MTP projection", r"^mtp\.\d+\.([eh]|main)_proj(\.|$)"),
        ("Markov head", r"\.markov_head\."),
        ("confidence head", r"\.confidence_head\."),
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
    fp8_dialect=NVIDIA_WORDS,
    encoding=ENCODING,
)
