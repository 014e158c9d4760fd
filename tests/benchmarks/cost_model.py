"""What calibrating DeepSeek-V4-Flash and V4-Pro must take: operations, bytes and their floors in time. Computed from
the models' dimensions with the formulas of `calibration.forecast.cost`; nothing is run or measured here. See docs/cost-model.md.

    python -m tests.benchmarks.cost_model [--samples 512] [--tokens 2048] [--teraflops 600] [--read 6] [--write 3]
    python -m tests.benchmarks.cost_model --terms [--gpus 8] [--teraflops 1100]

`--terms` lists V4-Pro's terms, each with its amount, its rate, and whether the rate was measured or is assumed.
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


#: CPU-seconds a GB of SHA-256, and before the first forward pass of V4-Pro (docs/measurements.md, docs/cost-model.md).
SHA256, START = 0.602, 16.6


def operations(sizes: Sizes, tokens: int, everything: bool, shown: float = 1.0) -> tuple[float, float]:
    """Operations per token, the mean over the blocks, in routed and shared experts and in the rest, for samples of
    `tokens`; see `calibration.forecast.cost`."""
    settings = config(sizes, "fp8_mxfp4")
    family = family_of(settings)
    shapes = {spec.name: spec.shape for spec in specs(sizes)}
    experts = {name: shape for name, shape in shapes.items() if family.place(name).part in (ROUTED, SHARED)}
    both = [
        sum(
            BlockCost(block, made).operations(tokens)
            for block, made in products(family, part, settings, everything, shown).items()
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


def terms(given: argparse.Namespace) -> None:
    """Prints V4-Pro's terms on `given.gpus` GPUs as rows of a table."""
    sizes, count, gpus = ProSizes(), given.samples * given.tokens, given.gpus
    blocks, rate = sizes.layers, given.teraflops * 1e12
    boundary = boundary_bytes(hidden_width(config(sizes, "fp8_mxfp4")), [(1, given.tokens)] * given.samples)
    source, output, moved = source_bytes(sizes), output_bytes(sizes), blocks * boundary
    values = BF16 * blocks * sizes.hidden * sizes.moe_intermediate * 3 * (sizes.experts + 1)
    rows: list[tuple[str, float, str, str]] = [
        ("plan, empty model, trace", START, "V4-Pro's headers, one thread", "measured on a CPU"),
        *(
            (f"products, experts: {name}", count * blocks * sum(operations(sizes, given.tokens, False, shown)) / rate / gpus,
             f"{count * blocks * sum(operations(sizes, given.tokens, False, shown)) / 1e18:.2f} EFLOP on {gpus} GPUs at "
             f"{given.teraflops:.0f} TFLOP/s each", "operations counted, rate assumed")
            for name, shown in (("all", 1.0), ("topped_up 64", 64 / count))
        ),
        ("source from the disk, once", source / given.read / 1e9, f"{source / 1e9:.0f} GB at {given.read:g} GB/s, shared",
         "bytes measured on headers, rate assumed"),
        ("source to every GPU", source / given.link / 1e9, f"{source / 1e9:.0f} GB at {given.link:g} GB/s each", "rate assumed"),
        ("dequantized on every GPU", values / given.memory / 1e9, f"{values / 1e12:.2f} TB of BF16 written at "
         f"{given.memory:g} GB/s", "rate assumed"),
        ("activations, written and read", moved / given.write / 1e9 + moved / given.read / 1e9,
         f"{2 * moved / 1e12:.2f} TB at {given.write:g} and {given.read:g} GB/s, shared", "rate assumed"),
        ("SHA-256 of activations", moved / 1e9 * SHA256 / gpus, f"{moved / 1e12:.2f} TB on {gpus} threads", "measured on a CPU"),
        ("SHA-256 of the output, rank 0", output / 1e9 * SHA256, f"{output / 1e9:.0f} GB", "measured on a CPU"),
        ("output to the disk, rank 0", output / given.write / 1e9, f"{output / 1e9:.0f} GB at {given.write:g} GB/s",
         "rate assumed"),
    ]  # fmt: skip
    print("| term | seconds | of | how known |\n|---|---|---|---|")
    for name, seconds, amount, known in rows:
        print(f"| {name} | {seconds:,.0f} | {amount} | {known} |")
    for mode in ("all", "topped_up 64"):
        total = sum(
            seconds for name, seconds, _, _ in rows if not name.startswith("products") or name.endswith(f": {mode}")
        )
        print(f"| in turn, experts: {mode} | {total:,.0f} | {total / HOURS:.2f} h | |")


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--teraflops", type=float, default=600, help="sustained BF16 per GPU")
    parser.add_argument("--read", type=float, default=6, help="GB/s of the disk")
    parser.add_argument("--write", type=float, default=3, help="GB/s of the disk")
    parser.add_argument("--terms", action="store_true", help="V4-Pro's terms, one by one")
    parser.add_argument("--gpus", type=int, default=8, help="of --terms")
    parser.add_argument("--link", type=float, default=50, help="GB/s from the host to a GPU, of --terms")
    parser.add_argument("--memory", type=float, default=5000, help="GB/s of a GPU's memory, of --terms")
    given = parser.parse_args()
    if given.terms:
        terms(given)
        return
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
