"""Vision models of which `any_family` makes checkpoints: the configs of their language models and towers, and the processor
files without which vLLM does not start.

Sources: transformers/models/*/processing_*.py (5.17); the hub's checkpoints for the tokens' names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.models.tokenizer import write_json

#: Tokens of the vocabulary that are left for a processor's own.
SPECIAL = 24
_IMAGE = {"image_size": 56, "patch_size": 14}
_VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32, **_IMAGE,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "image_token_id": 1002,
    "video_token_id": 1003,
    "vision_start_token_id": 1000,
    "vision_end_token_id": 1001,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256, "patch_size": 16,
}  # fmt: skip
_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [8, 12, 12]}
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "rope_parameters": {
        **_MROPE, "mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
#: Family -> fields of its config.json beside the language model's; `text_config` contains what that one wants beside the
#: shapes, and its model type.
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text", "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "mm_tokens_per_image": 4, "boi_token_index": 1000, "eoi_token_index": 1001, "image_token_index": 1002,
    },
    "gemma4": {
        "text_config": {
            "model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "sliding_window": 64,
            "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
        },
        "vision_config": {
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 32, "patch_size": 14, "position_embedding_size": 64,
            "default_output_length": 70,
        },
        "audio_config": None, "boi_token_id": 1000, "eoi_token_id": 1001, "image_token_id": 1002, "video_token_id": 1003,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", **_VISION, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        "image_token_index": 1002, "spatial_merge_size": 2, "vision_feature_layer": -1,
    },
    "qwen3_vl_moe": {
        **_QWEN,
        "text_config": {
            "model_type": "qwen3_vl_moe_text", "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "moe_intermediate_size": 64, "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]},
        },
        "vision_config": {
            "hidden_size": 64, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 256, "patch_size": 14,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
    },
    "llama4": {
        "text_config": {
            "model_type": "llama4_text", "intermediate_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 8,
            "interleave_moe_layer_step": 2, "num_experts_per_tok": 1, "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "vision_config": {**_VISION, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
        "boi_token_index": 1000, "eoi_token_index": 1001, "image_token_index": 1002,
    },
    "qwen2_5_vl": {
        **_QWEN, "text_config": {"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        **_QWEN, "text_config": {"model_type": "qwen3_vl_text", "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_5": {
        **_QWEN, "text_config": {"model_type": "qwen3_5_text", **_DELTA},
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
    },
    "qwen3_5_moe": {
        **_QWEN,
        "text_config": {
            "model_type": "qwen3_5_moe_text", **_DELTA, "num_experts": 8, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 128,
        },
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
    },
    "kimi_k25": {
        "text_config": {
            "model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4, "q_lora_rank": 64,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "num_nextn_predict_layers": 0,
        },
        "vision_config": {**_VISION, "pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 64, "image_token_id": 1002, "video_token_id": 1003, "vision_start_token_id": 1000,
        "vision_end_token_id": 1001,
    },
    "minimax_m3_vl": {
        "text_config": {
            "model_type": "minimax_m3_vl_text", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128,
            "dense_intermediate_size": 256, "shared_intermediate_size": 128, "rotary_dim": 32,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "vision_config": {**_VISION}, "projector_hidden_size": 64, "merged_hidden_size": 256, "image_token_index": 1002,
        "video_token_index": 1003,
    },
    "step3p7": {
        "text_config": {
            "model_type": "step3p5", "n_routed_experts": 8, "num_experts_per_tok": 2, "share_expert_dim": 128,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3, "pad_token_id": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"], "sliding_window": 64, "num_sliding_attention_heads": 8,
            "swiglu_limits": [0.0, 0.0, 0.5], "swiglu_limits_shared": [0.0, 0.0, 0.5],
        },
        "vision_config": {
            "hidden_size": 64, "mlp_ratio": 1.0, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
            "patch_size": 14, "max_position_embeddings": 16,
        },
        "image_token_id": 1002,
    },
}  # fmt: skip
#: How the hub spells what transformers writes otherwise than it reads.
SPELLED: dict[str, tuple[tuple[str, str], ...]] = {
    "gemma3": ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
    "minimax_m3_vl": (
        (r"\.layers\.0\.block_sparse_moe\.", ".layers.0.mlp."), (r"^(vision_tower\..*)\.block_sparse_moe\.", r"\1.mlp."),
    ),
    "kimi_k25": (
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."), (r"^model\.mm_projector\.", "mm_projector."),
    ),
}  # fmt: skip
#: Families whose stacks of experts the hub has as `[E, D, 2 I]`, which alone vLLM reads, and which transformers saves transposed.
TURNED = ("qwen3_vl_moe",)
_QWEN_TOKENS = {
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>", "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}  # fmt: skip
#: The special tokens of a family's processor, by the tokenizer's name for each; their ids follow the vocabulary's.
_TOKENS: dict[str, dict[str, str]] = {
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        **{f"lines_{count}_token": "\n" * count for count in (1, 2, 3, 4)},
    },
    "gemma4": {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "video_token": "<|video|>",
    },
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN_TOKENS),
    "llama4": {
        "boi_token": "<|image_start|>",
        "eoi_token": "<|image_end|>",
        "patch_token": "<|patch|>",
        "image_token": "<|image|>",
        "tile_x_separator_token": "<|tile_x_separator|>",
        "tile_y_separator_token": "<|tile_y_separator|>",
    },
    "kimi_k25": {
        "media_begin_token": "<|media_begin|>",
        "media_end_token": "<|media_end|>",
        "image_token": "<|media_pad|>",
        "video_token": "<|kimi_k25_video_placeholder|>",
    },
    "mistral3": {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]"},
}
_PIXELS: dict[str, Any] = {
    "do_rescale": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
_PATCHES = _PIXELS | {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2, "temporal_patch_size": 2,
    "size": {"shortest_edge": 1024, "longest_edge": 4096},
}  # fmt: skip
#: The preprocessor_config.json and the processor_config.json of a family.
_PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        _PIXELS | {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}},
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    ),
    "gemma4": (
        _PIXELS | {
            "image_processor_type": "Gemma4ImageProcessor", "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            "patch_size": 14, "max_soft_tokens": 70,
        },
        {"processor_class": "Gemma4Processor", "image_seq_length": 70},
    ),
    "mistral3": (
        _PIXELS | {
            "image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 14, "width": 14},
            "size": {"longest_edge": 56},
        },
        {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2, **_TOKENS["mistral3"]},
    ),
    "llama4": (
        _PIXELS | {"image_processor_type": "Llama4ImageProcessor", "size": {"height": 56, "width": 56}, "max_patches": 2},
        {"processor_class": "Llama4Processor", "patch_size": 14},
    ),
    "qwen2_5_vl": (_PATCHES | {"patch_size": 14}, {"processor_class": "Qwen2_5_VLProcessor"}),
    "qwen3_vl_moe": (_PATCHES | {"patch_size": 14}, {"processor_class": "Qwen3VLProcessor"}),
    **dict.fromkeys(("qwen3_vl", "qwen3_5", "qwen3_5_moe"), (_PATCHES, {"processor_class": "Qwen3VLProcessor"})),
    "kimi_k25": (
        {
            "media_proc_cfg": {  # as the release names them; vLLM reads no other
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 14, "merge_kernel_size": 2,
                "temporal_merge_kernel_size": 4, "in_patch_limit": 16, "in_patch_limit_each_frame": 16,
                "in_patch_limit_video": 64, "patch_limit_on_one_side": 4, "fixed_output_tokens": None,
            },
        },
        {"processor_class": "Kimi_K25Processor"},
    ),
}  # fmt: skip
#: The video processor that belongs to a processor.
_VIDEOS = {
    "Qwen2_5_VLProcessor": "Qwen2VLVideoProcessor", "Qwen3VLProcessor": "Qwen3VLVideoProcessor",
    "Gemma4Processor": "Gemma4VideoProcessor",
}  # fmt: skip


def write_processor(directory: Path, family: str) -> None:
    """Writes the processor files of a family beside the tokenizer in `directory`, and its special tokens into it."""
    if family not in _PROCESSORS:  # not served here
        return
    AutoTokenizer.from_pretrained(directory, extra_special_tokens=_TOKENS[family]).save_pretrained(directory)
    images, processor = _PROCESSORS[family]
    write_json(directory / "preprocessor_config.json", images | {"processor_class": processor["processor_class"]})
    write_json(directory / "processor_config.json", processor)
    if processor["processor_class"] in _VIDEOS:
        video = images | {"video_processor_type": _VIDEOS[processor["processor_class"]]}
        write_json(directory / "video_preprocessor_config.json", video)
