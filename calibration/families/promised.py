"""The tensors that a checkpoint's own config.json promises, family by family: names, shapes, kinds.

A logical tensor is a source's: a weight is `<module>.weight` `[M, K]` however it is stored, its scales are companions.
Shapes follow transformers' modules of each family (5.17) and, for DeepSeek-V4, the hub checkpoints' headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from recipes.errors import SourceError

Kind = Literal["linear", "plain", "float32", "table"]
Shape = tuple[int, ...]
#: Tensors that some writers add and that no config promises: scales of the KV cache, which vLLM reads in these spellings
#: (model_loader/weight_utils.py, maybe_remap_kv_scale_name), and rotary tables of old exports, which every loader computes.
CARRIED = r"\.self_attn\.(?:[qkv]|kv|[kv]_proj\.[kv]|qkv_proj\.[kv])_(?:scale|zero_point)$"
LEFT_OUT = r"(?:^|\.)rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$"
#: Their leaves.
ADDED = ("k_scale", "v_scale", "q_scale", "kv_scale", "inv_freq")
_HEAD_DIM, _MHC_SCALES = 128, 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """A logical tensor that the config promises. linear may be stored quantized, plain and float32 may not, table holds
    integers. `optional`: may be left out (a tied head)."""

    shape: Shape
    kind: Kind = "linear"
    optional: bool = False


class _Config:
    """Reads numbers from a config and remembers what it misses."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values, self.problems = values, list[str]()

    def number(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            found = "is missing" if key not in self.values else f"is {value!r}"
            self.problems.append(f"config.json: {key} {found}, a whole number is needed to serve this model")
            return 0
        return value

    def numbers(self, key: str, least: int) -> list[int]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) < least or not all(isinstance(n, int) for n in value):
            found = "is missing" if value is None else f"is {str(value)[:60]}"
            self.problems.append(f"config.json: {key} {found}, a list of at least {least} whole numbers is needed")
            return []
        return value

    def flag(self, key: str) -> bool:
        return self.values.get(key) is True


