"""How matrix products come out on the machine at hand, found by making a few: a promise of equal bytes holds only as far
as products do (docs/promises.md).

Processors with AMX and GPUs choose another kernel for another number of rows, which adds up in another order, so that a
row's last bit depends on how many rows are multiplied with it. And two machines that torch gives one name
(`cpu AVX512`) may round differently: here `ONEDNN_MAX_CPU_ISA=AVX512_CORE` was enough for BF16 and `MKL_CBWR=COMPATIBLE`
for float32 (hyper-connections, Hessians), which MKL multiplies as the processor's maker says.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

#: Rows of a product, and of the smaller ones that are compared with it; routed tokens come in multiples of 16.
ROWS, FEWER = 256, (1, 7, 16, 48, 80, 112, 240)
#: Inputs of a float32 Gram matrix and its Cholesky factor: enough for MKL to split the latter among threads.
PRECISE = 1024
#: The most common shapes are tried, cut at so many outputs and inputs: 8 GFLOP at the most.
SHAPES, OUTPUTS, INPUTS = 3, 512, 8192


@dataclass(frozen=True)
class Products:
    """What was found on `device`: a `digest` of the products' bits, equal on machines that round alike, and the row counts
    whose rows differ from the same rows among ROWS, by shape (`[out, in]` as text)."""

    device: str
    digest: str
    differing: dict[str, list[int]] = field(default_factory=dict)

    @property
    def row_invariant(self) -> bool:
        """Whether a row's product never depended on the number of rows."""
        return not self.differing

    @property
    def facts(self) -> dict[str, Any]:
        """For journal and events."""
        return {**asdict(self), "row_invariant": self.row_invariant}

    def lost(self, recorded: Sequence[Mapping[str, Any]]) -> str | None:
        """What a run that goes on here loses, if its journal `recorded` another machine's products; None if nothing."""
        known = [fact for fact in recorded if fact["fact"] == "products"]
        begun = [fact["parts"].get("device") for fact in recorded if fact["fact"] == "fingerprint"]
        device = known[-1]["device"] if known else begun[-1] if begun else self.device
        digest = known[-1]["digest"] if known else None  # runs before 2026-11-29 recorded the device alone
        if device == self.device and digest in (None, self.digest):
            return None
        there = device + (f" (products {digest})" if digest else "")
        return (
            f"finished blocks were calculated on {there}, and {self.device} (products {self.digest}) rounds differently: the "
            "output will be as sound, but byte for byte that of neither machine; to calculate all blocks here, pass --restart"
        )


def device_name() -> str:
    """The arithmetic that calibration runs on: the accelerator, or the processor's vector instructions."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def try_products(
    shapes: Iterable[Sequence[int]],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    hessians: bool = False,
) -> Products:
    """Products in `dtype` of the most common of `shapes` (`[out, in]` of linear layers) on `device` (torch's own choice if
    None), and what stands around them in a block: a softmax and a gated activation. On a CPU float32 products too, which
    another library makes; with `hessians` (GPTQ) a Cholesky factor, which depends on the number of
    threads."""
    counted = Counter((min(out, OUTPUTS), min(inputs, INPUTS)) for *_, out, inputs in shapes)
    chosen = sorted(counted, key=lambda shape: (-counted[shape], shape))[:SHAPES]
    device = device or torch.accelerator.current_accelerator() or torch.device("cpu")
    largest = max([ROWS * inputs for _, inputs in chosen] + [out * inputs for out, inputs in chosen], default=0)
    numbers = torch.randn(largest, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    digest, differing = hashlib.sha256(), dict[str, list[int]]()
    for out, inputs in chosen:
        rows, weight = numbers[: ROWS * inputs].view(ROWS, inputs), numbers[: out * inputs].view(out, inputs).flip(0)
        whole = F.linear(rows, weight)
        found = [count for count in FEWER if not torch.equal(F.linear(rows[:count], weight), whole[:count])]
        if found:
            differing[str([out, inputs])] = found
        for made in (whole, whole.float().softmax(-1), F.silu(whole) * whole):
            digest.update(made.cpu().view(torch.uint8).numpy().tobytes())
    if device.type == "cpu":
        precise = torch.randn(ROWS, PRECISE, generator=torch.Generator().manual_seed(0))
        gram = torch.mm(precise.t(), precise)
        factor = [torch.linalg.cholesky(gram + ROWS * torch.eye(PRECISE))] if hessians else []
        for made in (gram, *factor):
            digest.update(made.numpy().tobytes())
    return Products(device_name(), digest.hexdigest()[:12], differing)
