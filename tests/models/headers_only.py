"""A DeepSeek-V4 or V4.1 checkpoint of any size whose shards have complete headers and no data: their bytes are holes in sparse
files. What it takes to plan a run and to build the empty model of V4-Pro is measured on it.

    python -m tests.models.headers_only OUT [--model pro] [--blocks 61] [--shards 64]

Models: `pro` and `flash` as first released, `pro-0813` and `flash-0731` with a DSpark draft head, `v4.1-flash`.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibration.families.registry import expected_tensors
from tests.models import deepseek_v41
from tests.models.deepseek_v4 import Sizes, config, entries, specs
from tests.models.storage import Entry, new_directory
from tests.models.tokenizer import write_json

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}


@dataclass(frozen=True)
class ProSizes(Sizes):
    """DeepSeek-V4-Pro's dimensions (its config.json on the hub)."""

    hidden: int = 7168
    layers: int = 61
    hash_layers: int = 3
    experts: int = 384
    moe_intermediate: int = 3072
    heads: int = 128
    q_lora_rank: int = 1536
    o_lora_rank: int = 1024
    o_groups: int = 16
    index_heads: int = 64
    index_topk: int = 1024
    vocab: int = 129280

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """128, 128, 4, 128, 4, ... for the blocks."""
        return tuple(128 if i < 2 or i % 2 else 4 for i in range(self.layers))


@dataclass(frozen=True)
class FlashSizes(Sizes):
    """DeepSeek-V4-Flash's dimensions (its config.json on the hub)."""

    hidden: int = 4096
    layers: int = 43
    hash_layers: int = 3
    experts: int = 256
    moe_intermediate: int = 2048
    heads: int = 64
    q_lora_rank: int = 1024
    o_lora_rank: int = 1024
    o_groups: int = 8
    index_heads: int = 64
    vocab: int = 129280

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """0, 0, 4, 128, 4, ... for the blocks."""
        return tuple(0 if i < 2 else 128 if i % 2 else 4 for i in range(self.layers))


@dataclass(frozen=True)
class Flash0731Sizes(FlashSizes):
    """DeepSeek-V4-Flash-0731: Flash with a DSpark draft head. Its index has 72,317 tensors of 166,878,536,440 bytes."""

    draft_blocks: int = 3
    markov_rank: int = 256


@dataclass(frozen=True)
class Pro0813Sizes(ProSizes):
    """DeepSeek-V4-Pro-0813: Pro with a DSpark draft head. The hub counts 1,650,497,936,906 parameters."""

    draft_blocks: int = 3
    markov_rank: int = 512


MODELS: dict[str, Sizes] = {
    "pro": ProSizes(),
    "pro-0813": Pro0813Sizes(),
    "flash": FlashSizes(),
    "flash-0731": Flash0731Sizes(),
    "v4.1-flash": deepseek_v41.FlashSizes(),
}


def takes_holes(directory: Path) -> bool:
    """Whether the file system of `directory` keeps a truncated-up file without allocating its bytes."""
    probe = directory / ".hole"
    try:
        probe.touch()
        os.truncate(probe, 2**30)
        return probe.stat().st_blocks * 512 < 2**20
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def stored_tensors(sizes: Sizes) -> Iterable[Entry]:
    """Every stored tensor of the released form of these dimensions: FP8 tiles, MXFP4 experts."""
    if isinstance(sizes, deepseek_v41.Sizes):
        return (entry for spec in deepseek_v41.specs(sizes) for entry in deepseek_v41.entries(spec))
    return (entry for spec in specs(sizes) for entry in entries(spec, "fp8_mxfp4"))


#: Kimi-K2's dimensions (moonshotai/Kimi-K2-Instruct, config.json), in its model's class in transformers: DeepSeek-V3's.
KIMI_K2: dict[str, Any] = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64,
    "num_key_value_heads": 64, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840, "n_group": 1, "topk_group": 1,
    "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                            "activation_scheme": "dynamic"},
}  # fmt: skip


def write_kimi_k2(directory: Path, blocks: int = 61, shards: int = 64) -> Path:
    """A hollow source in FP8 tiles (`weight_scale_inv`) of Kimi-K2's size; the names are those that transformers saves."""
    content = KIMI_K2 | {"num_hidden_layers": blocks}
    stored = []
    for name, want in expected_tensors(content)[0].items():
        tiles = want.kind == "linear" and not name.startswith(("lm_head", "model.embed"))
        dtype = torch.float8_e4m3fn if tiles else torch.float32 if want.kind == "float" else torch.bfloat16
        stored.append(Entry(name, dtype, want.shape))
        if tiles:
            scale = tuple(-(-side // 128) for side in want.shape)
            stored.append(Entry(f"{name}_scale_inv", torch.float32, scale))
    return write_entries(directory, content, stored, shards)


def write(directory: Path, sizes: Sizes, shards: int = 64) -> Path:
    """Writes config, index and shards (FP8 tiles, MXFP4 experts) into the new or empty `directory`; returns it. See
    `write_entries`."""
    return write_entries(directory, _config(sizes), list(stored_tensors(sizes)), shards)


def write_entries(directory: Path, content: dict[str, Any], stored: Sequence[Entry], shards: int) -> Path:
    """Writes config.json (`content`), index and hollow shards of these tensors into the new or empty `directory`; returns it.

    Never copy it: a copy that does not keep holes takes all the bytes that the index promises.
    Raises FileExistsError when the directory holds something, OSError where the file system takes no holes.
    """
    new_directory(directory)
    if not takes_holes(directory):
        raise OSError(f"{directory}: the file system has no sparse files; name a directory on another one")
    total = sum(entry.nbytes for entry in stored)
    parts: list[list[Entry]] = [[] for _ in range(shards)]
    begin = 0
    for entry in stored:
        parts[begin * shards // total].append(entry)
        begin += entry.nbytes
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_hollow(directory / name, part)
        weight_map |= {entry.name: name for entry in part}
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    write_json(directory / "config.json", content)
    return directory


def _config(sizes: Sizes) -> dict[str, Any]:
    if isinstance(sizes, deepseek_v41.Sizes):
        return deepseek_v41.config(sizes)
    content = config(sizes, "fp8_mxfp4")
    content["max_position_embeddings"] = 1048576
    content["rope_scaling"] |= {"original_max_position_embeddings": 65536}
    return content


def _write_hollow(path: Path, part: Sequence[Entry]) -> None:
    header, begin = {}, 0
    for entry in part:
        end = begin + entry.nbytes
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + begin)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write the headers of a DeepSeek-V4 checkpoint.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=tuple(MODELS), default="pro")
    parser.add_argument("--blocks", type=int, help="all of them when left out")
    parser.add_argument("--shards", type=int, default=64)
    given = parser.parse_args()
    sizes = MODELS[given.model]
    print(write(given.directory, replace(sizes, layers=given.blocks or sizes.layers), given.shards))


if __name__ == "__main__":
    main()
