"""Tiny checkpoints whose blocks are Mamba2: one projection, which vLLM loads as five parts. Nemotron-H is one without
experts, which vLLM has for GPUs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import any_family

#: Of each model type: the fields of config.json, and the one that holds the size of a state.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "nemotron_h": (
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 8,
            "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2, "expand": 2, "chunk_size": 32,
        },
        "ssm_state_size",
    ),
    "granitemoehybrid": (
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128, "shared_intermediate_size": 128,
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 2,
            "mamba_d_state": 64, "mamba_expand": 2, "mamba_chunk_size": 32,
        },
        "mamba_d_state",
    ),
    "mamba2": (
        {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 2, "expand": 2, "chunk_size": 32}, "state_size",
    ),
}  # fmt: skip


def write(directory: Path, monkeypatch: pytest.MonkeyPatch, family: str, states: int = 64) -> Path:
    """Writes a model of FAMILIES, whose states have so many values (2 groups: B and C have twice as many rows), and returns its
    directory."""
    fields, size = FAMILIES[family]
    monkeypatch.setitem(any_family.FAMILIES, family, fields | {size: states})
    return any_family.write(directory, family)
