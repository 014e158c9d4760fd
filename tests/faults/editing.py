"""Ways to spoil a checkpoint directory. Each function returns the spoiler, which edits a copy in place."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.header import read_header
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME
from tests.models.tokenizer import write_json

Tensors = dict[str, torch.Tensor]
Spoil = Callable[[Path], object]


def tensors(edit: Callable[[Tensors], object]) -> Spoil:
    """Edits the tensors as one dictionary; changed shards are written again and the index brought in line, so that the
    checkpoint is whole but for what `edit` did. A new tensor goes into the first shard."""

    def spoil(directory: Path) -> None:
        shards = {path: load_file(path) for path in sorted(directory.glob("*.safetensors"))}
        merged = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
        homes = {name: path for path, shard in shards.items() for name in shard}
        before = dict(merged)
        edit(merged)
        weight_map = {}
        for path in shards:
            first = path == next(iter(shards))
            mine = {n: t for n, t in merged.items() if homes.get(n) == path or (first and n not in homes)}
            weight_map |= dict.fromkeys(mine, path.name)
            if mine.keys() != shards[path].keys() or any(before[n] is not t for n, t in mine.items()):
                path.unlink()
            if mine and not path.exists():
                save_file({n: t.contiguous().clone() for n, t in mine.items()}, path, metadata={"format": "pt"})
        total = sum(tensor.nbytes for tensor in merged.values())
        (directory / INDEX_NAME).unlink()
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})

    return spoil


def value(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Replaces one tensor."""
    return tensors(lambda all_: all_.update({name: change(all_[name])}))


def values(pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Replaces every tensor whose name matches."""
    return tensors(lambda all_: all_.update({n: change(t) for n, t in all_.items() if re.search(pattern, n)}))


def first(replacement: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Another first element."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.to(torch.float32, copy=True)
        changed.view(-1)[0] = replacement
        return changed.to(tensor.dtype)

    return change


def bits(mask: int, position: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """The byte at `position` with the bits of `mask` flipped."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.contiguous().view(torch.uint8).clone()
        raw.view(-1)[position] ^= mask
        return raw.view(tensor.dtype).view(tensor.shape)

    return change


def drop(pattern: str) -> Spoil:
    """Removes tensors by pattern."""

    def edit(all_: Tensors) -> None:
        for name in [name for name in all_ if re.search(pattern, name)]:
            del all_[name]

    return tensors(edit)


def rename(pattern: str, replacement: str, keep: bool = False) -> Spoil:
    """Renames tensors by pattern; with `keep` both names stay."""

    def edit(all_: Tensors) -> None:
        for name in [name for name in all_ if re.search(pattern, name)]:
            tensor = all_[name] if keep else all_.pop(name)
            all_[re.sub(pattern, replacement, name)] = tensor.clone()

    return tensors(edit)


def exchange(left: str, right: str) -> Spoil:
    """Exchanges the tensors whose names begin with `left` with those that begin with `right`."""

    def edit(all_: Tensors) -> None:
        for name in [name for name in all_ if name.startswith(left)]:
            other = right + name.removeprefix(left)
            all_[name], all_[other] = all_[other], all_[name]

    return tensors(edit)


def json_file(name: str, edit: Callable[[dict[str, Any]], object]) -> Spoil:
    """Edits a JSON file."""

    def spoil(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        edit(content)
        (directory / name).unlink()
        write_json(directory / name, content)

    return spoil


def new_file(name: str, content: str) -> Spoil:
    """Adds a file."""

    def spoil(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)

    return spoil


def config(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    """Edits config.json."""
    return json_file(CONFIG_NAME, edit)


def quantization(edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> Spoil:
    """Edits quantization_config, given it and the config group of the experts."""
    return config(lambda c: edit(c["quantization_config"], c["quantization_config"]["config_groups"]["experts"]))


def index(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    """Edits the index."""
    return json_file(INDEX_NAME, edit)


def shard(number: int, edit: Callable[[bytes], bytes]) -> Spoil:
    """Edits the bytes of one shard."""

    def spoil(directory: Path) -> None:
        path = sorted(directory.glob("*.safetensors"))[number]
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(edit(data))

    return spoil


def header(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    """Edits the header of the first shard and leaves its bytes alone."""

    def change(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + length])
        edit(content)
        text = json.dumps(content).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return shard(0, change)


def flip_in_header(data: bytes) -> bytes:
    """One bit of the first tensor's name."""
    at = data.index(b'"dtype"') - 4
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def shard_of(directory: Path, tensor: str) -> Path:
    """The shard that holds a tensor."""
    return next(path for path in sorted(directory.glob("*.safetensors")) if tensor in read_header(path))


def outside(directory: Path) -> None:
    """The last shard moves out of the checkpoint and a link stays."""
    path = sorted(directory.glob("*.safetensors"))[-1]
    path.rename(directory.parent / path.name)
    path.symlink_to(directory.parent / path.name)


def twice(directory: Path) -> None:
    """A tensor of the first shard stands, changed, in the last one too."""
    paths = sorted(directory.glob("*.safetensors"))
    name, tensor = next(iter(load_file(paths[0]).items()))
    last = load_file(paths[-1])
    paths[-1].unlink()
    save_file(last | {name: torch.zeros_like(tensor)}, paths[-1], metadata={"format": "pt"})
