"""Checkpoints of the standard families in the stored forms that other libraries write, made from the BF16 ones.

python -m tests.models.stored_forms OUT --family llama --form fp8_channel
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.index import INDEX_NAME
from tests.models import standard
from tests.models.storage import to_fp8, to_int4, to_modelopt_nvfp4, to_tiles
from tests.models.tokenizer import write_json

Tensors = dict[str, torch.Tensor]
LINEAR = re.compile(r"\.(?:(?:q|k|v|o|gate|up|down)_proj|experts\.\d+\.w[123])\.weight$")


def _compressed_tensors(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}},
    }


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}


def _fp8(per: str, **further: torch.Tensor) -> Callable[[torch.Tensor], Tensors]:
    return lambda weight: dict(zip(("weight", "weight_scale"), to_fp8(weight, per), strict=True)) | further


#: Form -> what a linear weight becomes, by suffix, and `quantization_config`.
FORMS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "fp8_tensor": (
        _fp8("tensor", input_scale=torch.tensor([0.5])),
        _compressed_tensors("float-quantized", num_bits=8, type="float", strategy="tensor"),
    ),
    "fp8_channel": (
        _fp8("channel"), _compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel")),
    "fp8_modelopt": (_fp8("scalar", input_scale=torch.tensor(0.5)), _modelopt("FP8")),
    "int4": (
        lambda weight: to_int4(weight, 32),
        _compressed_tensors("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "int4_asymmetric": (
        lambda weight: to_int4(weight, 32, asymmetric=True),
        _compressed_tensors("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    ),
    "int4_ordered": (
        lambda weight: to_int4(weight, 32, asymmetric=True, ordered=True),
        _compressed_tensors("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    ),
    "fp8_tiles": (
        lambda weight: dict(zip(("weight", "weight_scale_inv"), to_tiles(weight, torch.float32), strict=True)),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "fp8_tiles_64": (
        lambda weight: dict(zip(("weight", "weight_scale_inv"), to_tiles(weight, torch.float32, 64), strict=True)),
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
    ),
    "fp8_tiles_96": (
        lambda weight: dict(zip(("weight", "weight_scale_inv"), to_tiles(weight, torch.float32, 96), strict=True)),
        {"quant_method": "fp8", "weight_block_size": [96, 96]},
    ),
    "nvfp4_modelopt": (to_modelopt_nvfp4, _modelopt("NVFP4")),
}  # fmt: skip


def write(directory: Path, family: standard.Family, form: str, *, seed: int = 0) -> Path:
    """Writes the checkpoint, in one shard, into the new or empty `directory` and returns it."""
    standard.write(directory, family, seed=seed, shards=1)
    make, quantization = FORMS[form]
    tensors = load_file(directory / "model.safetensors")
    stored: Tensors = {}
    for name, value in tensors.items():
        if not LINEAR.search(name):
            stored[name] = value
            continue
        if form == "nvfp4_modelopt":
            fused = _fused(name)
            made = to_modelopt_nvfp4(value, max(float(tensors[other].float().abs().max()) for other in fused))
        else:
            made = make(value)
        stored |= {name.removesuffix("weight") + suffix: part.contiguous().clone() for suffix, part in made.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | {"quantization_config": quantization})
    return directory


def store(directory: Path, form: str, linear: re.Pattern[str], shards: int) -> None:
    """Stores the weights that `linear` matches of the checkpoint in `directory` in `form`, in one file, or in `shards` in which
    neighbors (gate and up, a weight and its scale) lie apart. The language model's config names the form, if it is nested."""
    make, quantization = FORMS[form]
    tensors: Tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    stored: Tensors = {}
    for name, value in tensors.items():
        parts = make(value) if linear.search(name) else {name.rpartition(".")[2]: value}
        stored |= {f"{name.rpartition('.')[0]}.{leaf}": part.contiguous().clone() for leaf, part in parts.items()}
    (directory / INDEX_NAME).unlink()
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    )
    weight_map = {name: files[number % shards] for number, name in enumerate(sorted(stored))}
    for file in files:
        held = {name: tensor for name, tensor in stored.items() if weight_map[name] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    if shards > 1:
        total = sum(tensor.nbytes for tensor in stored.values())
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = json.loads((directory / "config.json").read_text())
    config.get("text_config", config)["quantization_config"] = quantization
    write_json(directory / "config.json", config)


def _fused(name: str) -> list[str]:
    """The weights that are served as one matrix with this one."""
    module = name.removesuffix(".weight")
    parent, _, leaf = module.rpartition(".")
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3")):
        if leaf in group:
            return [f"{parent}.{other}.weight" for other in group]
    return [name]


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint in another library's stored form.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=get_args(standard.Family), default="llama")
    parser.add_argument("--form", choices=tuple(FORMS), default="fp8_channel")
    given = parser.parse_args()
    print(write(given.directory, given.family, given.form))


if __name__ == "__main__":
    main()
