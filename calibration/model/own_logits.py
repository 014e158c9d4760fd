"""Logits of a checkpoint by transformers' own forward, one block in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.model.skeleton import build_skeleton
from calibration.model.source_model import SourceModel, own_tensors, place


@torch.no_grad()
def own_logits(
    checkpoint: Checkpoint, rows: Sequence[Sequence[int]], directory: Path, dtype: torch.dtype, trust_remote_code: bool
) -> list[torch.Tensor]:
    """Logits `[T, V]` in float32 on the CPU for every row of `T` token ids; `dtype` is that of weights and hidden states.

    Rows of one length are computed together, without padding and without a cache. `directory` takes the config of the
    model, see `build_skeleton`, which raises SourceError.
    """
    source = build_skeleton(Formats(checkpoint), directory, trust_remote_code)
    _set_dtype(source.model, dtype)
    handles = [handle for block in source.blocks.values() for handle in _in_memory_while_it_runs(source, block)]
    outside = source.outside_blocks()
    source.load(outside)
    alike = defaultdict[int, list[int]](list)
    for number, row in enumerate(rows):
        alike[len(row)].append(number)
    found: dict[int, torch.Tensor] = {}
    for numbers in alike.values():
        ids = torch.tensor([list(rows[number]) for number in numbers], device=source.device)
        logits = source.model(input_ids=ids, use_cache=False).logits
        found |= {number: row.to("cpu", torch.float32) for number, row in zip(numbers, logits, strict=True)}
    source.unload(outside)
    for handle in handles:
        handle.remove()
    return [found[number] for number in range(len(rows))]


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every parameter and buffer of an empty model that is not F32 already this dtype, which `SourceModel.load` reads."""
    for module in model.modules():
        for leaf, tensor in list(own_tensors(module)):
            if tensor.dtype == torch.bfloat16:
                place(module, leaf, torch.empty_like(tensor, dtype=dtype, device="meta"))


def _in_memory_while_it_runs(
    source: SourceModel, block: nn.Module
) -> tuple[torch.utils.hooks.RemovableHandle, torch.utils.hooks.RemovableHandle]:
    return (
        block.register_forward_pre_hook(lambda *_: source.load([block])),
        block.register_forward_hook(lambda *_: source.unload([block])),
    )
