"""Tiny Phi-3 checkpoints, whose q/k/v and gate/up the hub stores merged, with parts that are no whole FP8 tiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import any_family

#: Fields of config.json -> the leaves of a block that vLLM loads in FP8 tiles. All inputs are whole groups of 128, but those of
#: down_proj where gate is torn.
SHAPES: dict[str, tuple[dict[str, int], set[str]]] = {
    "whole": ({"head_dim": 64}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "k is torn": ({"hidden_size": 384, "head_dim": 96}, {"o_proj", "gate_up_proj", "down_proj"}),
    "gate is torn": ({"intermediate_size": 192}, {"qkv_proj", "o_proj"}),
}


def write(directory: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> Path:
    """Writes the Phi-3 of SHAPES and returns its directory."""
    monkeypatch.setitem(any_family.FAMILIES, "phi3", SHAPES[shape][0])
    return any_family.write(directory, "phi3")
