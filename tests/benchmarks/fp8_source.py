"""A checkpoint of any size for benchmarks, FP8 or BF16: routed experts of DeepSeek-V4-Flash's shapes, half a gigabyte a
block, and the rest of a DeepSeek-V4 model, as small as it can be, which the planner asks for by name (7 % of the bytes)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from tests.models.deepseek_v4 import Sizes, Spec, config, specs, values
from tests.models.storage import to_tiles

HIDDEN, INTERMEDIATE, EXPERTS = 4096, 2048, 20


class _Sizes(Sizes):
    """Sizes of a model without compressors and indexers, which would be large."""

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        return (0,) * self.layers


def write(
    directory: Path,
    blocks: int,
    experts: int = EXPERTS,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    stored: Literal["fp8", "bf16"] = "fp8",
) -> Path:
    """Writes `blocks` shards of `experts` experts, F32 tile scales as `weight_scale_inv` (all that llm-compressor's
    model_free_ptq reads), and a shard of what belongs to no block. Values are normal; every expert has the same codes and
    scales of its own. Attention is BF16, the shared experts FP8; with `bf16` all experts are BF16, two blocks a gigabyte."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (intermediate, hidden), "w2": (hidden, intermediate), "w3": (intermediate, hidden)}
    made = {
        leaf: to_tiles(torch.randn(shape, generator=generator) * 0.02, torch.float32) for leaf, shape in shapes.items()
    }
    sizes = _Sizes(hidden=hidden, moe_intermediate=intermediate, experts=experts, layers=blocks)
    shards: dict[str, list[Spec]] = defaultdict(list)
    for spec in specs(sizes):
        part, number = [*spec.name.split("."), "0"][:2]
        block = int(number) if part == "layers" else blocks
        if part != "mtp":
            shards[f"model-{block + 1:05d}-of-{blocks + 1:05d}.safetensors"].append(spec)
    weight_map = {}
    for block, (shard, held) in enumerate(sorted(shards.items())):
        tensors = {}
        for spec in held:
            module = spec.name.removesuffix(".weight")
            if ".experts." in module or ".shared_experts." in module:
                codes, scales = made[module.rpartition(".")[2]]
                expert = int(module.split(".")[-2]) if ".experts." in module else experts
                if stored == "bf16":
                    tensors[spec.name] = codes.to(torch.bfloat16) * (0.001 * (1 + 0.01 * expert + 0.003 * block))
                    continue
                tensors[spec.name] = codes.clone()
                tensors[f"{module}.weight_scale_inv"] = scales * (1 + 0.01 * expert + 0.003 * block)
            else:
                (tensors[spec.name],) = values(spec, "bf16", sizes, 0)
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config(sizes, stored)))
    return directory
