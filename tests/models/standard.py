"""Tiny hub-form BF16 checkpoints of the standard families, with random weights.

Names are the hub's: every routed expert has its own tensors, never transformers' fused three-dimensional ones.

    python -m tests.models.standard OUT --family mixtral
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tests.models.storage import Entry, new_directory, normal, split_at, write_shards
from tests.models.tokenizer import write_json, write_sidecars, write_tokenizer

Family = Literal["qwen3_moe", "glm4_moe", "mixtral", "llama", "qwen3", "mistral"]

VOCAB = 1024
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


@dataclass(frozen=True)
class Form:
    """What differs between the families; all in features are multiples of 16, as NVFP4 needs."""

    architecture: str
    blocks: int = 2
    hidden: int = 128
    intermediate: int = 256
    experts: int = 0
    moe_intermediate: int = 0
    tied: bool = False
    head_norms: bool = False
    attention_bias: bool = False
    #: As DeepSeek-V3: a shared expert, dense blocks before the sparse ones, a bias of the router, MTP after the last block.
    shared: bool = False
    dense_blocks: int = 0
    scores_bias: bool = False
    mtp: int = 0
    extra: tuple[tuple[str, Any], ...] = ()


FORMS: dict[Family, Form] = {
    "qwen3_moe": Form(
        "Qwen3MoeForCausalLM",
        blocks=3,
        hidden=64,
        experts=8,
        moe_intermediate=96,
        head_norms=True,
        extra=(
            ("decoder_sparse_step", 1),
            ("mlp_only_layers", []),
            ("moe_intermediate_size", 96),
            ("norm_topk_prob", True),
            ("num_experts", 8),
            ("num_experts_per_tok", 2),
            ("output_router_logits", False),
            ("router_aux_loss_coef", 0.001),
            ("use_sliding_window", False),
        ),
    ),
    "glm4_moe": Form(
        "Glm4MoeForCausalLM",
        blocks=3,
        experts=8,
        moe_intermediate=96,
        head_norms=True,
        attention_bias=True,
        shared=True,
        dense_blocks=1,
        scores_bias=True,
        mtp=1,
        extra=(
            ("attention_bias", True),
            ("first_k_dense_replace", 1),
            ("moe_intermediate_size", 96),
            ("n_group", 1),
            ("n_routed_experts", 8),
            ("n_shared_experts", 1),
            ("norm_topk_prob", True),
            ("num_experts_per_tok", 2),
            ("num_nextn_predict_layers", 1),
            ("partial_rotary_factor", 0.5),
            ("routed_scaling_factor", 1.0),
            ("topk_group", 1),
            ("use_qk_norm", True),
        ),
    ),
    "mixtral": Form(
        "MixtralForCausalLM",
        intermediate=224,
        experts=4,
        moe_intermediate=224,
        extra=(
            ("num_experts_per_tok", 2),
            ("num_local_experts", 4),
            ("output_router_logits", False),
            ("router_aux_loss_coef", 0.02),
            ("sliding_window", None),
        ),
    ),
    "llama": Form("LlamaForCausalLM", tied=True, extra=(("mlp_bias", False),)),
    "qwen3": Form("Qwen3ForCausalLM", blocks=3, hidden=96, tied=True, head_norms=True),
    "mistral": Form("MistralForCausalLM", extra=(("sliding_window", None),)),
}


@dataclass(frozen=True)
class Spec:
    """One tensor with normal(mean, std) values."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 1.0
    dtype: torch.dtype = torch.bfloat16


def _weight(name: str, rows: int, columns: int, gain: float = 1.0) -> Spec:
    return Spec(f"{name}.weight", (rows, columns), std=gain / columns**0.5)


def _norm(name: str, width: int) -> Spec:
    return Spec(f"{name}.weight", (width,), mean=1.0, std=0.1)


def _mlp(family: Family, prefix: str, form: Form, sparse: bool) -> Iterator[Spec]:
    if not sparse:
        for name in ("gate_proj", "up_proj"):
            yield _weight(f"{prefix}.mlp.{name}", form.intermediate, form.hidden)
        yield _weight(f"{prefix}.mlp.down_proj", form.hidden, form.intermediate)
        return
    module = f"{prefix}.block_sparse_moe" if family == "mixtral" else f"{prefix}.mlp"
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    yield _weight(f"{module}.gate", form.experts, form.hidden, 2.0)
    if form.scores_bias:
        yield Spec(f"{module}.gate.e_score_correction_bias", (form.experts,), std=0.1, dtype=torch.float32)
    shared = ["shared_experts"] if form.shared else []
    for expert in [*(f"experts.{number}" for number in range(form.experts)), *shared]:
        for name in (gate, up):
            yield _weight(f"{module}.{expert}.{name}", form.moe_intermediate, form.hidden)
        yield _weight(f"{module}.{expert}.{down}", form.hidden, form.moe_intermediate)


