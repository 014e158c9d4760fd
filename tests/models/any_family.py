"""Tiny hub-form BF16 checkpoints of any family that transformers can build, made from the family's own config class.

transformers' own saving writes the hub's names. Fields of config.json that the hub has and transformers' save drops, which
vLLM reads, are put back (`_HUB`). Values are random, and depend on the tensor's name alone.

    python -m tests.models.any_family OUT --family glm4_moe
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from calibration.checkpoint.index import INDEX_NAME
from tests.models.storage import new_directory, normal, to_fp8, to_mxfp4, to_tiles
from tests.models.stored_forms import store
from tests.models.tokenizer import write_json, write_sidecars, write_tokenizer
from tests.models.wrappers import SPECIAL, SPELLED, TURNED, WRAPPERS, write_processor

VOCAB = 1024
#: What most families take; each config class keeps what it knows.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
_MOE: dict[str, Any] = {
    "num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
    "v_head_dim": 64, "head_dim": 64,
}  # fmt: skip
_INDEXER: dict[str, Any] = {
    "index_topk": 512, "index_head_dim": 128, "index_n_heads": 4, "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["deepseek_sparse_attention", "deepseek_sparse_attention"],
}  # fmt: skip
#: Families that the matrix tries, with what their config class wants beside the shapes.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "phi3": {},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    "glm4": {},
    "granite": {},
    "smollm3": {},
    "ministral3": {},
    "seed_oss": {},
    "starcoder2": {"sliding_window": None},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "glm4_moe": _MOE,
    "olmoe": {**_MOE, "intermediate_size": 128},
    "dots1": {**_MOE, "layer_types": ["full_attention", "full_attention"]},
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "moe_layer_end_index": 1, "moe_layer_interval": 1,
    },
    "hunyuan_v1_moe": {**_MOE, "moe_topk": 2, "num_shared_expert": 1},
    # Full attention has no positions beside sliding attention; alone, transformers and vLLM do not agree on it.
    "exaone_moe": {
        **_MOE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "minimax_m2": {**_MOE, "rotary_dim": 32},
    "deepseek_v3": {**_MOE, **_MLA},
    "kimi_k2": {**_MOE, **_MLA},
    "flex_olmo": {**_MOE, "intermediate_size": 128},
    "solar_open": _MOE,
    "afmoe": {
        **_MOE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "num_dense_layers": 1,
        "num_shared_experts": 1, "mup_enabled": True,
    },
    # All releases tie the head, and vLLM's classes do whatever config.json says.
    "lfm2": {
        "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True,
    },
    "granitemoe": {**_MOE, "intermediate_size": 128},
    "granitemoeshared": {**_MOE, "intermediate_size": 128, "shared_intermediate_size": 128},
    "llama4_text": {
        **_MOE, "intermediate_size": 128, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
    },
    "gpt_oss": {**_MOE, "intermediate_size": 128, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    "gemma4_text": {
        **_MOE, "enable_moe_block": True, "top_k_experts": 2, "sliding_window": 64, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
    },
    "deepseek_v32": {**_MOE, **_MLA, **_INDEXER},
    # With another epsilon vLLM normalizes the latents otherwise than transformers, which always takes 1e-6.
    "glm4_moe_lite": {**_MOE, **_MLA, "mlp_layer_types": ["dense", "sparse"], "rms_norm_eps": 1e-6},
    "glm_moe_dsa": {
        **_MOE, **_MLA, **_INDEXER, "layer_types": ["deepseek_sparse_attention"] * 3, "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"], "indexer_types": ["full", "full", "shared"],
    },
    "lfm2_moe": {
        **_MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "tie_word_embeddings": True,
    },
    "nemotron_h": {
        **_MOE, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4,
        "moe_shared_expert_intermediate_size": 128, "mamba_num_heads": 8, "ssm_state_size": 16, "n_groups": 1,
        "expand": 2, "chunk_size": 32,
    },
    "mimo_v2_flash": {
        **_MOE, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64, "head_dim": 192,
        "v_head_dim": 192, "mlp_layer_types": ["dense", "sparse"], "n_shared_experts": None,
    },
    "jamba": {
        **_MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 16, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "falcon_h1": {
        "mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_chunk_size": 32,
    },
    "qwen3_next": {
        **_MOE, "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 128,
        "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "hy_v4": {
        **_MOE, **_MLA, **_INDEXER, "layer_types": ["deepseek_sparse_attention"] * 3, "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"], "indexer_types": ["full", "full", "shared"],
    },
    "kimi_linear": {
        **_MOE, **_MLA, "q_lora_rank": None, "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"], "linear_num_heads": 4, "linear_head_dim": 64,
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 4, "linear_num_value_heads": 4,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    # Tokens that are routed to the last four experts are returned as they are.
    "longcat_flash": {
        **_MLA, "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 256, "expert_ffn_hidden_size": 128, "moe_topk": 3,
        "n_routed_experts": 8, "zero_expert_num": 4, "rms_norm_eps": 1e-6,
    },
    **WRAPPERS,
}  # fmt: skip
#: The weights that releases in a form have in it: DeepSeek, Kimi-K2 and GLM all but routers, Kimi-K2-Thinking and K2.5 the
#: routed experts alone.
_STORED = {
    **dict.fromkeys(
        ("fp8_tiles", "fp8_tensor", "fp8_channel"),
        r"layers\.\d+\.(?!.*(?:vis|_gate\.)).*(?:_proj|_proj_with_mqa|\.w[123])\.weight$",
    ),
    "int4": r"\.experts\.\d+\.\w+\.weight$",
}
#: Fields of the hub's config.json that transformers' classes rename or drop.
_HUB: dict[str, dict[str, Any]] = {
    "glm4_moe": {"head_dim": 64, "partial_rotary_factor": 0.5},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "kimi_k25": {"architectures": ["KimiK25ForConditionalGeneration"]},  # as vLLM's registry has it
    "kimi_k2": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v32": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    # As XiaomiMiMo/MiMo-V2-Flash; transformers has bases, rotated share and kinds of blocks as defaults of its class.
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "layernorm_epsilon": 1e-5,
        "rope_theta": 5000000,
        "swa_rope_theta": 10000,
        "partial_rotary_factor": 0.334,
        "swa_num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_head_dim": 192,
        "swa_v_head_dim": 192,
        "sliding_window_size": 64,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "afmoe": {"score_func": "sigmoid", "route_scale": 1.0, "route_norm": True, "n_group": 1, "topk_group": 1},
    "longcat_flash": {"zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "lfm2": {"block_dim": 256, "conv_dim": 256, "conv_use_xavier_init": True},
}

#: Fields that transformers' save writes and the hub's config.json has not.
_NOT_IN_HUB = {
    "mimo_v2_flash": ("rope_parameters", "layer_types", "mlp_layer_types"), "longcat_flash": ("num_hidden_layers",),
}  # fmt: skip
#: Tensors that transformers' save writes and the hub has not: rows that it makes for experts without weights.
_NO_TENSORS = {"longcat_flash": r"\.experts\.(?:[89]|1[01])\."}


#: What makes of `gemma4_text` the form of E2B and E4B: inputs of each block from an embedding of its own and from a projection
#: before the blocks.
PER_LAYER_INPUTS = {"enable_moe_block": False, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": VOCAB}


def definition(family: str) -> list[Any]:
    """What makes the checkpoint of a family, as JSON."""
    left_out = (*_NOT_IN_HUB.get(family, ()), *([_NO_TENSORS[family]] if family in _NO_TENSORS else ()))
    return [_SHAPE, FAMILIES[family], _HUB.get(family), SPELLED.get(family), *left_out]


def write(
    directory: Path, family: str, *, seed: int = 0, mxfp4: bool = False, form: str | None = None, shards: int = 1
) -> Path:
    """Writes the checkpoint, with a chat template, into the new or empty `directory` and returns it; with `mxfp4` stacked
    experts as gpt-oss is released; in the stored `form` (`stored_forms.FORMS`) of as many `shards`, in which neighbors lie
    in different ones. Further forms: `mxfp4`, as above; `single_file`, BF16 without an index; `stacked`, experts in the tensors
    that transformers' model has for them; `fp8_stacks`, those in tiles; `fp8_modelopt_stacks`, those under one scale each.
    Raises FileExistsError if the directory holds something."""
    new_directory(directory)
    single, mxfp4 = form == "single_file", mxfp4 or form == "mxfp4"
    model = _model({"kimi_k2": "deepseek_v3"}.get(family, family), seed)
    model.save_pretrained(directory, max_shard_size="1GB" if single else "300KB")
    made = json.loads((directory / "config.json").read_text())
    made = {key: value for key, value in made.items() if key not in _NOT_IN_HUB.get(family, ())}
    write_json(directory / "config.json", made | {"model_type": family} | _HUB.get(family, {}))
    if family in _NO_TENSORS:
        _leave_out(directory, re.compile(_NO_TENSORS[family]))
    write_tokenizer(directory, VOCAB - (SPECIAL if family in WRAPPERS else 0), chat_template=True)
    if family in WRAPPERS:
        write_processor(directory, family)
        _respell(directory, SPELLED.get(family, ()))
    if family in TURNED:
        _turn(directory)
    write_sidecars(directory)
    if mxfp4:
        _stack_in_mxfp4(directory)
    if form == "stacked":
        _stack(directory)
    if form == "fp8_stacks":
        _stack_in_tiles(directory)
    if form == "fp8_modelopt_stacks":
        _stack_in_fp8(directory)
    if form in _STORED:
        store(directory, form, re.compile(_STORED[form]), shards)
    return directory


def _respell(directory: Path, patterns: Iterable[tuple[str, str]]) -> None:
    """Renames tensors of the checkpoint as the patterns say."""
    index = json.loads((directory / INDEX_NAME).read_text())
    for pattern, replacement in patterns:
        index["weight_map"] = {re.sub(pattern, replacement, name): shard for name, shard in index["weight_map"].items()}
        for shard in set(index["weight_map"].values()):
            tensors = load_file(directory / shard)
            renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
            save_file(renamed, directory / shard, {"format": "pt"})
    write_json(directory / INDEX_NAME, index)


def _turn(directory: Path) -> None:
    """Stores each stack of experts transposed."""
    for shard in directory.glob("*.safetensors"):
        turned = {
            name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
            for name, tensor in load_file(shard).items()
        }
        save_file(turned, shard, {"format": "pt"})


def _leave_out(directory: Path, pattern: re.Pattern[str]) -> None:
    """Drops the tensors whose names the pattern finds."""
    index = json.loads((directory / INDEX_NAME).read_text())
    for shard in set(index["weight_map"].values()):
        tensors = {name: t for name, t in load_file(directory / shard).items() if not pattern.search(name)}
        (directory / shard).unlink()
        if tensors:
            save_file(tensors, directory / shard, {"format": "pt"})
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if not pattern.search(name)}
    sizes = (t.nbytes for shard in set(index["weight_map"].values()) for t in load_file(directory / shard).values())
    write_json(directory / INDEX_NAME, index | {"metadata": {"total_size": sum(sizes)}})


def _replace(directory: Path, made: dict[str, torch.Tensor], gone: Iterable[str]) -> None:
    """Writes the checkpoint's tensors anew, in one shard, with those of `made` in place of those that are `gone`."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in set(gone)} | made
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / INDEX_NAME).unlink()


