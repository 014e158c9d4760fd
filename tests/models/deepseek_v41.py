"""Tiny but complete hub-form DeepSeek-V4.1 checkpoints with random weights: FP8 tiles of 32x32, MXFP4 experts, Engram tables,
a vision tower and a DSpark draft head.

Names, dtypes and shapes: vllm 0.32, models/deepseek_v41 (attention, compressor, engram, dspark, its weights mapper) and
models/deepseek_v4/common/vision.py. Of the published DeepSeek-V4.1-Flash the index has 96,085 tensors of 510,286,023,000
bytes; `tests/integration/test_headers_only.py` counts what this module makes of its dimensions. No released library but vLLM
runs the model, so nothing here is more than stored.

    python -m tests.models.deepseek_v41 OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.models import deepseek_v4 as v4
from tests.models.deepseek_v4 import HC_MULT, HEAD_DIM, INDEX_HEAD_DIM, Spec, norm, weight
from tests.models.storage import new_directory

SIDE = 32
"""Of an FP8 tile: `weight_block_size`."""


@dataclass(frozen=True)
class Sizes(v4.Sizes):
    """The defaults leave ragged tiles (q_lora_rank 80), and have a block of each kind: no compression, ratio 2 with a gate,
    ratio 1 that owns keys and values, ratio 1 that only indexes."""

    layers: int = 4
    hash_layers: int = 0
    q_lora_rank: int = 80
    draft_blocks: int = 3
    ratios: tuple[int, ...] = (0, 2, 1, 1)
    kv_sources: tuple[int, ...] = (1, 2)
    index_sources: tuple[int, ...] = (1, 2, 3)
    candidate_source: int = 2
    engram_layers: tuple[int, ...] = (0,)
    engram_rows: tuple[int, ...] = (240,)  # 53 + 59 + 61 + 67: the next primes of engram_vocab_size
    engram_vocab: int = 50
    engram_ngram: int = 3
    engram_heads: int = 2
    engram_head_dim: int = 64
    engram_compressed_vocab: int = 512
    draft_experts: int = 16
    draft_top_k: int = 3
    vision_layers: int = 2
    vision_hidden: int = 32
    vision_heads: int = 2
    vision_intermediate: int = 48
    patch: int = 14
    downsample: int = 3

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        return self.ratios


@dataclass(frozen=True)
class FlashSizes(Sizes):
    """DeepSeek-V4.1-Flash's dimensions (its config.json on the hub)."""

    hidden: int = 5120
    layers: int = 40
    experts: int = 384
    moe_intermediate: int = 2304
    heads: int = 64
    q_lora_rank: int = 1280
    o_lora_rank: int = 1024
    o_groups: int = 8
    index_heads: int = 32
    vocab: int = 129280
    markov_rank: int = 256
    ratios: tuple[int, ...] = (0, 0, *(2,) * 18, *(1,) * 20)
    kv_sources: tuple[int, ...] = (2, 8, 14, 20)
    index_sources: tuple[int, ...] = (2, 8, 14, 20, 24, 28, 32, 36)
    candidate_source: int = 20
    engram_layers: tuple[int, ...] = (1, 14)
    engram_rows: tuple[int, ...] = (384006168, 384016682)
    engram_vocab: int = 16000000
    engram_ngram: int = 4
    engram_heads: int = 8
    engram_head_dim: int = 256
    engram_compressed_vocab: int = 99092
    draft_experts: int = 128
    vision_layers: int = 32
    vision_hidden: int = 1024
    vision_heads: int = 16
    vision_intermediate: int = 2816


def _block(prefix: str, sizes: Sizes, experts: int) -> Iterator[Spec]:
    """What blocks of the model and of the draft head share."""
    d, m = sizes.hidden, sizes.moe_intermediate
    yield norm(f"{prefix}.attn_norm", d)
    yield from v4.attention(f"{prefix}.attn", sizes)
    yield from v4.hyper(f"{prefix}.hc_attn", (2 + HC_MULT) * HC_MULT, 3, d)
    yield norm(f"{prefix}.ffn_norm", d)
    yield weight(f"{prefix}.ffn.gate", "plain", experts, d, gain=2.0)
    for bias in ("bias", "bias_vl"):
        yield Spec(f"{prefix}.ffn.gate.{bias}", "float32", (experts,), std=0.1)
    for expert in range(experts):
        yield from v4.mlp(f"{prefix}.ffn.experts.{expert}", "routed_expert", d, m)
    yield from v4.mlp(f"{prefix}.ffn.shared_experts", "linear", d, m)
    yield from v4.hyper(f"{prefix}.hc_ffn", (2 + HC_MULT) * HC_MULT, 3, d)


