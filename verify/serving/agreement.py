"""Whether vLLM computes the model that transformers computes: the logits of both on a source, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from verify.checks import Check, unchecked

ID = "serving.forward"
WHAT = "vLLM computes the model that transformers computes, and that is calibrated"
#: The share of positions that is judged: a token between two experts, or a near tie, may go either way at the others.
SHARE = 0.9
#: KL in nats that sums of float32 in another order stay below by far: 1e-11 at most in 30 families (docs/families.md).
EXACT = 1e-6
#: How many times further than transformers in the engine's own dtype the engine may be from transformers in float32.
SLACK = 4.0
#: KL in nats by rounding alone beyond which the comparison can tell nothing: other models differ by as little.
NOISE = 0.05


def engine_logits(directory: Path) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Token ids and logits `[T, V]` of each prompt, as `verify/inside_vllm/worker.py` wrote them (`write_logits`)."""
    files = sorted(directory.glob("prompt.*.safetensors"), key=lambda file: int(file.name.split(".")[1]))
    tensors = [load_file(file) for file in files]
    return [found["token_ids"].tolist() for found in tensors], [found["logits"] for found in tensors]


def judge_forward(
    exact: Sequence[torch.Tensor], engine: Sequence[torch.Tensor], own: Sequence[torch.Tensor] | None, how: str
) -> Check:
    """The check of `engine`'s logits against `exact`, those of transformers in float32. `own`: transformers' in the engine's
    dtype, whose distance from `exact` is what rounding alone costs this model; None if that is float32 too."""
    if any(a.shape != b.shape for a, b in zip(exact, engine, strict=True)):
        shapes = [list(logits[0].shape) for logits in (exact, engine)]
        return Check(ID, "FAIL", WHAT, f"logits of shape {shapes[0]} in transformers, {shapes[1]} in vLLM", "", how)
    found = _quantile(exact, engine)
    rounding = 0.0 if own is None else _quantile(exact, own)
    most = max(EXACT, SLACK * rounding)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).double() for a, b in zip(exact, engine, strict=True)])
    figure = (
        f"KL {found:.1e} at {SHARE:.0%} of {len(same)} positions, top-1 {float(same.mean()):.3f}"
        + (f"; rounding alone costs {rounding:.1e}" if own is not None else "")
    )  # fmt: skip
    if NOISE < rounding < torch.inf:
        return unchecked(ID, WHAT, f"{figure}: too much to tell two models apart")
    return Check(ID, "PASS" if found <= most < torch.inf else "FAIL", WHAT, figure, f"<= {most:.1e}", how)


def _quantile(exact: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The KL(exact || other) in nats that SHARE of all positions do not exceed; NaN counts as infinity."""
    kl = []
    for a, b in zip(exact, other, strict=True):
        for at in range(0, len(a), 64):
            one, two = a[at : at + 64], b[at : at + 64]
            p, q = one.double().log_softmax(-1), two.double().log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
    values = torch.cat(kl).nan_to_num(torch.inf).sort().values
    return float(values[int(SHARE * (len(values) - 1))])
