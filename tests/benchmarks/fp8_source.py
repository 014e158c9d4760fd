"""An FP8 checkpoint of any size for benchmarks: routed experts of DeepSeek-V4-Flash's shapes, half a gigabyte a block."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models.deepseek_v4 import Sizes, config
from tests.models.storage import to_tiles

HIDDEN, INTERMEDIATE, EXPERTS = 4096, 2048, 20
SHAPES = {"w1": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE), "w3": (INTERMEDIATE, HIDDEN)}


def write(directory: Path, blocks: int, experts: int = EXPERTS) -> Path:
    """Writes `blocks` shards of `experts` experts, F32 tile scales as `weight_scale_inv` (all that llm-compressor's
    model_free_ptq reads). Values are normal; every expert has the same codes and scales of its own."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    made = {
        leaf: to_tiles(torch.randn(shape, generator=generator) * 0.02, torch.float32) for leaf, shape in SHAPES.items()
    }
    weight_map = {}
    for block in range(blocks):
        tensors = {}
        for expert in range(experts):
            for leaf, (codes, scales) in made.items():
                name = f"layers.{block}.ffn.experts.{expert}.{leaf}"
                tensors[f"{name}.weight"] = codes.clone()
                tensors[f"{name}.weight_scale_inv"] = scales * (1 + 0.01 * expert + 0.003 * block)
        shard = f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = Sizes(hidden=HIDDEN, moe_intermediate=INTERMEDIATE, experts=experts, layers=blocks)
    (directory / "config.json").write_text(json.dumps(config(sizes, "fp8")))
    return directory