def expected_tensors(config: dict[str, Any]) -> tuple[dict[str, Wanted], list[str]]:
    """Every logical tensor of a checkpoint with this config, and what the config itself lacks or has wrong. Without a whole
    config the tensors are empty: nothing can be derived from it. Raises SourceError for a model_type that nobody has
    written down here: what another one promises says nothing about it."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in PROMISES:
        raise SourceError(f"config.json: model_type {kind!r:.80}: the tensors that it promises are not known here")
    reader = _Config(config)
    tensors = dict(PROMISES[kind](reader))
    return ({}, reader.problems) if reader.problems else (tensors, [])


def mtp_blocks(config: dict[str, Any]) -> int:
    """How many MTP blocks the config promises."""
    value = config.get("num_nextn_predict_layers")
    return value if isinstance(value, int) and value > 0 else 0


def _norm(name: str, width: int) -> tuple[str, Wanted]:
    return f"{name}.weight", Wanted((width,), "plain")


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Iterator[tuple[str, Wanted]]:
    yield f"{name}.weight", Wanted((rows, columns))
    if bias:
        yield f"{name}.bias", Wanted((rows,), "plain")


def _standard(c: _Config) -> Iterator[tuple[str, Wanted]]:
    """Llama, Mistral, Qwen3, Qwen3-MoE, Mixtral (transformers/models/*/modeling_*.py)."""
    kind, d, heads = c.values.get("model_type"), c.number("hidden_size"), c.number("num_attention_heads")
    given = c.values.get("head_dim")
    head_dim = given if isinstance(given, int) else _HEAD_DIM if "qwen3" in str(kind) else d // max(heads, 1)
    kv, vocab, bias = c.number("num_key_value_heads", heads), c.number("vocab_size"), c.flag("attention_bias")
    dense_width = c.number("intermediate_size")
    # transformers 5 writes Qwen3-MoE's num_experts as num_local_experts, and its config class reads both.
    counted = "num_experts" if kind == "qwen3_moe" and "num_local_experts" not in c.values else "num_local_experts"
    experts = c.number(counted) if kind in ("mixtral", "qwen3_moe") else 0
    width = c.number("moe_intermediate_size") if kind == "qwen3_moe" else dense_width
    step, dense_blocks = c.number("decoder_sparse_step", 1), c.values.get("mlp_only_layers") or []
    yield "model.embed_tokens.weight", Wanted((vocab, d), "plain")
    for block in range(c.number("num_hidden_layers")):
        prefix = f"model.layers.{block}"
        yield _norm(f"{prefix}.input_layernorm", d)
        yield _norm(f"{prefix}.post_attention_layernorm", d)
        yield from _linear(f"{prefix}.self_attn.q_proj", heads * head_dim, d, bias)
        yield from _linear(f"{prefix}.self_attn.k_proj", kv * head_dim, d, bias)
        yield from _linear(f"{prefix}.self_attn.v_proj", kv * head_dim, d, bias)
        yield from _linear(f"{prefix}.self_attn.o_proj", d, heads * head_dim, bias)
        if "qwen3" in str(kind):
            yield _norm(f"{prefix}.self_attn.q_norm", head_dim)
            yield _norm(f"{prefix}.self_attn.k_norm", head_dim)
        sparse = bool(experts) and block not in dense_blocks and (block + 1) % max(step, 1) == 0
        if not sparse:
            mlp_bias = c.flag("mlp_bias")
            yield from _linear(f"{prefix}.mlp.gate_proj", dense_width, d, mlp_bias)
            yield from _linear(f"{prefix}.mlp.up_proj", dense_width, d, mlp_bias)
            yield from _linear(f"{prefix}.mlp.down_proj", d, dense_width, mlp_bias)
            continue
        mixtral = kind == "mixtral"
        moe = f"{prefix}.block_sparse_moe" if mixtral else f"{prefix}.mlp"
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        yield f"{moe}.gate.weight", Wanted((experts, d), "plain")
        for expert in range(experts):
            yield from _linear(f"{moe}.experts.{expert}.{gate}", width, d)
            yield from _linear(f"{moe}.experts.{expert}.{up}", width, d)
            yield from _linear(f"{moe}.experts.{expert}.{down}", d, width)
    yield _norm("model.norm", d)
    yield "lm_head.weight", Wanted((vocab, d), "linear", c.flag("tie_word_embeddings"))


def _deepseek_v4(c: _Config) -> Iterator[tuple[str, Wanted]]:
    d, vocab, mhc = c.number("hidden_size"), c.number("vocab_size"), c.number("hc_mult")
    blocks = c.number("num_hidden_layers")
    ratios = c.numbers("compress_ratios", blocks)
    hashed = c.number("num_hash_layers", 0)
    yield "embed.weight", Wanted((vocab, d), "plain")
    yield "head.weight", Wanted((vocab, d), "linear", c.flag("tie_word_embeddings"))
    yield _norm("norm", d)
    yield from _mhc("hc_head", mhc, 1, mhc * d)
    for block in range(blocks):
        yield from _v4_block(c, f"layers.{block}", ratios[block] if ratios else 0, block < hashed)
    for number in range(mtp_blocks(c.values)):
        prefix = f"mtp.{number}"
        yield from _v4_block(c, prefix, 0, False)
        yield from (_norm(f"{prefix}.{name}", d) for name in ("enorm", "hnorm", "norm"))
        yield from _linear(f"{prefix}.e_proj", d, d)
        yield from _linear(f"{prefix}.h_proj", d, d)
        yield from _mhc(f"{prefix}.hc_head", mhc, 1, mhc * d)


def _mhc(prefix: str, outputs: int, scales: int, width: int) -> Iterator[tuple[str, Wanted]]:
    yield f"{prefix}_fn", Wanted((outputs, width), "float32")
    yield f"{prefix}_base", Wanted((outputs,), "float32")
    yield f"{prefix}_scale", Wanted((scales,), "float32")


def _v4_block(c: _Config, prefix: str, ratio: int, hashed: bool) -> Iterator[tuple[str, Wanted]]:
    d, heads, head_dim = c.number("hidden_size"), c.number("num_attention_heads"), c.number("head_dim")
    rank = c.number("q_lora_rank")
    groups, experts, width = c.number("o_groups"), c.number("n_routed_experts"), c.number("moe_intermediate_size")
    attn, ffn, mhc = f"{prefix}.attn", f"{prefix}.ffn", c.number("hc_mult")
    yield from (_norm(f"{prefix}.{name}", d) for name in ("attn_norm", "ffn_norm"))
    yield f"{attn}.attn_sink", Wanted((heads,), "float32")
    yield _norm(f"{attn}.q_norm", rank)
    yield _norm(f"{attn}.kv_norm", head_dim)
    output_rank = groups * c.number("o_lora_rank")
    yield from _linear(f"{attn}.wq_a", rank, d)
    yield from _linear(f"{attn}.wq_b", heads * head_dim, rank)
    yield from _linear(f"{attn}.wkv", head_dim, d)
    yield from _linear(f"{attn}.wo_a", output_rank, heads * head_dim // max(groups, 1))
    yield from _linear(f"{attn}.wo_b", d, output_rank)
    if ratio:
        yield from _compressor(f"{attn}.compressor", ratio, head_dim, d)
    if ratio == 4:
        index_heads, index_dim = c.number("index_n_heads"), c.number("index_head_dim")
        yield from _linear(f"{attn}.indexer.wq_b", index_heads * index_dim, rank)
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
        yield from _linear(f"{mlp}.w1", size, d)
        yield from _linear(f"{mlp}.w2", d, size)
        yield from _linear(f"{mlp}.w3", size, d)


def _compressor(prefix: str, ratio: int, head_dim: int, hidden: int) -> Iterator[tuple[str, Wanted]]:
    # Ratio 4 keeps two overlapping windows, so its projections are twice as wide.
    width = head_dim * (2 if ratio == 4 else 1)
    yield f"{prefix}.ape", Wanted((ratio, width), "float32")
    yield _norm(f"{prefix}.norm", head_dim)
    yield f"{prefix}.wkv.weight", Wanted((width, hidden), "plain")
    yield f"{prefix}.wgate.weight", Wanted((width, hidden), "plain")


#: model_type -> what makes its tensors from a config.
PROMISES: dict[str, Callable[[_Config], Iterator[tuple[str, Wanted]]]] = {
    "deepseek_v4": _deepseek_v4,
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen3", "qwen3_moe"), _standard),
}
