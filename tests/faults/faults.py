"""The list of faults. A fault that its level does not catch is a defect of `verify`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tests.faults import editing as e
from tests.models.tokenizer import trained

Level = Literal["structure", "structure with source", "structure in a run", "fidelity", "serving"]
X, Y = "layers.0.ffn.experts.3", "layers.0.ffn.experts.9"
Q = "model.layers.1.mlp.experts.5"
DSPARK, V41, ENGRAM = "deepseek_v4 dspark", "deepseek_v41", "layers.0.engram.embed"


@dataclass(frozen=True)
class Fault:
    """One corruption. `level` is the lowest that must catch it and `check` the check that says FAIL there: structure
    (checkpoint alone), structure with source, structure in a run (the journal's digests too), fidelity, serving."""

    name: str
    spoil: e.Spoil
    level: Level
    check: str
    base: str = "deepseek_v4"


def _of(name: str, spoil: e.Spoil, check: str, base: str = "deepseek_v4") -> Fault:
    return Fault(name, spoil, "structure", f"structure.{check}", base)


def _source(name: str, spoil: e.Spoil, check: str, base: str = "deepseek_v4") -> Fault:
    return Fault(name, spoil, "structure with source", f"structure.{check}", base)


def _far(name: str, spoil: e.Spoil, base: str = "deepseek_v4", check: str = "fidelity.weights") -> Fault:
    return Fault(name, spoil, "fidelity", check, base)


def _transformers_names(tensors: e.Tensors) -> None:
    for name in [name for name in tensors if name.startswith("layers.")]:
        tensors[f"model.{name.replace('.attn.', '.self_attn.').replace('.ffn.', '.mlp.')}"] = tensors.pop(name)


def _fp8_under_an_nvfp4_label(tensors: e.Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        rows, half = tensors.pop(name).shape
        for leaf in ("weight_scale", "weight_global_scale", "input_global_scale"):
            del tensors[f"{module}.{leaf}"]
        tensors[f"{module}.weight"] = torch.ones(rows, half * 2).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = torch.ones(-(-rows // 128), -(-half * 2 // 128))


def _modelopt_names(pattern: str) -> Callable[[e.Tensors], None]:
    def edit(tensors: e.Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".weight_packed") and re.search(pattern, name)]:
            module = name.removesuffix(".weight_packed")
            tensors[f"{module}.weight"] = tensors.pop(name)
            for ours, theirs in (("weight_global_scale", "weight_scale_2"), ("input_global_scale", "input_scale")):
                tensors[f"{module}.{theirs}"] = 1 / tensors.pop(f"{module}.{ours}").reshape(())

    return edit


def _nvidia_config(config: dict[str, Any]) -> None:
    config["expert_dtype"] = "fp4"
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "ignore": ["mtp.*"], "moe_quant_algo": "NVFP4", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }  # fmt: skip


def _swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return (packed << 4) | (packed >> 4)


def _swap_a_row(packed: torch.Tensor) -> torch.Tensor:
    changed = packed.clone()
    changed[: len(changed) // 4] = _swap_nibbles(changed[: len(changed) // 4])
    return changed


def _other_tokenizer(vocab: int) -> e.Spoil:
    def spoil(directory: e.Path) -> None:
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer.json").write_text(trained(vocab), encoding="utf-8")

    return spoil


def _shuffled_tokenizer(content: dict[str, dict[str, dict[str, int]]]) -> None:
    vocabulary = content["model"]["vocab"]
    plain = [token for token, id in vocabulary.items() if id > 300]
    ids = [vocabulary[token] for token in plain]
    vocabulary.update(zip(plain, reversed(ids), strict=True))


_Edits = dict[str, Callable[[dict[str, Any]], object]]
_TOKENIZER: _Edits = {
    "a normalizer": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "another pre_tokenizer": lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
    "another decoder": lambda c: c.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "a post_processor that adds a token": lambda c: c.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<think>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<think>": {"id": "<think>", "ids": [4], "tokens": ["<think>"]}},
        }
    ),
    "an added token that strips": lambda c: c["added_tokens"][0].update(lstrip=True, rstrip=True),
    "a special token that is none": lambda c: c["added_tokens"][1].update(special=False),
    "truncation": lambda c: c.update(
        truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    ),
    "padding": lambda c: c.update(
        padding={"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 5,
                 "pad_type_id": 0, "pad_token": "</think>"}
    ),
    "ignore_merges": lambda c: c["model"].update(ignore_merges=True),
}  # fmt: skip
_TOKENIZER_CONFIG: _Edits = {
    "model_max_length 8": lambda c: c.update(model_max_length=8),
    "add_bos_token added": lambda c: c.update(add_bos_token=True),
    "another end token": lambda c: c.update(eos_token="<think>"),
    "split_special_tokens": lambda c: c.update(split_special_tokens=True),
    "further special tokens": lambda c: c.update(extra_special_tokens=["<think>"]),
    "added_tokens_decoder": lambda c: c.update(added_tokens_decoder={"4": {"content": "<x>", "special": True}}),
    "auto_map": lambda c: c.update(auto_map={"AutoTokenizer": ["m.T", None]}),
    "another class": lambda c: c.update(tokenizer_class="BertTokenizer"),
}
_GENERATION: _Edits = {
    "temperature": lambda c: c.update(temperature=0.01),
    "a forced token": lambda c: c.update(forced_eos_token_id=7),
    "bad words": lambda c: c.update(bad_words_ids=[[7]]),
    "suppressed tokens": lambda c: c.update(suppress_tokens=[1, 2]),
    "a further end token": lambda c: c.update(eos_token_id=[1, 7]),
    "no end token": lambda c: c.pop("eos_token_id"),
    "a longest answer": lambda c: c.update(max_new_tokens=4),
}

_KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
_HADAMARD = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}


