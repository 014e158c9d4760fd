"""Tiny checkpoints of models that no matrix has and whose hub stores weights merged that vLLM loads as several parts, on a CPU
too: gate and up of GLM-4.1V and of GLM-OCR, q, k and v of DBRX, the shared MLP of Granite-MoE with a sliding window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import any_family
from tests.models.wrappers import WRAPPERS

_ROTATED = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}
_GLM: dict[str, Any] = {
    "image_token_id": 1002, "video_token_id": 1003, "image_start_token_id": 1000, "image_end_token_id": 1001,
    "video_start_token_id": 1004, "video_end_token_id": 1005,
    "vision_config": {
        "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256, "patch_size": 14,
        "image_size": 56,
    },
}  # fmt: skip
#: Of each model type the fields of config.json.
FAMILIES: dict[str, dict[str, Any]] = {
    "glm4v": {**_GLM, "text_config": {"model_type": "glm4v_text", "rope_parameters": _ROTATED}},
    "glm_ocr": {**_GLM, "text_config": {"model_type": "glm_ocr_text", "rope_parameters": _ROTATED}},
    "dbrx": {
        "d_model": 256, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "granitemoe_swa": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128, "shared_intermediate_size": 128,
        "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
#: Of each: the leaf of the merged weight, its parts' heights by what a message calls them, and the field (below a section) with
#: which they are no whole tiles.
MERGED: dict[str, tuple[str, dict[str, int], tuple[str, str, int]]] = {
    "glm4v": ("gate_up_proj", {"M of gate": 256, "M of up": 256}, ("text_config", "intermediate_size", 192)),
    "glm_ocr": ("gate_up_proj", {"M of gate": 256, "M of up": 256}, ("text_config", "intermediate_size", 192)),
    "dbrx": ("Wqkv", {"M of q": 256, "M of k": 128, "M of v": 128}, ("attn_config", "kv_n_heads", 1)),
    "granitemoe_swa": ("input_linear", {"M of gate": 128, "M of up": 128}, ("", "shared_intermediate_size", 192)),
}


def write(directory: Path, monkeypatch: pytest.MonkeyPatch, family: str, torn: bool = False) -> Path:
    """Writes a model of FAMILIES, its merged weight `torn` within a tile if asked, and returns its directory."""
    fields, (section, field, value) = FAMILIES[family], MERGED[family][2]
    if torn:
        fields = fields | ({section: fields[section] | {field: value}} if section else {field: value})
    monkeypatch.setitem(any_family.FAMILIES, family, fields)
    if "text_config" in fields:
        monkeypatch.setitem(WRAPPERS, family, fields)
    return any_family.write(directory, family)
