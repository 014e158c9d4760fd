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
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", **_VISION, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        "image_token_index": 1002, "spatial_merge_size": 2, "vision_feature_layer": -1,
    },
    "qwen3_vl_moe": {
        "text_config": {
            "model_type": "qwen3_vl_moe_text", "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "moe_intermediate_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]},
        },
        "vision_config": {
            "hidden_size": 64, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 256, "patch_size": 14,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
        "image_token_id": 1000, "video_token_id": 1001, "vision_start_token_id": 1002, "vision_end_token_id": 1003,
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
}  # fmt: skip
#: The special tokens of a family's processor, by the tokenizer's name for each; their ids follow the vocabulary's.
_TOKENS: dict[str, dict[str, str]] = {
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        **{f"lines_{count}_token": "\n" * count for count in (1, 2, 3, 4)},
    },
    "mistral3": {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]"},
}
_PIXELS = {"do_rescale": True, "do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
#: The preprocessor_config.json and the processor_config.json of a family.
_PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        _PIXELS | {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}},
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    ),
    "mistral3": (
        _PIXELS | {
            "image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 14, "width": 14},
            "size": {"longest_edge": 56},
        },
        {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2, **_TOKENS["mistral3"]},
    ),
}  # fmt: skip


def write_processor(directory: Path, family: str) -> None:
    """Writes the processor files of a family beside the tokenizer in `directory`, and its special tokens into it."""
    if family not in _PROCESSORS:  # not served here
        return
    AutoTokenizer.from_pretrained(directory, extra_special_tokens=_TOKENS[family]).save_pretrained(directory)
    images, processor = _PROCESSORS[family]
    write_json(directory / "preprocessor_config.json", images | {"processor_class": processor["processor_class"]})
    write_json(directory / "processor_config.json", processor)