def _sources(layer: int, sizes: Sizes) -> Iterator[Spec]:
    """What a block owns of the compressed keys and values that others share."""
    attn, d = f"layers.{layer}.attn", sizes.hidden
    if layer in sizes.kv_sources:
        yield norm(f"{attn}.compressor.norm", HEAD_DIM)
        yield weight(f"{attn}.compressor.wkv", "plain", HEAD_DIM, d)
        if sizes.ratios[layer] > 1:  # one token alone needs no gate
            yield weight(f"{attn}.compressor.wgate", "plain", HEAD_DIM, d)
    if layer in sizes.index_sources:
        yield weight(f"{attn}.indexer.wq_b", "linear", sizes.index_heads * INDEX_HEAD_DIM, sizes.q_lora_rank)
        yield weight(f"{attn}.indexer.weights_proj", "plain", sizes.index_heads, d)
    if layer in sizes.kv_sources:
        yield weight(f"{attn}.indexer.wk", "plain", INDEX_HEAD_DIM, HEAD_DIM)
        yield norm(f"{attn}.indexer.k_norm", INDEX_HEAD_DIM)


def _engram(layer: int, rows: int, sizes: Sizes) -> Iterator[Spec]:
    prefix, d, width = f"layers.{layer}.engram", sizes.hidden, sizes.engram_head_dim
    columns = (sizes.engram_ngram - 1) * sizes.engram_heads
    yield Spec(f"{prefix}.embed.weight", "lookup", (rows, width))
    yield weight(f"{prefix}.wkv", "linear", d * (HC_MULT + 1), columns * width)
    for name in ("q_weight", "k_weight"):
        yield Spec(f"{prefix}.{name}", "plain", (HC_MULT, d), mean=1.0, std=0.1)


def _draft(sizes: Sizes) -> Iterator[Spec]:
    """As DeepSeek-V4's, but for its own number of experts, the Markov head's names, and no learned hc_head."""
    d, last = sizes.hidden, f"mtp.{sizes.draft_blocks - 1}"
    yield weight("mtp.0.main_proj", "linear", d, d * len(sizes.draft_targets))
    yield norm("mtp.0.main_norm", d)
    for number in range(sizes.draft_blocks):
        yield from _block(f"mtp.{number}", sizes, sizes.draft_experts)
    yield norm(f"{last}.norm", d)
    yield weight(f"{last}.markov_head.embed", "plain", sizes.vocab, sizes.markov_rank)
    yield weight(f"{last}.markov_head.head", "plain", sizes.vocab, sizes.markov_rank)
    yield weight(f"{last}.confidence_head.proj", "plain", 1, d + sizes.markov_rank)


def _with_bias(name: str, rows: int, columns: int) -> Iterator[Spec]:
    yield weight(name, "plain", rows, columns)
    yield Spec(f"{name}.bias", "plain", (rows,), std=0.1)


def _vision(sizes: Sizes) -> Iterator[Spec]:
    d, v, inner = sizes.hidden, sizes.vision_hidden, sizes.vision_intermediate
    for name in ("image_start", "image_end", "image_newline"):
        yield Spec(name, "plain", (d,))
    yield from _with_bias("vision.patch_embed.proj", v, 3 * sizes.patch**2)
    for block in range(sizes.vision_layers):
        prefix = f"vision.blocks.{block}"
        yield norm(f"{prefix}.norm1", v)
        yield from _with_bias(f"{prefix}.attn.wqkv", 3 * v, v)
        yield from _with_bias(f"{prefix}.attn.wo", v, v)
        yield norm(f"{prefix}.norm2", v)
        yield weight(f"{prefix}.mlp.w1", "plain", 2 * inner, v)
        yield weight(f"{prefix}.mlp.w2", "plain", v, inner)
    yield norm("vision.norm", v)
    yield from _with_bias("aligner.w1", d, v * sizes.downsample**2)
    yield from _with_bias("aligner.w2", d, d)


def specs(sizes: Sizes) -> Iterator[Spec]:
    """Every logical tensor in the order in which the shards hold them."""
    d, tables = sizes.hidden, dict(zip(sizes.engram_layers, sizes.engram_rows, strict=True))
    yield Spec("embed.weight", "plain", (sizes.vocab, d))
    for layer in range(sizes.layers):
        yield from _block(f"layers.{layer}", sizes, sizes.experts)
        yield from _sources(layer, sizes)
        if layer in tables:
            yield from _engram(layer, tables[layer], sizes)
    yield norm("norm", d)
    yield weight("head", "plain", sizes.vocab, d, gain=2.0)
    yield from _vision(sizes)
    yield from _draft(sizes)


