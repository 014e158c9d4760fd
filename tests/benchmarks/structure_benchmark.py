"""Speed of the structure check and of the proof: interleaved rounds against a bare read of the same files, cold page cache.

    python -m tests.benchmarks.structure_benchmark [--directory DIR] [--gigabytes 2] [--rounds 5]

The checkpoint is a conversion of an FP8 source to NVFP4A16 (see convert_benchmark). `read` reads every byte past the page
cache with as many threads and as large reads as the check, and does nothing with them. All run in this process, which
has imported everything; ratios are of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from calibration.checkpoint.direct import Buffer, Bytes, digest
from calibration.checkpoint.index import Checkpoint
from calibration.plan.task import Task
from recipes.schema import Recipe
from tests.benchmarks import fp8_source
from tests.benchmarks.convert_benchmark import forget
from tests.benchmarks.convert_once import TARGET
from tests.converted import run
from tests.exported import plan_of
from verify.known import Known
from verify.proof.prove import prove
from verify.structure.stream import Judge, Piece, read_all
from verify.structure.structure import verify_structure


class Nothing(Judge):
    """Looks at nothing."""

    def look(self, piece: Piece, data: Bytes, other: Bytes | None) -> None:
        pass


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/structure-benchmark"))
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shutil.rmtree(options.directory, ignore_errors=True)
    source, output = options.directory / "source", options.directory / "output"
    # A block of the source is 0.504 GB and becomes 0.283 GB.
    fp8_source.write(source, max(round(options.gigabytes / 0.283), 1))
    quantize = {"QuantizationModifier": {"targets": [TARGET], "scheme": "NVFP4A16"}}
    recipe = Recipe.model_validate(
        {"source": {"checkpoint": str(source)}, "output": str(output), "method": "convert", "modifiers": [quantize]}
    )
    run(recipe)
    plan, formats = plan_of(source, recipe)
    shards = sorted(output.glob("*.safetensors"))
    crc = {shard.name: digest(shard, Buffer(8 * 2**20)) for shard in shards}
    sha = {shard.name: hashlib.file_digest(shard.open("rb"), "sha256").hexdigest() for shard in shards}
    methods: dict[str, Callable[[], object]] = {
        "read": lambda: read_all(Checkpoint.open(output), Nothing, {}, None, {}),
        "structure": lambda: verify_structure(output),
        "structure, plan": lambda: verify_structure(output, Known(plan, formats)),
        "structure, plan, CRC-32": lambda: verify_structure(output, Known(plan, formats, crc)),
        "structure, plan, SHA-256": lambda: verify_structure(output, Known(plan, formats, sha)),
        "proof, with digests of both": lambda: prove(output, Task(recipe, formats, plan)),
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, method in methods.items():
            forget(output)
            forget(source)
            wall, cpu = time.monotonic(), time.process_time()
            method()
            rounds[name].append((time.monotonic() - wall, time.process_time() - cpu))
    size = sum(shard.stat().st_size for shard in shards) / 1e9
    print(f"{size:.2f} GB in {len(shards)} shards, {options.rounds} rounds")
    print("| method | GB/s | CPU-s/GB | speed of read (median of rounds) |\n|---|---|---|---|")
    for name, times in rounds.items():
        ratio = statistics.median(bare[0] / taken[0] for bare, taken in zip(rounds["read"], times, strict=True))
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {size / wall:.2f} | {cpu / size:.3f} | {ratio:.2f} |")
    shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