def _stack(directory: Path) -> None:
    """Stores all experts of a block as `experts.gate_up_proj` `[E, 2 I, D]` and `experts.down_proj` `[E, D, I]`, as the BF16
    releases of Qwen3.5 have them."""
    single: dict[str, dict[str, list[torch.Tensor]]] = {}
    names = []
    for name, tensor in sorted(
        ((name, tensor) for shard in directory.glob("*.safetensors") for name, tensor in load_file(shard).items()),
        key=lambda found: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", found[0])],
    ):
        if found := re.fullmatch(r"(.*\.experts)\.\d+\.(gate|up|down)_proj\.weight", name):
            single.setdefault(found[1], {}).setdefault(found[2], []).append(tensor)
            names.append(name)
    made = {}
    for module, parts in single.items():
        gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        made |= {f"{module}.gate_up_proj": torch.stack(gate_up), f"{module}.down_proj": torch.stack(parts["down"])}
    _replace(directory, made, names)


def _stack_in_tiles(directory: Path) -> None:
    """Stores stacks of experts `moe.<projection>.weight` `[E, M, K]` as E4M3 in tiles of 128 with `weight_scale_inv` `[E,
    ceil(M/128), ceil(K/128)]`, and nothing else, as stepfun-ai/Step-3.7-Flash-FP8 has them."""
    made: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if re.search(r"\.moe\.\w+_proj\.weight$", name):
                codes, scales = zip(*(to_tiles(expert, torch.float32) for expert in tensor), strict=True)
                made |= {name: torch.stack(codes), f"{name}_scale_inv": torch.stack(scales)}
    _replace(directory, made, ())
    config = json.loads((directory / "config.json").read_text())
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    write_json(directory / "config.json", config | {"quantization_config": declared})