entries = partial(v4.entries, stored="fp8_mxfp4", side=SIDE)


def config(sizes: Sizes) -> dict[str, Any]:
    """config.json as the hub spells it: the language model's fields nested."""
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "image_token_id": sizes.vocab - 16,
        "model_type": "deepseek_v41",
        "pad_token_id": 2,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "expert_dtype": "fp4",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [SIDE, SIDE],
        },
        "text_config": {
            "attention_bias": False,
            "candidate_block_size": 8,
            "candidate_source_layer_id": sizes.candidate_source,
            "candidate_topk_blocks": 2048,
            "compress_ratios": [*sizes.ratios, *[0] * sizes.draft_blocks],
            "compress_rope_theta": 160000,
            "dspark_block_size": 5,
            "dspark_markov_rank": sizes.markov_rank,
            "dspark_n_routed_experts": sizes.draft_experts,
            "dspark_noise_token_id": sizes.vocab - 1,
            "dspark_num_experts_per_tok": sizes.draft_top_k,
            "dspark_target_layer_ids": sizes.draft_targets,
            "engram_compressed_vocab_size": sizes.engram_compressed_vocab,
            "engram_head_dim": sizes.engram_head_dim,
            "engram_layer_ids": list(sizes.engram_layers),
            "engram_max_ngram_size": sizes.engram_ngram,
            "engram_n_heads": sizes.engram_heads,
            "engram_num_embeddings": list(sizes.engram_rows),
            "engram_pad_token_id": 2,
            "engram_vocab_size": sizes.engram_vocab,
            "hc_eps": 1e-06,
            "hc_mult": HC_MULT,
            "hc_sinkhorn_iters": 20,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "hidden_size": sizes.hidden,
            "index_head_dim": INDEX_HEAD_DIM,
            "index_n_heads": sizes.index_heads,
            "index_source_layer_ids": list(sizes.index_sources),
            "index_topk": sizes.index_topk,
            "kv_source_layer_ids": list(sizes.kv_sources),
            "max_position_embeddings": 1048576,
            "model_type": "deepseek_v41_text",
            "moe_intermediate_size": sizes.moe_intermediate,
            "n_routed_experts": sizes.experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": sizes.heads,
            "num_experts_per_tok": sizes.top_k,
            "num_hidden_layers": sizes.layers,
            "num_key_value_heads": 1,
            "num_nextn_predict_layers": sizes.draft_blocks,
            "o_groups": sizes.o_groups,
            "o_lora_rank": sizes.o_lora_rank,
            "q_lora_rank": sizes.q_lora_rank,
            "qk_rope_head_dim": v4.ROPE_DIM,
            "rms_norm_eps": 1e-20,
            "rope_scaling": {
                "beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536, "rope_type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 1.5,
            "scoring_func": "sqrtsoftplus",
            "sliding_window": 128,
            "swiglu_limit": 10.0,
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "vocab_size": sizes.vocab,
        },
        "vision_config": {
            "downsample_ratio": sizes.downsample,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "max_image_tokens": 1024,
            "max_wh_ratio": None,
            "min_pixels": 295936,
            "model_type": "deepseek_v41_vision",
            "num_attention_heads": sizes.vision_heads,
            "num_hidden_layers": sizes.vision_layers,
            "patch_size": sizes.patch,
            "rope_theta": 10000,
        },
    }  # fmt: skip


def write(directory: Path, *, seed: int = 0, shards: int = 3, sizes: Sizes | None = None) -> Path:
    """Write the checkpoint into the new or empty `directory` and return it. Raises FileExistsError when the directory holds
    something."""
    chosen = sizes or Sizes()
    new_directory(directory)
    wanted = list(specs(chosen))
    v4.write_tensors(directory, wanted, shards, [entries(spec) for spec in wanted],
                     lambda spec: v4.values(spec, "fp8_mxfp4", chosen, seed, SIDE))  # fmt: skip
    v4.write_side_files(directory, config(chosen), "encoding.py")
    return directory


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write a random DeepSeek-V4.1 checkpoint in hub form.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=3)
    given = parser.parse_args(arguments)
    print(write(given.directory, seed=given.seed, shards=given.shards))


if __name__ == "__main__":
    main()
