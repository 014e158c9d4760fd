"""Makes batches without padding, so that nothing that sees them (observers, Hessians, importance, routing, counts, the
comparison of blocks) can mistake a pad token for text, with any modifier, observer or model.

Stock llm-compressor 0.14 observes padding like text (datasets/utils.py says so about its collator; `use_loss_mask` only
affects AWQ's loss), so that its scales depend on the pad token and the batch size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch


def batches_of_one_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Divides row numbers into batches of at most `size` rows of equal length, ordered by their first rows. If all rows
    have the same length, batches are consecutive rows."""
    filling: dict[int, list[int]] = {}
    batches: list[list[int]] = []
    for row, length in enumerate(lengths):
        batch = filling.get(length)
        if batch is None or len(batch) == size:
            filling[length] = batch = []
            batches.append(batch)
        batch.append(row)
    return batches


def without_padding(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the rows of `batches` without the positions at either end that `attention_mask` (`[batch, tokens]`)
    excludes. A padded batch becomes one batch for each length of its rows; a batch without padding is yielded
    unchanged. Tensors whose first two dimensions are the mask's are cut, those that share only its first are divided.

    Raises ValueError for a mask with holes between tokens.
    """
    for batch in batches:
        mask = batch.get("attention_mask")
        if mask is None or bool(mask.all()):
            yield batch
            continue
        counts = mask.bool().sum(1).tolist()
        begins = mask.bool().int().argmax(1).tolist()
        for row, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            if not mask[row, begin : begin + count].all():
                raise ValueError(f"attention_mask: row {row} has padding between its tokens; put it at one end")
        rows = [row for row, count in enumerate(counts) if count]
        for chosen in batches_of_one_length([counts[row] for row in rows], len(rows)):
            yield _part(batch, mask.shape, [(rows[i], begins[rows[i]], counts[rows[i]]) for i in chosen])


def _part(batch: dict[str, Any], shape: torch.Size, spans: list[tuple[int, int, int]]) -> dict[str, Any]:
    """The part of a batch of `shape` that `spans` lists as (row, first token, number of tokens)."""

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape[:1] != shape[:1]:
            return value
        if value.shape[:2] != shape:
            return value[[row for row, _, _ in spans]]
        return torch.stack([value[row, begin : begin + count] for row, begin, count in spans])

    return {name: cut(value) for name, value in batch.items()}
