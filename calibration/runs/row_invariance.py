"""Probes how matrix products round on this machine: the promise of equal bytes holds only as far as products are equal
(docs/promises.md).

Processors with AMX and GPUs choose the kernel by the number of rows, and kernels add up in different orders, so that a
row's last bit depends on how many rows are multiplied with it. Two machines to which torch gives the same name (`cpu
AVX512`) may round differently: `ONEDNN_MAX_CPU_ISA=AVX512_CORE` was enough to change BF16 products, and
`MKL_CBWR=COMPATIBLE` to change float32 ones (hyper-connections, Hessians), for which MKL chooses kernels by the
processor's vendor.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from calibration.checkpoint import native

#: Rows of the full product, and of the smaller ones that are compared with it; routed tokens come in multiples of FEWEST.
ROWS, FEWER, FEWEST = 256, (1, 7, 16, 48, 80, 112, 240), 16
#: Inputs of a float32 Gram matrix and its Cholesky factor: enough for MKL to split the latter among threads.
PRECISE = 1024
#: How many of the most common shapes are tried, and the limit of their outputs and inputs: 8 GFLOP at most.
SHAPES, OUTPUTS, INPUTS = 3, 512, 8192


@dataclass(frozen=True)
class Products:
    """The probe's result on `device`: a `digest` of the products' bits, equal on machines that round alike, and by
    shape (`[out, in]` as text) the row counts at which rows differ from the same rows of the full product. With AMX the
    bits of sums over 512 inputs and more also depend on the number of `threads`."""

    device: str
    digest: str
    differing: dict[str, list[int]] = field(default_factory=dict)
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def row_invariant(self) -> bool:
        """Whether a row's product never depended on the number of rows, from FEWEST on: of fewer, only a sample that is shorter
        is made, and one row alone has a kernel of its own on most processors."""
        return not any(count >= FEWEST for counts in self.differing.values() for count in counts)

    @property
    def facts(self) -> dict[str, Any]:
        """The result as JSON, for journal and events."""
        return {**asdict(self), "row_invariant": self.row_invariant}

    def lost(self, recorded: Sequence[Mapping[str, Any]]) -> str | None:
        """What a run loses by resuming here if its journal `recorded` another machine's products; None if it loses
        nothing."""
        known = [fact for fact in recorded if fact["fact"] == "products"]
        begun = [fact["parts"].get("device") for fact in recorded if fact["fact"] == "fingerprint"]
        device = known[-1]["device"] if known else begun[-1] if begun else self.device
        digest = known[-1]["digest"] if known else None  # runs before 2026-11-29 recorded only the device
        if device == self.device and digest in (None, self.digest):
            return None
        threads = known[-1].get("threads") if known else None  # since 2026-11-30
        remedy = "to calculate all blocks here, pass --restart"
        if device == self.device and threads not in (None, self.threads):
            remedy = f"to go on as it began, set OMP_NUM_THREADS={threads}; {remedy}"
        return (
            f"finished blocks were calculated on {_described(device, digest, threads)}, and "
            f"{_described(self.device, self.digest, self.threads)} rounds differently: the output will be as sound, but "
            f"not byte for byte that of either machine; {remedy}"
        )


def _described(device: str, digest: str | None, threads: int | None) -> str:
    details = [f"products {digest}"] if digest else []
    details += [f"{threads} thread{'s'[: threads != 1]}"] if threads else []
    return f"{device} ({', '.join(details)})" if details else device


def device_name() -> str:
    """The arithmetic that calibration runs on: the accelerator, or the processor's vector instructions."""
    device = native.accelerator()
    if device is None:
        # torch calls x86 without AVX2 DEFAULT, and every ARM without SVE.
        machine = "" if platform.machine() == "x86_64" else f"{platform.machine()} "
        return f"cpu {machine}{torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _cancelling(rows: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights, of the shapes given, whose every product is a sum of terms and of their negatives in random
    order: zero but for what rounding leaves, so another order of adding leaves another result. Of common rows one output
    in ten thousand shows another order, because rounding to BF16 hides it."""
    half = rows.shape[1] // 2
    order = torch.randperm(2 * half, generator=torch.Generator().manual_seed(0)).to(rows.device)
    x, w = rows[:, :half] ** 3, weight[:, :half] ** 3  # cubes: more exponents, more to round
    return torch.cat([x, -x], 1)[:, order], torch.cat([w, w], 1)[:, order]


def try_products(
    shapes: Iterable[Sequence[int]],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    hessians: bool = False,
) -> Products:
    """Products in `dtype` of the most common of `shapes` (`[out, in]` of linear layers) on `device` (the accelerator, or the
    CPU, if None), and what stands around them in a block: a softmax and a gated activation. On a CPU float32 products too, which
    another library makes; with `hessians` (GPTQ) a Cholesky factor, which depends on the number of
    threads."""
    counted = Counter((min(out, OUTPUTS), min(inputs, INPUTS)) for *_, out, inputs in shapes)
    chosen = sorted(counted, key=lambda shape: (-counted[shape], shape))[:SHAPES]
    device = native.computing_device(device)
    largest = max([ROWS * inputs for _, inputs in chosen] + [out * inputs for out, inputs in chosen], default=0)
    numbers = torch.randn(largest, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    digest, differing = hashlib.sha256(), dict[str, list[int]]()
    for out, inputs in chosen:
        rows, weight = numbers[: ROWS * inputs].view(ROWS, inputs), numbers[: out * inputs].view(out, inputs).flip(0)
        whole = F.linear(rows, weight)
        rows, weight = _cancelling(rows, weight)
        residues = F.linear(rows, weight)
        found = [count for count in FEWER if not torch.equal(F.linear(rows[:count], weight), residues[:count])]
        if found:
            differing[str([out, inputs])] = found
        for made in (residues, whole, whole.float().softmax(-1), F.silu(whole) * whole):
            digest.update(made.cpu().view(torch.uint8).numpy().tobytes())
    if device.type == "cpu":
        precise = torch.randn(ROWS, PRECISE, generator=torch.Generator().manual_seed(0))
        gram = torch.mm(precise.t(), precise)
        factor = [torch.linalg.cholesky(gram + ROWS * torch.eye(PRECISE))] if hessians else []
        for made in (gram, *factor):
            digest.update(made.numpy().tobytes())
    return Products(device_name(), digest.hexdigest()[:12], differing)
