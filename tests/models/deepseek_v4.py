"""Tiny but complete hub-form DeepSeek-V4 checkpoints with random weights, in three stored formats.

The names, dtypes and shapes are those of the table in docs (DeepSeek-V4 checkpoint grammar). All three formats of a
seed come from the same BF16 weights: `fp8` and `fp8_mxfp4` are roundings of exactly what `bf16` stores.

    python -m tests.models.deepseek_v4 OUT --stored fp8_mxfp4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tests.models.storage import (
    MXFP4_GROUP,
    TILE,
    Entry,
    ceil_div,
    generator,
    new_directory,
    normal,
    split_at,
    to_mxfp4,
    to_tiles,
    write_shards,
)
from tests.models.tokenizer import write_json, write_sidecars, write_tokenizer

Stored = Literal["bf16", "fp8", "fp8_mxfp4"]
Kind = Literal["linear", "routed_expert", "plain", "float32", "table", "lookup"]
"""linear and routed_expert are quantized by the formats, plain is always BF16, table is int64. lookup is E4M3 with a scale for
each 32 columns of a row: DeepSeek-V4.1's Engram tables."""

HEAD_DIM = 512
ROPE_DIM = 64
INDEX_HEAD_DIM = 128
"""vLLM's CPU kernels know these three dimensions only."""
HC_MULT = 4
LOOKUP_GROUP = 32

_ENCODING = '''"""Placeholder for the prompt encoding that DeepSeek-V4 repositories ship instead of a chat template."""


def encode(text: str) -> str:
    return "<\\uff5cbegin\\u2581of\\u2581sentence\\uff5c><\\uff5cUser\\uff5c>" + text + "<\\uff5cAssistant\\uff5c>"
'''


@dataclass(frozen=True)
class Sizes:
    """The dimensions that differ between a tiny model and a benchmark model.

    The defaults leave ragged FP8 tiles: hidden 64 and o_groups * o_lora_rank 192 are no multiples of 128.
    vLLM needs experts in {64, 128, 256, 384} with top_k 6 or 8, on CPU o_lora_rank in multiples of 32, and where
    attention or shared experts stay FP8, q_lora_rank and moe_intermediate in multiples of 128.
    MXFP4 needs hidden and moe_intermediate in multiples of 32.
    """

    hidden: int = 64
    layers: int = 3
    hash_layers: int = 2
    experts: int = 64
    top_k: int = 6
    moe_intermediate: int = 128
    heads: int = 2
    q_lora_rank: int = 128
    o_lora_rank: int = 96
    o_groups: int = 2
    index_heads: int = 8
    index_topk: int = 512
    vocab: int = 1024
    #: Blocks of a DSpark draft head; 0: the MTP block of the first releases.
    draft_blocks: int = 0
    markov_rank: int = 32

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """0, 4, 128, 4, 128, ... for the blocks; the draft head's zeros are not among them."""
        return tuple(0 if i == 0 else (4 if i % 2 else 128) for i in range(self.layers))

    @property
    def draft_targets(self) -> list[int]:
        """The blocks whose outputs a DSpark head reads: the last ones, one for each of its own."""
        return list(range(self.layers - self.draft_blocks, self.layers))


