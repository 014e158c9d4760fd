"""What calibrating DeepSeek-V4-Flash and V4-Pro must take: operations, bytes and their floors in time. Computed from
the models' dimensions with the formulas of `calibration.forecast.cost`; nothing is run or measured here. See docs/cost-model.md.

    python -m tests.benchmarks.cost_model [--samples 512] [--tokens 2048] [--teraflops 600] [--read 6] [--write 3]
"""

from __future__ import annotations

import argparse
import math

from calibration.families.family import ROUTED, SHARED
from calibration.families.registry import family_of
from calibration.forecast.cost import BF16, BlockCost, attention, boundary_bytes, hidden_width, products
from tests.models.deepseek_v4 import Sizes, config, entries, specs
from tests.models.headers_only import FlashSizes, ProSizes

NVFP4_BYTES = 0.5 + 1 / 16
HOURS = 3600


def operations(sizes: Sizes, tokens: int, everything: bool) -> tuple[float, float]:
    """Operations per token, the mean over the blocks, in routed and shared experts and in the rest, for samples of
    `tokens`; see `calibration.forecast.cost`."""
    settings = config(sizes, "fp8_mxfp4")
    family = family_of(settings)
    shapes = {spec.name: spec.shape for spec in specs(sizes)}
    experts = {name: shape for name, shape in shapes.items() if family.place(name).part in (ROUTED, SHARED)}
    both = [
        sum(
            BlockCost(block, made).operations(tokens)
            for block, made in products(family, part, settings, everything).items()
        )
        for part in (experts, {name: shape for name, shape in shapes.items() if name not in experts})
    ]
    return both[0] / sizes.layers, both[1] / sizes.layers + BlockCost(0, attention=attention(settings)).operations(
        tokens
    )


def source_bytes(sizes: Sizes) -> int:
    """Bytes of the FP8 + MXFP4 source."""
    return sum(entry.nbytes for spec in specs(sizes) for entry in entries(spec, "fp8_mxfp4"))


def output_bytes(sizes: Sizes) -> float:
    """Bytes of the output: experts in NVFP4 but for MTP, all other tensors as they are."""
    total = 0.0
    for spec in specs(sizes):
        if spec.name.startswith("layers.") and (".ffn.experts." in spec.name or ".shared_experts." in spec.name):
            total += math.prod(spec.shape) * NVFP4_BYTES + 8
        else:
            total += sum(entry.nbytes for entry in entries(spec, "fp8_mxfp4"))
    return total


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--teraflops", type=float, default=600, help="sustained BF16 per GPU")
    parser.add_argument("--read", type=float, default=6, help="GB/s of the disk")
    parser.add_argument("--write", type=float, default=3, help="GB/s of the disk")
    given = parser.parse_args()
    count, read, write = given.samples * given.tokens, given.read * 1e9, given.write * 1e9
    models: dict[str, Sizes] = {"Flash": FlashSizes(), "Pro": ProSizes()}
    for name, sizes in models.items():
        blocks = sizes.layers
        (experts, other), (all_experts, _) = (
            operations(sizes, given.tokens, everything) for everything in (False, True)
        )
        ours, stock = count * blocks * (experts + other), 2 * count * blocks * (all_experts + other)
        width = hidden_width(config(sizes, "fp8_mxfp4"))
        boundary = boundary_bytes(width, [(1, given.tokens)] * given.samples)
        block = BF16 * sizes.hidden * sizes.moe_intermediate * 3 * (sizes.experts + 1)
        source, output = source_bytes(sizes), output_bytes(sizes)
        weights_io, activations_io = source / read + output / write, blocks * boundary * (1 / read + 1 / write)
        print(f"V4-{name}: {experts / 1e9:.1f} GFLOP per token and block in experts (stock "
              f"{all_experts / 1e9:.1f}, twice), {other / 1e9:.2f} in the rest")  # fmt: skip
        print(f"  operations: {ours / 1e18:.2f} EFLOP, stock {stock / 1e18:.2f}")
        print(f"  bytes: source {source / 1e9:.0f} GB, output {output / 1e9:.0f} GB, BF16 block {block / 1e9:.1f} GB, "
              f"activations {boundary / 1e9:.1f} GB a boundary, {2 * blocks * boundary / 1e12:.2f} TB in all")  # fmt: skip
        for gpus in (1, 8):
            compute = ours / (given.teraflops * 1e12 * gpus)
            parts = {"compute": compute, "weights": weights_io, "activations": activations_io}
            told = ", ".join(f"{part} {seconds / HOURS:.2f} h" for part, seconds in parts.items())
            print(f"  {gpus} GPU: {told}; overlapped {max(compute, weights_io + activations_io) / HOURS:.2f} h, "
                  f"one after the other {sum(parts.values()) / HOURS:.2f} h; "
                  f"stock's compute {stock / (given.teraflops * 1e12 * gpus) / HOURS:.2f} h")  # fmt: skip


if __name__ == "__main__":
    main()
