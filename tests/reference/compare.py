"""Agreement of two sets of logits, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Agreement:
    """top1: share of positions with the same arg max; kl: mean KL(reference || other) in nats; over the `positions` that
    are decided; `share` of all positions is decided."""

    positions: int
    top1: float
    kl: float
    max_logprob_difference: float
    share: float = 1.0


def compare(
    reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None = None
) -> Agreement:
    """Compare logits `[T, V]` per prompt, at the positions of `masks` `[T]` (see `tests.reference.model.decided`)."""
    total = sum(len(r) for r in reference)
    if masks is not None:
        reference = [r[mask] for r, mask in zip(reference, masks, strict=True)]
        other = [o[mask] for o, mask in zip(other, masks, strict=True)]
    expected = torch.cat([r.double() for r in reference]).log_softmax(-1)
    found = torch.cat([o.double() for o in other]).log_softmax(-1)
    assert expected.shape == found.shape, f"{tuple(expected.shape)} against {tuple(found.shape)}"
    return Agreement(
        positions=expected.shape[0],
        top1=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
        kl=float((expected.exp() * (expected - found)).sum(-1).mean()),
        max_logprob_difference=float((expected - found).abs().max()),
        share=expected.shape[0] / total,
    )


def engine_logits(path: Path) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Token ids and logits per prompt, as `verify.inside_vllm.worker` wrote them into `path`."""
    files = sorted(path.glob("prompt.*.safetensors"), key=lambda file: int(file.name.split(".")[1]))
    tensors = [load_file(file) for file in files]
    return [found["token_ids"].tolist() for found in tensors], [found["logits"] for found in tensors]