def _stack_in_fp8(directory: Path) -> None:
    """Stores stacks of experts as E4M3 under one scale each, and nothing else, as nvidia/Llama-4-Scout-17B-16E-Instruct-FP8
    has them: `experts.gate_up_proj_weight_scale` and `_input_scale` F32 without a dimension."""
    made: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                codes, scale = to_fp8(tensor.flatten(0, 1), "scalar")
                made |= {name: codes.view(tensor.shape), f"{name}_weight_scale": scale}
                made[f"{name}_input_scale"] = torch.tensor(0.5)
    _replace(directory, made, ())
    config = json.loads((directory / "config.json").read_text())
    declared = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    write_json(directory / "config.json", config | {"quantization_config": declared})


def _stack_in_mxfp4(directory: Path) -> None:
    """Stores the experts `[E, K, M]` as `<name>_blocks` uint8 `[E, M, K/32, 16]` and `<name>_scales` uint8 `[E, M, K/32]`
    (E8M0), as the headers of openai/gpt-oss-20b have them."""
    index = json.loads((directory / INDEX_NAME).read_text())
    for shard in sorted(set(index["weight_map"].values())):
        tensors = {}
        for name, tensor in load_file(directory / shard).items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[name] = tensor
                continue
            experts, width, rows = tensor.shape
            codes, scales = zip(*(to_mxfp4(expert.t()) for expert in tensor), strict=True)
            tensors[f"{name}_blocks"] = torch.stack(codes).view(torch.uint8).reshape(experts, rows, width // 32, 16)
            tensors[f"{name}_scales"] = torch.stack([scale.view(torch.uint8) for scale in scales])
            del index["weight_map"][name]
        index["weight_map"] |= dict.fromkeys(tensors, shard)
        save_file(tensors, directory / shard, {"format": "pt"})
    sizes = (
        tensor.nbytes for shard in set(index["weight_map"].values()) for tensor in load_file(directory / shard).values()
    )
    write_json(directory / INDEX_NAME, index | {"metadata": {"total_size": sum(sizes)}})
    declared = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    }  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | {"quantization_config": declared})


