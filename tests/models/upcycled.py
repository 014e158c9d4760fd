"""A real mixture of experts: SmolLM2-135M-Instruct upcycled to a Mixtral with 8 experts, 692 M parameters.

Every expert is the dense model's MLP plus noise (3 % of each tensor's standard deviation), the router is random or one of
tests/models/routers.py, two experts are chosen. The noise makes experts differ as little as upcycled ones do; the model speaks
as the dense one does.

    python -m tests.models.upcycled SMOLLM2 OUT
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from calibration.checkpoint.index import Checkpoint
from tests.models.storage import Entry, new_directory, normal, split_at, write_shards
from tests.models.tokenizer import write_json

EXPERTS, CHOSEN, NOISE = 8, 2, 0.03
_LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_ROUTER = "block_sparse_moe.gate.weight"


def write(
    directory: Path, dense: Path, *, experts: int = EXPERTS, routers: Sequence[torch.Tensor] = (), seed: int = 0
) -> Path:
    """Writes the upcycled form of `dense`, a Llama directory without biases, into the new or empty `directory`. `routers`:
    BF16 `[experts, hidden]` of each block; random ones without."""
    new_directory(directory)
    source = Checkpoint.open(dense)
    config = json.loads((dense / "config.json").read_text())
    made: dict[str, tuple[str, int | None]] = {}
    for name, tensor in source.tensors.items():
        block, _, leaf = name.partition(".mlp.")
        if leaf:
            made |= {
                f"{block}.block_sparse_moe.experts.{n}.{_LEAVES[leaf.partition('.')[0]]}.weight": (name, n)
                for n in range(experts)
            }
            made[f"{block}.{_ROUTER}"] = ("", None)
        else:
            made[name] = (name, None)
        assert tensor.dtype == "BF16", name
    width = int(config["hidden_size"])
    entries = [
        Entry(name, torch.bfloat16, tuple(source.tensors[origin].shape) if origin else (experts, width))
        for name, (origin, _) in made.items()
    ]

    def make(entry: Entry) -> torch.Tensor:
        origin, expert = made[entry.name]
        if not origin and routers:
            return routers[int(entry.name.split(".")[2])]
        if not origin:
            return normal(seed, entry.name, entry.shape, 0.0, 1 / width**0.5).to(torch.bfloat16)
        value = source.read(origin)
        if expert is None:
            return value
        values = value.float()
        return (values + normal(seed, entry.name, entry.shape, 0.0, NOISE * float(values.std()))).to(torch.bfloat16)

    write_shards(
        directory, entries, split_at(entries, 2, lambda boundary: lambda name: name.endswith("w1.weight")), make
    )
    for name in ("mlp_bias", "attention_bias"):
        config.pop(name, None)
    config |= {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts,
        "num_experts_per_tok": CHOSEN, "sliding_window": None, "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    }  # fmt: skip
    write_json(directory / "config.json", config)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dense / name, directory / name)
    return directory


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    print(write(given.directory, given.dense))


if __name__ == "__main__":
    main()