def _block(family: Family, prefix: str, form: Form, sparse: bool) -> Iterator[Spec]:
    d = form.hidden
    yield _norm(f"{prefix}.input_layernorm", d)
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield _weight(f"{prefix}.self_attn.{name}_proj", heads * HEAD_DIM, d)
        if form.attention_bias:
            yield Spec(f"{prefix}.self_attn.{name}_proj.bias", (heads * HEAD_DIM,), std=0.1)
    yield _weight(f"{prefix}.self_attn.o_proj", d, HEADS * HEAD_DIM)
    if form.head_norms:
        yield _norm(f"{prefix}.self_attn.q_norm", HEAD_DIM)
        yield _norm(f"{prefix}.self_attn.k_norm", HEAD_DIM)
    yield _norm(f"{prefix}.post_attention_layernorm", d)
    yield from _mlp(family, prefix, form, sparse)


def _mtp(family: Family, prefix: str, form: Form) -> Iterator[Spec]:
    d = form.hidden
    yield from _block(family, prefix, form, sparse=True)
    yield from (_norm(f"{prefix}.{name}", d) for name in ("enorm", "hnorm", "shared_head.norm"))
    yield _weight(f"{prefix}.eh_proj", d, 2 * d)
    yield Spec(f"{prefix}.embed_tokens.weight", (VOCAB, d))
    yield _weight(f"{prefix}.shared_head.head", VOCAB, d)


def specs(family: Family) -> Iterator[Spec]:
    """Every tensor in the order in which the shards hold them."""
    form = FORMS[family]
    d = form.hidden
    # A tied head reads the embedding: its size sets how decisive the logits are.
    yield Spec("model.embed_tokens.weight", (VOCAB, d), std=2.0 * d**-0.5 if form.tied else 1.0)
    for block in range(form.blocks):
        yield from _block(family, f"model.layers.{block}", form, bool(form.experts) and block >= form.dense_blocks)
    for block in range(form.blocks, form.blocks + form.mtp):
        yield from _mtp(family, f"model.layers.{block}", form)
    yield _norm("model.norm", d)
    if not form.tied:
        yield _weight("lm_head", VOCAB, d, 2.0)


def config(family: Family) -> dict[str, Any]:
    """config.json as the hub spells it."""
    form = FORMS[family]
    return {
        "architectures": [form.architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": form.hidden,
        "initializer_range": 0.02,
        "intermediate_size": form.intermediate,
        "max_position_embeddings": 2048,
        "model_type": family,
        "num_attention_heads": HEADS,
        "num_hidden_layers": form.blocks,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": form.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": VOCAB,
        **dict(form.extra),
    }


def _anchors(boundary: int) -> Callable[[str], bool]:
    """Odd shards end between gate and up, even ones between q and k: fused groups cross the shard boundary."""
    ends = (".q_proj.weight",) if boundary % 2 else (".gate_proj.weight", ".w1.weight")
    return lambda name: name.endswith(ends)


def write(directory: Path, family: Family, *, seed: int = 0, shards: int = 2) -> Path:
    """Write the checkpoint, with a chat template, into the new or empty `directory` and return it.

    Raises FileExistsError when the directory holds something, ValueError when there are more shards than places to
    split.
    """
    new_directory(directory)
    by_name = {spec.name: spec for spec in specs(family)}
    ordered = [Entry(spec.name, spec.dtype, spec.shape) for spec in by_name.values()]

    def make(entry: Entry) -> torch.Tensor:
        spec = by_name[entry.name]
        return normal(seed, spec.name, spec.shape, spec.mean, spec.std).to(spec.dtype)

    write_shards(directory, ordered, split_at(ordered, shards, _anchors), make)
    write_json(directory / "config.json", config(family))
    write_tokenizer(directory, VOCAB, chat_template=True)
    write_sidecars(directory)
    return directory


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a standard family in hub form.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=get_args(Family), default="qwen3_moe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=2)
    given = parser.parse_args(arguments)
    print(write(given.directory, given.family, seed=given.seed, shards=given.shards))


if __name__ == "__main__":
    main()
