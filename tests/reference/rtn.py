"""Round-to-nearest quantization of a small hub-form checkpoint, independent of the product: input for serving tests.

Writes the compressed-tensors form that vLLM loads. Everything a target does not match is copied unchanged.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.reference.nvfp4 import E2M1, block_fp8_dequantize, quantize

NVFP4_GROUP: dict[str, Any] = {
    "weights": {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": False,
    },
    "input_activations": {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
    },
    "format": "nvfp4-pack-quantized",
}
FP8_BLOCK_GROUP: dict[str, Any] = {
    "weights": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "block",
        "block_structure": [128, 128],
        "dynamic": False,
    },
    "input_activations": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": True,
    },
    "format": "float-quantized",
}

FUSED = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up",
    "w1": "gate_up", "w3": "gate_up", "wq_a": "qkv", "wkv": "qkv", "q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a",
}  # fmt: skip
"""Projections that vLLM multiplies as one matrix, which need one global scale."""


def load(source: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def write_nvfp4(
    source: Path,
    output: Path,
    pattern: str,
    targets: Sequence[str],
    *,
    ignore: Sequence[str] = (),
    input_amax: float = 8.0,
    per_expert_inputs: bool = False,
    block_fp8: tuple[str, Sequence[str]] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Quantize every module of `source` whose name matches `pattern` to NVFP4 and write `output`.

    targets: the `targets` of the config group, as vLLM reads them. per_expert_inputs: give every routed expert an
    input global scale of its own instead of one for the block. block_fp8: `(pattern, targets)` of modules whose
    E4M3 codes are kept as FP8_BLOCK, `.scale` renamed to `.weight_scale` in float32. config: keys to set in config.json.
    """
    tensors = load(source)
    quantized = [n.removesuffix(".weight") for n in tensors if re.search(pattern, n.removesuffix(".weight"))]
    plain = {
        module: _plain(tensors.pop(f"{module}.weight"), tensors.pop(f"{module}.scale", None)) for module in quantized
    }
    amax: dict[str, torch.Tensor] = {}
    for module, weight in plain.items():
        group = _fused(module)
        amax[group] = torch.maximum(amax.get(group, torch.zeros((), dtype=torch.float64)), weight.abs().amax())
    for module in quantized:
        divisor = (448.0 * 6.0 / amax[_fused(module)]).float().reshape(1)
        packed, scale = quantize(plain[module], divisor)
        expert = re.search(r"\.experts\.(\d+)\.", module)
        spread = 1.0 + (int(expert[1]) % 5) / 4 if expert and per_expert_inputs else 1.0
        tensors |= {
            f"{module}.weight_packed": packed,
            f"{module}.weight_scale": scale,
            f"{module}.weight_global_scale": divisor,
            f"{module}.input_global_scale": torch.tensor([448.0 * 6.0 / (input_amax * spread)]),
        }
    groups = {"nvfp4": {**NVFP4_GROUP, "targets": list(targets)}}
    if block_fp8 is not None:
        kept = [n.removesuffix(".scale") for n in tensors if re.search(block_fp8[0] + r"\.scale$", n)]
        for module in kept:
            tensors[f"{module}.weight_scale"] = tensors.pop(f"{module}.scale").float()
        groups["fp8"] = {**FP8_BLOCK_GROUP, "targets": list(block_fp8[1])}

    output.mkdir(parents=True)
    for extra in source.iterdir():
        if extra.suffix != ".safetensors" and extra.name != "model.safetensors.index.json" and extra.is_file():
            shutil.copy(extra, output / extra.name)
    written = json.loads((source / "config.json").read_text()) | (config or {})
    written["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "nvfp4-pack-quantized" if len(groups) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": list(ignore),
    }
    (output / "config.json").write_text(json.dumps(written, indent=2))
    save_file({n: t.contiguous() for n, t in tensors.items()}, output / "model.safetensors", {"format": "pt"})


def _plain(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Float64 `[M, K]` of a stored weight: plain, E4M3 with 128 x 128 tiles, or MXFP4 (int8 nibbles, 32 per scale)."""
    if scale is None:
        return weight.double()
    if weight.dtype == torch.float8_e4m3fn:
        return block_fp8_dequantize(weight, scale)
    packed = weight.view(torch.uint8)
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2).long()
    values = torch.where(nibbles >= 8, -E2M1[nibbles & 7], E2M1[nibbles & 7])
    return values * scale.double().repeat_interleave(32, -1)


def _fused(module: str) -> str:
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{FUSED.get(leaf, leaf)}"
