"""DeepSeek-V4.1 (`deepseek_v41`): DeepSeek-V4's experts and hyper-connections, compressed keys and values that blocks share,
Engram tables, a vision tower, a DSpark draft head.

Names and shapes: vllm 0.32, models/deepseek_v41 (attention.py, compressor.py, common/engram.py, nvidia/dspark.py, the
weights mapper of nvidia/model.py) and models/deepseek_v4/common/vision.py. They give the 96,085 tensors and
510,286,023,000 bytes of the published DeepSeek-V4.1-Flash (revision dba1be0; EfficientMoE/MoE-Infinity pull request
210). transformers 5.17 does not support this model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from calibration.families.deepseek_v4 import DEEPSEEK_V4, NVIDIA_WORDS, block_frame, dspark_ends
from calibration.families.promised import ConfigReader, Wanted, linear, norm


def _promised(c: ConfigReader) -> Iterator[tuple[str, Wanted]]:
    d, vocab, blocks = c.number("hidden_size"), c.number("vocab_size"), c.number("num_hidden_layers")
    ratios = c.numbers("compress_ratios", blocks)
    owners, indexers = _layers(c, "kv_source_layer_ids"), _layers(c, "index_source_layer_ids")
    # A table without a number of rows is promised by nothing, so that its tensors are unknown.
    tables = dict(zip(_layers(c, "engram_layer_ids"), _layers(c, "engram_num_embeddings"), strict=False))
    seeing = c.part("vision_config").number("num_hidden_layers", 0) > 0
    experts = c.number("n_routed_experts")
    yield "embed.weight", Wanted((vocab, d), "plain")
    yield "head.weight", Wanted((vocab, d), "linear", c.flag("tie_word_embeddings"))
    yield norm("norm", d)
    for block in range(blocks):
        yield from _block(c, f"layers.{block}", experts, seeing)
        if block in owners:
            yield from _owned(c, f"layers.{block}.attn", ratios[block] if block < len(ratios) else 0)
        if block in indexers:
            attn, heads = f"layers.{block}.attn", c.number("index_n_heads")
            yield from linear(f"{attn}.indexer.wq_b", heads * c.number("index_head_dim"), c.number("q_lora_rank"))
            yield f"{attn}.indexer.weights_proj.weight", Wanted((heads, d), "plain")
        if block in tables:
            yield from _engram(c, f"layers.{block}.engram", tables[block])
    if seeing:
        yield from _vision(c)
    yield from _draft(c, experts, seeing)


def _layers(c: ConfigReader, key: str) -> list[int]:
    """A list that a model without such layers leaves out, as vLLM takes it."""
    return c.numbers(key, 0) if c.values.get(key) is not None else []


def _block(c: ConfigReader, prefix: str, experts: int, seeing: bool) -> Iterator[tuple[str, Wanted]]:
    yield from block_frame(c, prefix, experts)
    # Image tokens have a routing bias of their own.
    for bias in ("bias", "bias_vl") if seeing else ("bias",):
        yield f"{prefix}.ffn.gate.{bias}", Wanted((experts,), "float32")


def _owned(c: ConfigReader, attn: str, ratio: int) -> Iterator[tuple[str, Wanted]]:
    """The compressed keys and values that this block and later ones read."""
    d, width, index = c.number("hidden_size"), c.number("head_dim"), c.number("index_head_dim")
    yield norm(f"{attn}.compressor.norm", width)
    for name in ("wkv", "wgate") if ratio > 1 else ("wkv",):
        yield f"{attn}.compressor.{name}.weight", Wanted((width, d), "plain")
    yield f"{attn}.indexer.wk.weight", Wanted((index, width), "plain")
    yield norm(f"{attn}.indexer.k_norm", index)


def _engram(c: ConfigReader, prefix: str, rows: int) -> Iterator[tuple[str, Wanted]]:
    d, width, mixed = c.number("hidden_size"), c.number("engram_head_dim"), c.number("hc_mult")
    columns = max(c.number("engram_max_ngram_size") - 1, 0) * c.number("engram_n_heads")
    yield f"{prefix}.embed.weight", Wanted((rows, width), "fp8")
    yield from linear(f"{prefix}.wkv", d * (mixed + 1), columns * width)
    for name in ("q_weight", "k_weight"):
        yield f"{prefix}.{name}", Wanted((mixed, d), "plain")


def _vision(c: ConfigReader) -> Iterator[tuple[str, Wanted]]:
    d, v = c.number("hidden_size"), c.part("vision_config")
    width, inner = v.number("hidden_size"), v.number("intermediate_size")
    yield from ((f"image_{name}", Wanted((d,), "plain")) for name in ("start", "end", "newline"))
    yield from _unquantized("vision.patch_embed.proj", width, 3 * v.number("patch_size") ** 2)
    for block in range(v.number("num_hidden_layers", 0)):
        prefix = f"vision.blocks.{block}"
        yield from (norm(f"{prefix}.{name}", width) for name in ("norm1", "norm2"))
        yield from _unquantized(f"{prefix}.attn.wqkv", 3 * width, width)
        yield from _unquantized(f"{prefix}.attn.wo", width, width)
        yield f"{prefix}.mlp.w1.weight", Wanted((2 * inner, width), "plain")
        yield f"{prefix}.mlp.w2.weight", Wanted((width, inner), "plain")
    yield norm("vision.norm", width)
    yield from _unquantized("aligner.w1", d, width * v.number("downsample_ratio") ** 2)
    yield from _unquantized("aligner.w2", d, d)


def _unquantized(name: str, rows: int, columns: int) -> Iterator[tuple[str, Wanted]]:
    yield f"{name}.weight", Wanted((rows, columns), "plain")
    yield f"{name}.bias", Wanted((rows,), "plain")


def _draft(c: ConfigReader, experts: int, seeing: bool) -> Iterator[tuple[str, Wanted]]:
    """DSpark as in DeepSeek-V4, except that it has its own number of experts, other names in the Markov head, and no
    learned hc_head."""
    count = c.number("num_nextn_predict_layers", 0)
    for number in range(count):
        yield from _block(c, f"mtp.{number}", c.number("dspark_n_routed_experts", 0) or experts, seeing)
    if count:
        yield from dspark_ends(c, count, ("embed", "head"))


DEEPSEEK_V41 = replace(
    DEEPSEEK_V4,
    name="deepseek_v41",
    model_types=("deepseek_v41",),
    parts=(
        ("vision", r"^(vision|aligner)\.|^image_\w+$"),
        ("Engram table", r"\.engram\.embed(\.|$)"),
        ("Engram", r"\.engram\."),
        *DEEPSEEK_V4.parts,
    ),
    promised=_promised,
    never_quantized=(
        *DEEPSEEK_V4.never_quantized,
        (r"\.indexer\.wk$", "vLLM runs the indexer's wk unquantized"),
        (r"^(vision|aligner)\.", "vLLM runs the vision tower unquantized"),
    ),
    native_parts=("Engram table",),
    # No class of transformers has these modules, and vLLM adds a prefix for the vision tower's wrapper.
    renames=(),
    serving_renames=(
        (r"^(layers|norm)\b", r"language_model.model.\1"),
        (r"^embed\b", "language_model.model.embed_tokens"),
        (r"^head\b", "language_model.lm_head"),
    ),
    serving_config=(),
    # By the published descriptions of nvidia/DeepSeek-V4.1-Flash-NVFP4 (revision 3431dde): 188,245 tensors, tiles of 32x32,
    # `ignore` as in DeepSeek-V4. Its MXFP4 draft experts are read so by vllm 0.32, models/deepseek_v41/quant_config.py.
    fp8_dialect=replace(NVIDIA_WORDS, tile=(32, 32)),
    language="text_config",
    not_calibrated="transformers has no code of deepseek_v41, so that no forward pass can be made",
    encoding=None,
)