def _config(model_type: str, fields: dict[str, Any]) -> Any:
    kind = CONFIG_MAPPING[model_type]
    if "text_config" in fields:
        text = dict(fields["text_config"])
        inner = _config(text.pop("model_type"), text)
        ends = {key: _SHAPE[key] for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings")}
        return kind(**{**ends, **fields, "text_config": inner.to_dict()})
    known = kind().to_dict().keys() | (kind.attribute_map or {}).keys() | fields.keys() - _MOE.keys()
    return kind(**{key: value for key, value in {**_SHAPE, **fields}.items() if key in known})


def empty_model(family: str) -> Any:
    """transformers' model of a family, on meta."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = _config(family, FAMILIES[family])
    build = AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM
    with torch.device("meta"):
        return build.from_config(config, dtype=torch.bfloat16)


def _model(family: str, seed: int) -> Any:
    model = empty_model(family)
    model.to_empty(device="cpu")
    model.tie_weights()  # to_empty gives each module a tensor of its own
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        norm = "norm" in name
        fan = tensor.shape[-1] if tensor.dim() > 1 else 1
        std = 0.1 if norm or tensor.dim() == 1 else (1.0 if "embed" in name else fan**-0.5)
        zero_centered = type(model).__name__.startswith(("Gemma3", "Qwen3Next"))
        tensor.copy_(normal(seed, name, tensor.shape, 1.0 if norm and not zero_centered else 0.0, std))
    return model


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(write(options.directory, options.family, seed=options.seed))


if __name__ == "__main__":
    main()