def _old_draft_head(tensors: e.Tensors) -> None:
    """A DSpark head becomes the MTP block of the first releases."""
    hidden = tensors["mtp.2.norm.weight"].shape[0]
    for name in [name for name in tensors if name.startswith(("mtp.1.", "mtp.2.", "mtp.0.main_"))]:
        if name.startswith(("mtp.2.norm", "mtp.2.hc_head")):
            tensors[name.replace("mtp.2.", "mtp.0.")] = tensors[name]
        del tensors[name]
    for norm in ("enorm", "hnorm"):
        tensors[f"mtp.0.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for projection in ("e_proj", "h_proj"):
        tensors[f"mtp.0.{projection}.weight"] = torch.eye(hidden).bfloat16()


def _in_bf16(tensors: e.Tensors) -> None:
    scale = tensors.pop(f"{ENGRAM}.scale").float().repeat_interleave(32, 1)
    tensors[f"{ENGRAM}.weight"] = (tensors[f"{ENGRAM}.weight"].float() * scale).bfloat16()


def _one_row_less(tensors: e.Tensors) -> None:
    for leaf in ("weight", "scale"):
        tensors[f"{ENGRAM}.{leaf}"] = tensors[f"{ENGRAM}.{leaf}"][:-1]


def _one_mxfp4_scale_doubled(scales: torch.Tensor) -> torch.Tensor:
    """The two groups of 16 that were one group of 32: its power of two one larger."""
    values = scales.to(torch.float32)
    values[0, :2] *= 2
    return values.to(scales.dtype)


def _double_the_smallest(scales: torch.Tensor) -> torch.Tensor:
    values = scales.to(torch.float32)
    values.view(-1)[values.argmin()] *= 2
    return values.to(scales.dtype)


def _emptied(packed: torch.Tensor) -> torch.Tensor:
    groups = packed.clone().view(-1, 8)
    groups[::10] = 0
    return groups.view(packed.shape)


def _stale_blocks(_: object, group: dict[str, list[str]]) -> None:
    group["targets"] = [target.replace("layers\\.(?:0|1|2)", "layers\\.(?:0|1)") for target in group["targets"]]


FAULTS = [
    # The tensor set.
    _of("a packed weight missing", e.drop(rf"^{X}\.w1\.weight_packed$"), "tensors"),
    _of("an expert missing", e.drop(rf"^{X}\."), "tensors"),
    _of(
        "an extra expert index",
        e.rename(r"^layers\.0\.ffn\.experts\.63\.", "layers.0.ffn.experts.64.", keep=True),
        "tensors",
    ),
    _of("experts numbered from 1", e.rename(r"^layers\.0\.ffn\.experts\.0\.", "layers.0.ffn.experts.64."), "tensors"),
    _of("kv_norm misnamed", e.rename(r"^layers\.0\.attn\.kv_norm", "layers.0.attn.norm"), "tensors"),
    _of("names of transformers", e.tensors(_transformers_names), "tensors"),
    _of("a shared expert missing", e.drop(r"^layers\.2\.ffn\.shared_experts\."), "tensors"),
    _of("a router bias missing", e.drop(r"^layers\.2\.ffn\.gate\.bias$"), "tensors"),
    _of("one MTP tensor missing", e.drop(r"^mtp\.0\.enorm"), "tensors"),
    _of("untied head missing", e.drop(r"^lm_head"), "tensors", "mistral"),
    _of("mHC tensors rounded to BF16", e.values(r"\.hc_\w+$", lambda t: t.to(torch.bfloat16)), "tensors"),
    _of(
        "num_hidden_layers one too many",
        e.config(lambda c: c.update(num_hidden_layers=4, compress_ratios=[0, 4, 128, 0, 0])),
        "tensors",
    ),
    _of("num_hidden_layers one too few", e.config(lambda c: c.update(num_hidden_layers=2)), "tensors", "qwen3_moe"),
    _of("another number of experts in the config", e.config(lambda c: c.update(n_routed_experts=128)), "tensors"),
    _of("another number of hash blocks in the config", e.config(lambda c: c.update(num_hash_layers=1)), "tensors"),
    _source("MTP dropped", e.drop(r"^mtp\."), "mtp"),
    _source("embedding in another dtype", e.value("embed.weight", lambda t: t.to(torch.float16)), "tensors"),
    # Low-bit sets.
    _of("a group scale missing", e.drop(rf"^{X}\.w1\.weight_scale$"), "companions"),
    _of("a weight global scale missing", e.drop(rf"^{X}\.w3\.weight_global_scale$"), "companions"),
    _of("an input scale missing", e.drop(rf"^{X}\.w2\.input_global_scale$"), "companions"),
    _of("packed weight transposed", e.value(f"{X}.w1.weight_packed", torch.t), "tensors"),
    _of("group scales transposed", e.value(f"{X}.w1.weight_scale", torch.t), "companions"),
    _of("group scales in BF16", e.value(f"{X}.w1.weight_scale", lambda t: t.to(torch.bfloat16)), "companions"),
    _of("global scale in BF16", e.value(f"{X}.w2.weight_global_scale", lambda t: t.to(torch.bfloat16)), "companions"),
    _of(
        "input scales under a weight-only config",
        e.quantization(lambda q, g: g.update(input_activations=None)),
        "companions",
    ),
    _of("a tile scale of FP8 attention missing", e.drop(r"^layers\.1\.attn\.wq_b\.weight_scale$"), "companions"),
    _of("labelled NVFP4, stored FP8", e.tensors(_fp8_under_an_nvfp4_label), "bits"),
    # quantization_config.
    _of("quantization_config removed", e.config(lambda c: c.pop("quantization_config")), "targets"),
    _of(
        "targets in the wrong namespace",
        e.quantization(lambda q, g: g.update(targets=[r"re:.*mlp\.experts\..*"])),
        "targets",
    ),
    _of(
        "targets anchored to the source's names",
        e.quantization(lambda q, g: g.update(targets=[r"re:^layers\.\d+\.ffn\..*w[123]$"])),
        "targets",
    ),
    _of("targets of the last block gone", e.quantization(_stale_blocks), "targets"),
    _of(
        "ignore list stale",
        e.quantization(lambda q, g: q.update(ignore=["lm_head", r"re:.*block_sparse_moe\.gate$"])),
        "targets",
        "qwen3_moe",
    ),
    _of(
        "ignore names a half of a fused pair",
        e.quantization(lambda q, g: q["ignore"].append("model.layers.0.self_attn.k_proj")),
        "targets",
        "qwen3_moe",
    ),
    _of("group_size 32 in the config", e.quantization(lambda q, g: g["weights"].update(group_size=32)), "targets"),
    _of("num_bits 8 in the config", e.quantization(lambda q, g: g["weights"].update(num_bits=8)), "targets"),
    _of("another format in the config", e.quantization(lambda q, g: g.update(format="pack-quantized")), "targets"),
    _of("quant_method modelopt", e.quantization(lambda q, g: q.update(quant_method="modelopt")), "targets"),
    # One spelling in the tensors, another in config.json.
    _of("dialect mixed: one expert as modelopt spells it", e.tensors(_modelopt_names(rf"^{X}\.")), "dialect"),
    _of("dialect mixed: every weight as modelopt spells it", e.tensors(_modelopt_names("")), "dialect", "qwen3_moe"),
    _of("dialect mixed: NVIDIA's config of DeepSeek-V4", e.config(_nvidia_config), "dialect"),
    _of(
        "dialect mixed: modelopt's config",
        e.config(
            lambda c: c.update(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []})
        ),
        "dialect",
        "mistral",
    ),
    # config.json and tokenizer.
    _of("config without compress_ratios", e.config(lambda c: c.pop("compress_ratios")), "config"),
    _of("config not JSON", lambda d: (d / "config.json").unlink() or (d / "config.json").write_text("{"), "open"),
    _of("tokenizer with more tokens than rows", _other_tokenizer(1500), "tokenizer"),
    _source("tokenizer of another model, fewer tokens", _other_tokenizer(700), "tokenizer"),
    _source("tokenizer with other ids", e.json_file("tokenizer.json", _shuffled_tokenizer), "tokenizer"),
    _source(
        "another chat template",
        e.json_file("tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}")),
        "tokenizer",
        "qwen3_moe",
    ),
    _source(
        "another end token", e.json_file("generation_config.json", lambda c: c.update(eos_token_id=7)), "tokenizer"
    ),
    _source("routed_scaling_factor changed", e.config(lambda c: c.update(routed_scaling_factor=2.5)), "config"),
    _source("rope_theta changed", e.config(lambda c: c.update(rope_theta=1e6)), "config", "qwen3_moe"),
    _source("swiglu_limit lost", e.config(lambda c: c.pop("swiglu_limit")), "config"),
    _source(
        "FP8 attention served without quantized inputs",
        e.config(lambda c: c["quantization_config"]["config_groups"]["kept_fp8"].update(input_activations=None)),
        "config",
    ),
    *(
        _source(f"tokenizer.json: {name}", e.json_file("tokenizer.json", edit), "tokenizer")
        for name, edit in _TOKENIZER.items()
    ),
    *(
        _source(f"tokenizer_config.json: {name}", e.json_file("tokenizer_config.json", edit), "tokenizer", "qwen3_moe")
        for name, edit in _TOKENIZER_CONFIG.items()
    ),
    *(
        _source(f"generation_config.json: {name}", e.json_file("generation_config.json", edit), "tokenizer")
        for name, edit in _GENERATION.items()
    ),
    *(
        _source(f"{name} added", e.new_file(name, content), check, "qwen3_moe")
        for name, content, check in (
            ("special_tokens_map.json", '{"eos_token": "<think>"}', "tokenizer"),
            ("chat_template.jinja", "{{ messages }}", "tokenizer"),
            ("additional_chat_templates/tool_use.jinja", "{{ messages }}", "tokenizer"),
            ("added_tokens.json", '{"<think>": 7}', "tokenizer"),
            ("vocab.json", '{"a": 7}', "tokenizer"),
            ("merges.txt", "a b", "tokenizer"),
            ("tokenizer.model", "x", "tokenizer"),
            ("adapter_config.json", "{}", "tokenizer"),
            ("preprocessor_config.json", "{}", "tokenizer"),
            ("modeling_llama.py", "import os", "files"),
            ("pytorch_model.bin", "x", "files"),
            ("extra/state.pkl", "x", "files"),
        )
    ),
    *(
        _of(f"{name} of another quantization", e.new_file(name, content), "files", base)
        for name, content, base in (
            ("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}', "deepseek_v4"),
            ("quantize_config.json", '{"bits": 4, "group_size": 128}', "qwen3_moe"),
            ("quant_config.json", "{", "mistral"),
        )
    ),
    # Fields that a source does not have, or that stand there twice.
    _of(
        "rope_parameters beside another rope_theta",
        e.config(lambda c: c.update(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})),
        "config",
        "qwen3_moe",
    ),
    _of("dtype float16 beside torch_dtype bfloat16", e.config(lambda c: c.update(dtype="float16")), "config"),
    _source("torch_dtype float16 over BF16 tensors", e.config(lambda c: c.update(torch_dtype="float16")), "config"),
    _source("auto_map added", e.config(lambda c: c.update(auto_map={"AutoModelForCausalLM": "m.M"})), "config"),
    _source("a field of another model added", e.config(lambda c: c.update(attn_logit_softcapping=50.0)), "config"),
    _source("sliding_window added", e.config(lambda c: c.update(sliding_window=16)), "config", "mistral"),
    _source(
        "a field left to another default", e.config(lambda c: c.pop("max_position_embeddings")), "config", "mistral"
    ),
    _of("KV cache in FP8 without scales", e.quantization(lambda q, g: q.update(kv_cache_scheme=_KV_CACHE)), "config"),
    _source(
        "KV cache in FP8 with scales that the source has not",
        lambda d: (
            e.tensors(
                lambda t: t.update(
                    {f"model.layers.{n}.self_attn.{kind}_scale": torch.ones(1) for n in range(3) for kind in "kv"}
                )
            )(d),
            e.quantization(lambda q, g: q.update(kv_cache_scheme=_KV_CACHE))(d),
        ),
        "config",
        "qwen3_moe",
    ),
    _of("Hadamard on inputs alone", e.quantization(lambda q, g: q.update(transform_config=_HADAMARD)), "config"),
    _of(
        "2:4 sparsity over dense weights",
        e.quantization(lambda q, g: q.update(sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]})),
        "config",
    ),
    _source("another field in quantization_config", e.quantization(lambda q, g: q.update(scale_fmt="ue8m0")), "config"),
    _of("asymmetric NVFP4 in the config", e.quantization(lambda q, g: g["weights"].update(symmetric=False)), "targets"),
    _of(
        "input scales dynamic in the config",
        e.quantization(lambda q, g: g["input_activations"].update(dynamic=True)),
        "targets",
    ),
    # Files.
    _of("truncated shard", e.shard(1, lambda data: data[:-7]), "open"),
    _of("shard of no bytes", e.shard(1, lambda data: b""), "open"),
    _of("shard missing", lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), "open"),
    _of("bit flip in a header", e.shard(0, e.flip_in_header), "open"),
    _of(
        "overlapping offsets",
        e.header(
            lambda h: h["embed.weight"]["data_offsets"].__setitem__(
                slice(None), [8, h["embed.weight"]["data_offsets"][1] - h["embed.weight"]["data_offsets"][0] + 8]
            )
        ),
        "open",
    ),
    _of("shape that does not fit its offsets", e.header(lambda h: h["embed.weight"].update(shape=[1024, 65])), "open"),
    _of(
        "index points out of the directory",
        e.index(lambda i: i["weight_map"].update({"embed.weight": "../model.safetensors"})),
        "open",
    ),
    _of(
        "index places a tensor in another shard",
        e.index(lambda i: i["weight_map"].update({"embed.weight": i["weight_map"]["layers.2.attn.wkv.weight"]})),
        "open",
    ),
    _of(
        "index total_size wrong",
        e.index(lambda i: i["metadata"].update(total_size=i["metadata"]["total_size"] + 1)),
        "total_size",
    ),
    _of("a tensor in two shards", e.twice, "open"),
    _of("shard left half written", lambda d: (d / "model-x.safetensors.partial").write_bytes(b"x"), "files"),
    _of(
        "shard that the index does not know",
        lambda d: e.save_file({"x": torch.ones(1)}, d / "stray.safetensors"),
        "files",
    ),
    _of("shard linked from outside", e.outside, "files"),
    # Values.
    _of("one Inf among all input scales", e.value(f"{X}.w2.input_global_scale", e.first(float("inf"))), "finite"),
    _of("NaN in a norm", e.value("layers.1.ffn_norm.weight", e.first(float("nan"))), "finite"),
    _of("NaN group scale (code 0x7f)", e.value(f"{X}.w2.weight_scale", e.first(float("nan"))), "finite"),
    _of("NaN code in a kept FP8 weight", e.value("layers.0.attn.wkv.weight", e.first(float("nan"))), "finite"),
    _of(
        "NaN E8M0 scale in MTP",
        e.value("mtp.0.ffn.experts.1.w1.scale", lambda t: t.view(torch.uint8).fill_(255).view(t.dtype)),
        "finite",
    ),
    _of("group scale flushed to zero", e.value(f"{X}.w2.weight_scale", e.first(0.0)), "scales"),
    _of("group scale with a sign", e.value(f"{X}.w2.weight_scale", e.bits(0x80)), "scales"),
    _of("negative global scale", e.value(f"{X}.w2.weight_global_scale", torch.neg), "scales"),
    _of("global scale of zero", e.value(f"{X}.w2.weight_global_scale", torch.zeros_like), "scales"),
    _of("global scale inverted", e.value(f"{X}.w2.weight_global_scale", torch.reciprocal), "scales"),
    _of("gate and up global scales differ", e.value(f"{X}.w3.weight_global_scale", lambda t: t * 2), "fused"),
    _of(
        "q and k global scales differ",
        e.value("model.layers.0.self_attn.k_proj.weight_global_scale", lambda t: t * 2),
        "fused",
        "mistral",
    ),
    _of("gate and up input scales differ", e.value(f"{X}.w3.input_global_scale", lambda t: t * 2), "input_scales"),
    _source(
        "an expert's own input scale where one is shared",
        e.value(f"{X}.w2.input_global_scale", lambda t: t * 2),
        "input_scales",
    ),
    _source("one expert zeroed", e.values(rf"^{X}\..*weight_packed", torch.zeros_like), "zeros"),
    _of("router zeroed", e.value("layers.1.ffn.gate.weight", torch.zeros_like), "zeros"),
    _of(
        "hash table names an expert that is not there",
        e.value("layers.0.ffn.gate.tid2eid", lambda t: t.clone().index_fill_(0, torch.tensor([5]), 64)),
        "tables",
    ),
    # Copies.
    _source(
        "BF16 router rounded to FP8",
        e.value("layers.0.ffn.gate.weight", lambda t: t.to(torch.float8_e4m3fn).to(torch.bfloat16)),
        "copies",
    ),
    _source("bit flip in a copied tensor", e.value("layers.2.attn.kv_norm.weight", e.bits(1)), "copies"),
    _source("norms of two blocks exchanged", e.exchange("layers.0.attn_norm", "layers.1.attn_norm"), "copies"),
    _source("router rows in another order", e.value("layers.1.ffn.gate.weight", lambda t: t.roll(1, 0)), "copies"),
    _source("MTP weights perturbed", e.value("mtp.0.e_proj.weight", e.bits(1, 77)), "copies"),
    _source("two blocks exchanged", e.exchange("model.layers.0.", "model.layers.1."), "copies", "qwen3_moe"),
    _source("tile scale of kept FP8 changed", e.value("layers.1.attn.wq_b.weight_scale", lambda t: t * 2), "copies"),
    Fault(
        "bit flip in packed weights",
        e.value(f"{X}.w1.weight_packed", e.bits(1, 100)),
        "structure in a run",
        "structure.digests",
    ),
    Fault(
        "bit flip in a group scale",
        e.value(f"{X}.w1.weight_scale", e.bits(1, 100)),
        "structure in a run",
        "structure.digests",
    ),
    # Draft heads of DSpark, and what DeepSeek-V4.1 has.
    _of("draft head of the old layout", e.tensors(_old_draft_head), "tensors", DSPARK),
    _of("markov head missing", e.drop(r"\.markov_head\."), "tensors", DSPARK),
    _of("a block of the draft head missing", e.drop(r"^mtp\.1\."), "tensors", DSPARK),
    _of("main projection without its scale", e.drop(r"^mtp\.0\.main_proj\.scale$"), "companions", DSPARK),
    _of(
        "confidence head of another rank",
        e.value("mtp.2.confidence_head.proj.weight", lambda t: t[:, :-1]),
        "tensors",
        DSPARK,
    ),
    _of(
        "config of a DSpark head over two target layers",
        e.config(lambda c: c["dspark_target_layer_ids"].pop()),
        "tensors",
        DSPARK,
    ),
    _of("config of a DSpark head without its rank", e.config(lambda c: c.pop("dspark_markov_rank")), "config", DSPARK),
    _of(
        "config of an MTP block over a DSpark head",
        e.config(lambda c: [c.pop(key) for key in list(c) if key.startswith("dspark_")]),
        "tensors",
        DSPARK,
    ),
    _source(
        "one MXFP4 scale of the draft head off by one",
        e.value("mtp.1.ffn.experts.7.w2.scale", e.bits(1, 5)),
        "copies",
        DSPARK,
    ),
    _source(
        "factors of the markov head exchanged",
        e.exchange("mtp.2.markov_head.markov_w1.", "mtp.2.markov_head.markov_w2."),
        "copies",
        DSPARK,
    ),
    _source("two blocks of the draft head exchanged", e.exchange("mtp.0.attn.", "mtp.1.attn."), "copies", DSPARK),
    _of("Engram table in BF16", e.tensors(_in_bf16), "tensors", V41),
    _of("Engram table without its scales", e.drop(r"\.engram\.embed\.scale$"), "companions", V41),
    _of("Engram table of another length", e.tensors(_one_row_less), "tensors", V41),
    _source(
        "Engram rows moved by one",
        e.value(f"{ENGRAM}.weight", lambda t: t.view(torch.uint8).roll(1, 0).view(t.dtype)),
        "copies",
        V41,
    ),
    _source("one Engram scale off by one", e.value(f"{ENGRAM}.scale", e.bits(1, 77)), "copies", V41),
    _of("routing bias of image tokens missing", e.drop(r"^layers\.2\..*bias_vl$"), "tensors", V41),
    _of("vision tower missing", e.drop(r"^vision\."), "tensors", V41),
    _of("aligner without its bias", e.drop(r"^aligner\.w2\.bias$"), "tensors", V41),
    _of("gate of a compressor missing", e.drop(r"\.compressor\.wgate\."), "tensors", V41),
    _of(
        "markov head under the names of DeepSeek-V4",
        e.rename(r"markov_head\.embed", "markov_head.markov_w1"),
        "tensors",
        V41,
    ),
    _of(
        "config of fewer sources of keys and values",
        e.config(lambda c: c["text_config"]["kv_source_layer_ids"].pop()),
        "tensors",
        V41,
    ),
    # Weights against the source.
    _far("nibbles in the wrong order", e.value(f"{X}.w1.weight_packed", _swap_nibbles)),
    _far("nibbles in the wrong order in a quarter of the rows", e.value(f"{X}.w1.weight_packed", _swap_a_row)),
    _far("sign plane flipped", e.value(f"{X}.w2.weight_packed", lambda t: t ^ 0x88)),
    _far("two experts exchanged", e.exchange(f"{X}.", f"{Y}.")),
    _far("gate and up exchanged", e.exchange(f"{X}.w1.", f"{X}.w3.")),
    _far(
        "down projection of another block",
        e.tensors(
            lambda t: t.update(
                {n: t[n.replace("layers.0.", "layers.1.")].clone() for n in t if n.startswith(f"{X}.w2.")}
            )
        ),
    ),
    _far("global scale doubled in gate and up", e.values(rf"^{X}\.w[13]\.weight_global_scale$", lambda t: t * 2)),
    _far(
        "group scales of another expert",
        e.tensors(lambda t: t.update({f"{X}.w1.weight_scale": t[f"{Y}.w1.weight_scale"].clone()})),
    ),
    _far(
        "group scales moved by one",
        e.value(f"{X}.w1.weight_scale", lambda t: t.view(torch.uint8).roll(1, 1).view(t.dtype)),
    ),
    _far("rows moved by one", e.value(f"{X}.w1.weight_packed", lambda t: t.roll(1, 0))),
    _far(
        "one expert's weights zeroed by its scales",
        e.value(f"{X}.w2.weight_scale", lambda t: torch.full_like(t.float(), 2.0**-9).to(t.dtype)),
    ),
    _far(
        "q and v exchanged heads",
        e.value("model.layers.0.self_attn.q_proj.weight_packed", lambda t: t.roll(32, 0)),
        "mistral",
    ),
    _far(
        "one group scale doubled", e.value(f"{X}.w1.weight_scale", _double_the_smallest), check="fidelity.group_scales"
    ),
    _far(
        "one scale of a kept MXFP4 group doubled",
        e.value(f"{X}.w2.weight_scale", _one_mxfp4_scale_doubled),
        DSPARK,
        "fidelity.rounding",
    ),
    _far(
        "one code of a kept MXFP4 weight off by one",
        e.value(f"{X}.w1.weight_packed", e.bits(1, 100)),
        DSPARK,
        "fidelity.rounding",
    ),
    _far("one code off by one", e.value(f"{X}.w1.weight_packed", e.bits(1, 100)), check="fidelity.rounding"),
    _far("a tenth of the groups emptied", e.value(f"{X}.w2.weight_packed", _emptied), check="fidelity.zero_groups"),
    _far(
        "global scale of gate and up a thousandth, scales saturate",
        e.values(rf"^{X}\.w[13]\.weight_global_scale$", lambda t: t / 1000),
        check="fidelity.global_scales",
    ),
    _far(
        "a kept norm in another order",
        e.value("layers.0.attn.kv_norm.weight", lambda t: t.roll(1)),
        check="fidelity.kept",
    ),
    # What the engine alone betrays: scales of activations, which no weight of the source can contradict.
    Fault(
        "input scales a thousandfold: activations saturate",
        e.values(r"input_global_scale$", lambda t: t * 1000),
        "serving",
        "serving.source",
        "qwen3_moe",
    ),
    Fault(
        "input scales of one layer 64 times too large: most of what it is given saturates",
        e.values(r"layers\.0\.self_attn\.[qkv]_proj\.input_global_scale$", lambda t: t * 64),
        "serving",
        "serving.saturated_inputs",
        "qwen3_moe",
    ),
    Fault(
        "input scales 30,000 times too small: activations flush to zero",
        e.values(r"input_global_scale$", lambda t: t / 30_000),
        "serving",
        "serving.source",
        "mistral",
    ),
]
