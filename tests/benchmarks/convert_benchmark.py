"""Conversion speed: interleaved rounds of this pipeline, its input and output alone, the original script and llm-compressor.

    python -m tests.benchmarks.convert_benchmark [--directory DIR] [--gigabytes 0.5 2 8] [--rounds 3] [--slow-rounds 1]
    python -m tests.benchmarks.convert_benchmark --stored fp8 bf16 --scheme NVFP4A16 NVFP4 --slow-rounds 0

The slow methods run on half a gigabyte only. Every method runs in a process of its own with the source dropped from the
page cache; CPU-seconds are those of the conversion, imports left out. Asserts that every round of the pipeline gives
the same bytes, that the torch fallback gives them too, and that one expert equals compressed-tensors' quantize and pack.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from calibration.checkpoint import native
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.header import read_header
from calibration.checkpoint.index import Checkpoint
from tests.benchmarks import fp8_source
from tests.benchmarks.convert_once import pipeline
from tests.reference.compressed_tensors import of_compressed_tensors

FAST, SLOW = ("pipeline", "input_output_alone"), ("original", "model_free_ptq")
_GB = 1e9
#: GB of a block of the source by how its experts are stored.
BLOCK_GB = {"fp8": 0.504, "bf16": 1.008}


def forget(directory: Path) -> None:
    """Drops the files of `directory` from the page cache, after writing back what is dirty."""
    for path in directory.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def measure(method: str, source: Path, output: Path) -> dict[str, float]:
    """Runs one method in a process of its own; seconds, cpu_seconds, peak_memory (bytes)."""
    forget(source)
    command = [sys.executable, "-m", "tests.benchmarks.convert_once", method, str(source), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def digest(output: Path) -> str:
    """sha256 over every shard."""
    total = hashlib.sha256()
    for path in sorted(output.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def check_bytes(source: Path, output: Path) -> None:
    """One expert against compressed-tensors, and the whole output against the torch fallback."""
    formats = Formats(Checkpoint.open(source))
    shards = sorted(output.glob("*.safetensors"))
    expert = "layers.0.ffn.experts.3"
    shard = next(shard for shard in shards if f"{expert}.w1.weight_packed" in read_header(shard))
    with safe_open(shard, framework="pt") as file:
        for name in (f"{expert}.w1", f"{expert}.w2", f"{expert}.w3"):
            weight = formats.read(f"{name}.weight", torch.float32)
            packed, scales, _ = of_compressed_tensors(weight, file.get_tensor(f"{name}.weight_global_scale"))
            assert torch.equal(file.get_tensor(f"{name}.weight_packed"), packed), name
            assert torch.equal(file.get_tensor(f"{name}.weight_scale").view(torch.uint8), scales), name
    fallback = output.with_name("fallback")
    shutil.rmtree(fallback, ignore_errors=True)
    shutil.rmtree(fallback.with_name("fallback.run"), ignore_errors=True)
    with native.use("torch"):
        pipeline(source, fallback)
    assert digest(fallback) == digest(output)
    shutil.rmtree(fallback)


def row(gigabytes: float, method: str, rounds: list[dict[str, Any]]) -> str:
    """One line of the table: medians of wall and CPU-seconds a GB of source, largest memory."""
    wall = statistics.median(r["seconds"] for r in rounds)
    cpu = statistics.median(r["cpu_seconds"] for r in rounds)
    peak = max(r["peak_memory"] for r in rounds)
    return (
        f"| {gigabytes:.2f} | {method} | {len(rounds)} | {wall:.2f} | {cpu:.2f} | {cpu / gigabytes:.3f} | "
        f"{gigabytes / wall:.3f} | {peak / _GB:.2f} |"
    )


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 2.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1)
    parser.add_argument("--stored", choices=BLOCK_GB, nargs="+", default=["fp8"], help="the source's experts")
    parser.add_argument("--scheme", choices=["NVFP4A16", "NVFP4"], nargs="+", default=["NVFP4A16"])
    options = parser.parse_args()
    print(
        "| source | GB | method | rounds | wall s | CPU-s | CPU-s/GB | GB/s | peak GB |\n|---|---|---|---|---|---|---|---|---|"
    )
    relative = []
    for stored, scheme in itertools.product(options.stored, options.scheme):
        os.environ["SCHEME"] = scheme
        relative += compare(options, stored, f"{stored} to {scheme}")
    print("\nSpeed relative to input and output alone, median of the rounds:", *relative, sep="\n")


def compare(options: argparse.Namespace, stored: str, name: str) -> list[str]:
    """Prints the rows of one kind of source and scheme; returns the lines of speed relative to input and output alone."""
    relative = []
    for number, wanted in enumerate(sorted(options.gigabytes)):
        base = options.directory / f"{wanted:g}"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        source = fp8_source.write(base / "source", max(round(wanted / BLOCK_GB[stored]), 1), stored=stored)
        size = Checkpoint.open(source).total_bytes / _GB
        results: dict[str, list[dict[str, Any]]] = {}
        digests = set()
        for turn in range(options.rounds):
            slow = SLOW if number == 0 and turn < options.slow_rounds else ()
            for method in (*FAST[:: -1 if turn % 2 else 1], *slow):
                results.setdefault(method, []).append(measure(method, source, base / method))
            digests.add(digest(base / "pipeline"))
        assert len(digests) == 1, "rounds differ"
        if number == 0:
            check_bytes(source, base / "pipeline")
        for method, rounds in results.items():
            print(f"| {name} {row(size, method, rounds)}", flush=True)
        ratios = sorted(
            alone["seconds"] / whole["seconds"] for whole, alone in zip(results[FAST[0]], results[FAST[1]], strict=True)
        )
        median = statistics.median(ratios)
        relative.append(f"{name}, {size:.2f} GB: {median:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        shutil.rmtree(base)
    return relative


if __name__ == "__main__":
    main()