@dataclass(frozen=True)
class Spec:
    """One logical tensor: its values are normal(mean, std), whatever format stores them."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 1.0


def weight(name: str, kind: Kind, rows: int, columns: int, gain: float = 1.0) -> Spec:
    """A matrix [rows, columns] that keeps the variance of its input, times gain squared."""
    return Spec(f"{name}.weight", kind, (rows, columns), std=gain / columns**0.5)


def norm(name: str, width: int) -> Spec:
    return Spec(f"{name}.weight", "plain", (width,), mean=1.0, std=0.1)


def hyper(prefix: str, outputs: int, scales: int, hidden: int) -> Iterator[Spec]:
    """mHC tensors of one site: fn [outputs, 4D], base [outputs], scale [scales], all F32."""
    width = HC_MULT * hidden
    yield Spec(f"{prefix}_fn", "float32", (outputs, width), std=width**-0.5)
    yield Spec(f"{prefix}_base", "float32", (outputs,), std=0.5)
    yield Spec(f"{prefix}_scale", "float32", (scales,), mean=1.0, std=0.1)


def _compressor(prefix: str, ratio: int, head_dim: int, hidden: int) -> Iterator[Spec]:
    width = head_dim * (2 if ratio == 4 else 1)
    yield Spec(f"{prefix}.ape", "float32", (ratio, width), std=0.5)
    yield norm(f"{prefix}.norm", head_dim)
    yield weight(f"{prefix}.wkv", "plain", width, hidden)
    yield weight(f"{prefix}.wgate", "plain", width, hidden)


def attention(prefix: str, sizes: Sizes) -> Iterator[Spec]:
    """What every block's attention has, whatever it compresses."""
    d, rank, output_rank = sizes.hidden, sizes.q_lora_rank, sizes.o_groups * sizes.o_lora_rank
    yield Spec(f"{prefix}.attn_sink", "float32", (sizes.heads,))
    yield weight(f"{prefix}.wq_a", "linear", rank, d)
    yield norm(f"{prefix}.q_norm", rank)
    yield weight(f"{prefix}.wq_b", "linear", sizes.heads * HEAD_DIM, rank)
    yield weight(f"{prefix}.wkv", "linear", HEAD_DIM, d)
    yield norm(f"{prefix}.kv_norm", HEAD_DIM)
    yield weight(f"{prefix}.wo_a", "linear", output_rank, sizes.heads * HEAD_DIM // sizes.o_groups)
    yield weight(f"{prefix}.wo_b", "linear", d, output_rank)


def _block(prefix: str, sizes: Sizes, ratio: int, *, hashed: bool) -> Iterator[Spec]:
    d, m, rank = sizes.hidden, sizes.moe_intermediate, sizes.q_lora_rank
    yield norm(f"{prefix}.attn_norm", d)
    yield from attention(f"{prefix}.attn", sizes)
    if ratio:
        yield from _compressor(f"{prefix}.attn.compressor", ratio, HEAD_DIM, d)
    if ratio == 4:
        yield weight(f"{prefix}.attn.indexer.wq_b", "linear", sizes.index_heads * INDEX_HEAD_DIM, rank)
        yield weight(f"{prefix}.attn.indexer.weights_proj", "plain", sizes.index_heads, d)
        yield from _compressor(f"{prefix}.attn.indexer.compressor", ratio, INDEX_HEAD_DIM, d)
    yield from hyper(f"{prefix}.hc_attn", (2 + HC_MULT) * HC_MULT, 3, d)
    yield norm(f"{prefix}.ffn_norm", d)
    yield weight(f"{prefix}.ffn.gate", "plain", sizes.experts, d, gain=2.0)
    if hashed:
        yield Spec(f"{prefix}.ffn.gate.tid2eid", "table", (sizes.vocab, sizes.top_k))
    else:
        yield Spec(f"{prefix}.ffn.gate.bias", "float32", (sizes.experts,), std=0.1)
    for expert in range(sizes.experts):
        yield from mlp(f"{prefix}.ffn.experts.{expert}", "routed_expert", d, m)
    yield from mlp(f"{prefix}.ffn.shared_experts", "linear", d, m)
    yield from hyper(f"{prefix}.hc_ffn", (2 + HC_MULT) * HC_MULT, 3, d)


def mlp(prefix: str, kind: Kind, hidden: int, intermediate: int) -> Iterator[Spec]:
    """w1 (gate) and w3 (up) [M, D], w2 (down) [D, M]."""
    yield weight(f"{prefix}.w1", kind, intermediate, hidden)
    yield weight(f"{prefix}.w2", kind, hidden, intermediate)
    yield weight(f"{prefix}.w3", kind, intermediate, hidden)


def specs(sizes: Sizes) -> Iterator[Spec]:
    """Every logical tensor in the order in which the shards hold them."""
    d = sizes.hidden
    yield Spec("embed.weight", "plain", (sizes.vocab, d))
    for layer, ratio in enumerate(sizes.compress_ratios):
        yield from _block(f"layers.{layer}", sizes, ratio, hashed=layer < sizes.hash_layers)
    yield norm("norm", d)
    yield weight("head", "plain", sizes.vocab, d, gain=2.0)
    yield from hyper("hc_head", HC_MULT, 1, d)
    if sizes.draft_blocks:
        yield from _dspark(sizes)
        return
    for name in ("enorm", "hnorm", "norm"):
        yield norm(f"mtp.0.{name}", d)
    for name in ("e_proj", "h_proj"):
        yield weight(f"mtp.0.{name}", "linear", d, d)
    yield from _block("mtp.0", sizes, 0, hashed=False)
    yield from hyper("mtp.0.hc_head", HC_MULT, 1, d)


def _dspark(sizes: Sizes) -> Iterator[Spec]:
    """The draft head of DeepSeek-V4-Flash-0731 and V4-Pro-0813: the first block takes the target's hidden states in, the
    last one gives tokens (names: vllm 0.32, models/deepseek_v4/nvidia/dspark.py, `_remap_dspark_name`; counts of the
    index of Flash-0731, 1568, 1565 and 1572: vllm-project/vllm pull request 41834)."""
    d, last = sizes.hidden, f"mtp.{sizes.draft_blocks - 1}"
    yield weight("mtp.0.main_proj", "linear", d, d * len(sizes.draft_targets))
    yield norm("mtp.0.main_norm", d)
    for number in range(sizes.draft_blocks):
        yield from _block(f"mtp.{number}", sizes, 0, hashed=False)
    yield norm(f"{last}.norm", d)
    yield from hyper(f"{last}.hc_head", HC_MULT, 1, d)
    yield weight(f"{last}.markov_head.markov_w1", "plain", sizes.vocab, sizes.markov_rank)
    yield weight(f"{last}.markov_head.markov_w2", "plain", sizes.vocab, sizes.markov_rank)
    yield weight(f"{last}.confidence_head.proj", "plain", 1, d + sizes.markov_rank)


def entries(spec: Spec, stored: Stored, side: int = TILE) -> tuple[Entry, ...]:
    """The stored tensors of `spec`: the weight, and behind it its scale when the format quantizes it. `side`: of an FP8
    tile."""
    if spec.kind == "table":
        return (Entry(spec.name, torch.int64, spec.shape),)
    if spec.kind == "float32":
        return (Entry(spec.name, torch.float32, spec.shape),)
    if spec.kind == "plain" or stored == "bf16":
        return (Entry(spec.name, torch.bfloat16, spec.shape),)
    scale = spec.name.removesuffix(".weight") + ".scale"
    rows, columns = spec.shape
    if spec.kind == "routed_expert" and stored == "fp8_mxfp4":
        return (
            Entry(spec.name, torch.int8, (rows, columns // 2)),
            Entry(scale, torch.float8_e8m0fnu, (rows, columns // MXFP4_GROUP)),
        )
    scale_dtype = torch.float8_e8m0fnu if stored == "fp8_mxfp4" else torch.float32
    height, width = _tile(spec, side)
    return (
        Entry(spec.name, torch.float8_e4m3fn, spec.shape),
        Entry(scale, scale_dtype, (ceil_div(rows, height), ceil_div(columns, width))),
    )


def _tile(spec: Spec, side: int) -> tuple[int, int]:
    return (1, LOOKUP_GROUP) if spec.kind == "lookup" else (side, side)


def values(spec: Spec, stored: Stored, sizes: Sizes, seed: int, side: int = TILE) -> tuple[torch.Tensor, ...]:
    """The random values of `entries(spec, stored, side)`, in the same order."""
    if spec.kind == "table":
        # The router sends a token to top_k different experts; a table of zeros would use expert 0 alone.
        order = torch.rand((spec.shape[0], sizes.experts), generator=generator(seed, spec.name))
        return (order.topk(spec.shape[1], dim=1).indices,)
    return stored_as(normal(seed, spec.name, spec.shape, spec.mean, spec.std), spec, stored, side)


def stored_as(values: torch.Tensor, spec: Spec, stored: Stored, side: int = TILE) -> tuple[torch.Tensor, ...]:
    """float32 values as `entries(spec, stored, side)` store them, in the same order."""
    if spec.kind == "float32":
        return (values,)
    plain = values.to(torch.bfloat16)
    if spec.kind == "plain" or stored == "bf16":
        return (plain,)
    if spec.kind == "routed_expert" and stored == "fp8_mxfp4":
        return to_mxfp4(plain)
    return to_tiles(plain, torch.float8_e8m0fnu if stored == "fp8_mxfp4" else torch.float32, *_tile(spec, side))


def config(sizes: Sizes, stored: Stored) -> dict[str, Any]:
    """config.json as the hub spells it."""
    content: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "compress_ratios": [*sizes.compress_ratios, *[0] * max(sizes.draft_blocks, 1)],
        "compress_rope_theta": 160000,
        "eos_token_id": 1,
        "hc_eps": 1e-06,
        "hc_mult": HC_MULT,
        "hc_sinkhorn_iters": 20,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "index_head_dim": INDEX_HEAD_DIM,
        "index_n_heads": sizes.index_heads,
        "index_topk": sizes.index_topk,
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": sizes.moe_intermediate,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.heads,
        "num_experts_per_tok": sizes.top_k,
        "num_hash_layers": sizes.hash_layers,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": sizes.o_groups,
        "o_lora_rank": sizes.o_lora_rank,
        "q_lora_rank": sizes.q_lora_rank,
        "qk_rope_head_dim": ROPE_DIM,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 512,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": sizes.vocab,
    }
    if sizes.draft_blocks:
        # The released configs keep num_nextn_predict_layers: 1 beside three draft blocks.
        content |= {
            "dspark_block_size": 5,
            "dspark_markov_rank": sizes.markov_rank,
            "dspark_noise_token_id": sizes.vocab - 1,
            "dspark_target_layer_ids": sizes.draft_targets,
        }
    if stored != "bf16":
        content["expert_dtype"] = "fp4" if stored == "fp8_mxfp4" else "fp8"
        content["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            **({"scale_fmt": "ue8m0"} if stored == "fp8_mxfp4" else {}),
            "weight_block_size": [TILE, TILE],
        }
    return content


def _anchors(boundary: int) -> Callable[[str], bool]:
    """The second shard ends inside wq_a/wkv, all others inside a routed expert's w1/w3; each parts weight and scale."""
    if boundary == 1:
        return lambda name: name.endswith(".attn.wq_a.weight")
    return lambda name: ".ffn.experts." in name and name.endswith(".w1.weight")


def write(directory: Path, stored: Stored, *, seed: int = 0, shards: int = 3, **sizes: int) -> Path:
    """Write the checkpoint into the new or empty `directory` and return it; `sizes` are the fields of `Sizes`.

    Memory: one shard and one block's largest tensor. Raises FileExistsError when the directory holds something,
    ValueError when there are more shards than places to split, or a size that a format cannot store.
    """
    chosen = Sizes(**sizes)
    if stored == "fp8_mxfp4" and (chosen.hidden % MXFP4_GROUP or chosen.moe_intermediate % MXFP4_GROUP):
        raise ValueError(
            f"hidden {chosen.hidden} and moe_intermediate {chosen.moe_intermediate}: MXFP4 needs multiples of 32"
        )
    new_directory(directory)
    wanted = list(specs(chosen))
    write_tensors(directory, wanted, shards, [entries(spec, stored) for spec in wanted],
                  lambda spec: values(spec, stored, chosen, seed))  # fmt: skip
    write_side_files(directory, config(chosen, stored), "encoding_dsv4.py")
    return directory


def write_tensors(
    directory: Path, wanted: list[Spec], shards: int, stored: list[tuple[Entry, ...]],
    values_of: Callable[[Spec], tuple[torch.Tensor, ...]],
) -> None:  # fmt: skip
    """Write the shards; `stored` and `values_of` are the entries of each spec and their values."""
    by_name = {entry.name: (spec, i) for spec, made in zip(wanted, stored, strict=True) for i, entry in enumerate(made)}
    ordered = [entry for made in stored for entry in made]

    # A weight and its scale may lie in different shards, but they are neighbours: one remembered result is enough.
    remembered = lru_cache(maxsize=1)(values_of)

    def make(entry: Entry) -> torch.Tensor:
        spec, position = by_name[entry.name]
        tensor: torch.Tensor = remembered(spec)[position]
        return tensor

    write_shards(directory, ordered, split_at(ordered, shards, _anchors), make)


def write_side_files(directory: Path, content: dict[str, Any], encoding: str) -> None:
    """config.json, a tokenizer and what else a hub repository of this family holds; no chat template."""
    write_json(directory / "config.json", content)
    write_tokenizer(directory, content.get("text_config", content)["vocab_size"], chat_template=False)
    write_sidecars(directory)
    (directory / "encoding").mkdir()
    (directory / "encoding" / encoding).write_text(_ENCODING, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write a random DeepSeek-V4 checkpoint in hub form.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--stored", choices=get_args(Stored), default="fp8_mxfp4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=3)
    names = [field.name for field in fields(Sizes)]
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Sizes, name))
    given = parser.parse_args(arguments)
    sizes = {name: getattr(given, name) for name in names}
    print(write(given.directory, given.stored, seed=given.seed, shards=given.shards, **sizes))


if __name__ == "__main__":
    main()
