"""Checkpoints whose norms make some channels far larger than others, as trained ones do: what smoothing is for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def rewritten(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with changed tensors."""
    for path in sorted(Path(shutil.copytree(source, target)).glob("*.safetensors")):
        save_file({key: change(key, tensor) for key, tensor in sorted(load_file(path).items())}, path)
    return target


def write(source: Path, target: Path) -> Path:
    """A copy of a checkpoint with norms multiplied by random factors, a half to two in most channels."""
    generator = torch.Generator().manual_seed(0)

    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if "layernorm" not in key and not key.endswith("_norm.weight"):
            return tensor
        return tensor * torch.exp2(torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    return rewritten(source, target, change)
