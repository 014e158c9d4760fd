"""This engine against stock llm-compressor's oneshot and save_pretrained, from the same weights and batches.

    python -m tests.benchmarks.engine_benchmark [--directory DIR] [--cases v4-bf16 v4-fp8_mxfp4 qwen3_moe] [--rounds 2]
    python -m tests.benchmarks.engine_benchmark --quick

Interleaved rounds, every run in a process of its own with one thread; CPU-seconds from the open source to the finished
checkpoint, imports left out. This engine also runs with fewer tokens for each expert (`calibration.experts`), where its input
scales are others than stock's. Of a source in FP8 and MXFP4 stock gets a BF16 copy with the same values, which
`method: plain` wrote beforehand: from the source itself it writes E4M3 codes where NVFP4 was asked for. Asserts that packed
weights, group scales, global scales and input global scales are identical (input global scales within three BF16 roundings where
products depend on the number of rows, calibration.runs.row_invariance), and prints peak memory per block over 6 and 24
blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.source_config import routed_experts
from calibration.families.family import Family
from calibration.families.registry import family_of
from calibration.runs.row_invariance import try_products
from tests.benchmarks.convert_benchmark import forget
from tests.models import deepseek_v4, standard
from tests.uneven import ROUNDED

LEAVES = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
#: Further modes of `calibration.experts`; without one, this engine calibrates on all tokens, as stock does.
MODES: dict[str, Any] = {"topped_up 64": {"topped_up": 64}, "routed": "routed"}
#: Ends the name of a case with as many experts as the released models have, 256 and 128, in smaller blocks and fewer of
#: them; batches are those of the recipes.
MANY = "-many"
CASES = ("v4-bf16", "v4-fp8_mxfp4", "qwen3_moe", "v4-bf16" + MANY, "qwen3_moe" + MANY)
TARGETS = {
    "v4": r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$",
    "qwen3_moe": r"re:^model\.layers\.\d+\..*_proj$",
}
MID = {"hidden": 1024, "moe_intermediate": 512, "experts": 64, "layers": 6, "heads": 8, "q_lora_rank": 256,
       "o_lora_rank": 128, "o_groups": 4}  # fmt: skip
#: Two sizes of block: their difference tells the constant from what grows with the block.
FLAT = {"mid": MID, "small": {"hidden": 512, "moe_intermediate": 256, "heads": 2, "o_lora_rank": 64}}
MANY_V4 = {"experts": 256, "moe_intermediate": 256, "layers": 2}
MANY_QWEN = {"experts": 128, "moe_intermediate": 384, "blocks": 3}
TINY = {"layers": 2, "o_lora_rank": 64}
MB = 1e6


def write_source(directory: Path, case: str, quick: bool) -> Path:
    """The source of a case: half a billion parameters or a sixth of one; with `quick` the smallest of its family."""
    many, case = case.endswith(MANY), case.removesuffix(MANY)
    if case == "qwen3_moe":
        form = standard.FORMS["qwen3_moe"]
        sizes = {"blocks": 4, "experts": 32, "moe_intermediate": 768} | (MANY_QWEN if many else {})
        extra = dict(form.extra) | {
            "moe_intermediate_size": sizes["moe_intermediate"],
            "num_experts": sizes["experts"],
            "num_experts_per_tok": 8,
        }
        mid = dataclasses.replace(form, hidden=512, extra=tuple(extra.items()), **sizes)
        with patch.dict(standard.FORMS, {} if quick else {"qwen3_moe": mid}):
            return standard.write(directory, "qwen3_moe")
    # No ragged tiles: transformers cuts 160 rows with 2 tile scales into 80 + 80, the format says 128 + 32.
    stored: Any = case.removeprefix("v4-")
    return deepseek_v4.write(directory, stored, **(TINY if quick else MID | (MANY_V4 if many else {})))


def write_recipe(base: Path, source: Path, case: str, data: dict[str, Any]) -> Path:
    """A recipe with input global scales per expert, as stock has them; `data` are keys of its calibration."""
    base.mkdir(parents=True, exist_ok=True)
    quantize = {"QuantizationModifier": {"targets": [TARGETS[case.partition("-")[0]]], "scheme": "NVFP4"}}
    body = {
        "source": {"checkpoint": str(source)},
        "output": str(base / "output"),
        "modifiers": [quantize],
        "calibration": {"dataset": "bundled"} | data,
        "export": {"kept": "plain", "input_global_scale": "per_expert", "mxfp4": "requantize"},
        "verify": {"structure": False, "fidelity": False},
    }
    path = base / "recipe.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def plain_copy(base: Path, source: Path, case: str) -> Path:
    """A copy in BF16 where the source is stored in another format, which stock cannot quantize to NVFP4."""
    if case != "v4-fp8_mxfp4":
        return source
    quiet = {"structure": False, "fidelity": False}
    body = {"source": {"checkpoint": str(source)}, "output": str(base / "plain"), "method": "plain", "verify": quiet}
    (base / "plain.yaml").write_text(yaml.safe_dump(body | {"export": {"kept": "plain"}}))
    subprocess.run([sys.executable, "-m", "workflows.run", str(base / "plain.yaml")], check=True, capture_output=True)
    return base / "plain"


def measure(method: str, recipe: Path) -> dict[str, Any]:
    """One run in a new process, the source dropped from the page cache."""
    content = yaml.safe_load(recipe.read_text())
    for old in (Path(content["output"]), Path(content["output"] + ".run")):
        shutil.rmtree(old, ignore_errors=True)
    forget(Path(content["source"]["checkpoint"]))
    command = [sys.executable, "-m", "tests.benchmarks.engine_once", method, str(recipe)]
    # Waiting threads of OpenMP would spin, and count as work.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{method}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(ours: Path, stock: Path) -> tuple[int, int]:
    """Asserts that every quantized tensor of `ours` is the same in `stock`; returns how many there are, and how many are
    not the same bits: input global scales at most three BF16 roundings away, where products here depend on the number of rows."""
    left, right = Checkpoint.open(ours), Checkpoint.open(stock)
    family = family_of(left.config)
    names = {_canonical(family, name): name for name in left.tensors if name.endswith(LEAVES)}
    theirs_by_name = {_canonical(family, name): name for name in right.tensors if name.endswith(LEAVES)}
    assert names and names.keys() == theirs_by_name.keys(), sorted(names.keys() ^ theirs_by_name.keys())[:4]
    even = try_products((out, 2 * packed) for out, packed in _packed_shapes(left)).row_invariant
    rounded = 0
    for canonical, name in names.items():
        mine, theirs = left.read(name), right.read(theirs_by_name[canonical])
        assert mine.dtype == theirs.dtype and mine.numel() == theirs.numel(), name
        same = torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
        may_round = not even and name.endswith(".input_global_scale")
        assert same or (may_round and abs(float(mine / theirs) - 1) <= ROUNDED), name
        rounded += not same
    return len(names), rounded


def _packed_shapes(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    return [tensor.shape for name, tensor in checkpoint.tensors.items() if name.endswith(".weight_packed")]


def _canonical(family: Family, name: str) -> str | None:
    """transformers' name of a quantized tensor, which stock's save_pretrained half renames: for DeepSeek-V4 it writes
    `model.layers.0.ffn.experts.0.wgate`, of the hub's `layers.0.ffn.experts.0.w1`."""
    if family.name != "deepseek_v4":
        return name
    return family.model_name(name.removeprefix("model.").replace(".wgate.", ".gate_proj."))


def block_bytes(source: Path) -> int:
    """BF16 bytes of the largest block."""
    checkpoint, totals = Checkpoint.open(source), dict[int | None, int]()
    formats, family = Formats(checkpoint), family_of(checkpoint.config)
    for name in checkpoint.tensors:
        if name not in formats.companions:
            block = family.place(name).block
            totals[block] = totals.get(block, 0) + 2 * torch.Size(formats.of(name).shape).numel()
    return max(size for block, size in totals.items() if block is not None)


def compare_engines(base: Path, case: str, rounds: int, samples: int, tokens: int, quick: bool) -> None:
    """Prints the rows of one case."""
    source, data = write_source(base / "source", case, quick), {"num_samples": samples, "max_seq_length": tokens}
    if case.endswith(MANY):
        data["batch_size"] = 4
    config = Checkpoint.open(source).config
    experts = f"{routed_experts(config)} experts, {config['num_experts_per_tok']} chosen"
    stock = write_recipe(base / "stock", plain_copy(base, source, case), case, data)
    recipes = {"ours": write_recipe(base / "ours", source, case, data), "stock": stock} | {
        f"ours, {name}": write_recipe(base / name, source, case, data | {"experts": mode})
        for name, mode in MODES.items()
    }
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in recipes}
    for _ in range(rounds):
        for method, recipe in recipes.items():
            runs[method].append(measure(method.partition(",")[0], recipe))
        compared, rounded = compare(base / "ours" / "output", base / "stock" / "output")
    block = block_bytes(source)
    cpu = {method: statistics.median(run["cpu_seconds"] for run in runs[method]) for method in runs}
    for method, found in runs.items():
        seconds = " ".join(f"{run['cpu_seconds']:.1f}" for run in found)
        peak = max(run["peak_above_base"] for run in found)
        written, files = max(run["written"] for run in found), max(run["files"] for run in found)
        disk = max(run["peak_disk"] for run in found)
        print(
            f"| {case}, {experts} | {method} | {seconds} | {cpu['stock'] / cpu[method]:.2f} | {peak / MB:.0f} | "
            f"{peak / block:.2f} | {written / MB:.0f} | {disk / MB:.0f} | {files} |",
            flush=True,
        )
    output = Checkpoint.open(base / "ours" / "output").total_bytes
    width = int(config["hidden_size"]) * int(config.get("hc_mult", 1))
    print(
        f"{case}: {compared - rounded} tensors identical, {rounded} within three BF16 roundings; block "
        f"{block / MB:.0f} MB in BF16, output {output / MB:.0f} MB, activations at a boundary "
        f"{2 * width * samples * tokens / MB:.0f} MB, of stock's CPU-seconds "
        f"{statistics.median(run['save_cpu_seconds'] for run in runs['stock']):.1f} in save_pretrained",
        flush=True,
    )


def flatness(base: Path, blocks: int, samples: int, tokens: int, sizes: dict[str, int]) -> None:
    """Prints peak memory above baseline of the second and the last block, in MB and in BF16 blocks."""
    source = deepseek_v4.write(base / "source", "fp8_mxfp4", **(sizes | {"layers": blocks}))
    run = measure("ours", write_recipe(base / "ours", source, "v4", {"num_samples": samples, "max_seq_length": tokens}))
    peaks, block = [peak - run["base"] for peak in run["block_peaks"]], block_bytes(source)
    assert len(peaks) == blocks
    print(
        f"| {blocks} | {block / MB:.1f} | {peaks[1] / MB:.0f} | {statistics.median(peaks) / MB:.0f} | {peaks[-1] / MB:.0f} | "
        f"{max(peaks) / MB:.0f} | {max(peaks) / block:.2f} | {run['cpu_seconds']:.1f} |",
        flush=True,
    )


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/engine-benchmark"))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, help="of V4, instead of 6: for a busy machine")
    parser.add_argument("--flat-blocks", type=int, nargs="*", default=[6, 24])
    parser.add_argument("--flat-sizes", nargs="*", choices=sorted(FLAT), default=sorted(FLAT))
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: whether it runs at all")
    options = parser.parse_args()
    if options.blocks:
        MID["layers"] = options.blocks
    rounds, samples, tokens = options.rounds, options.samples, options.tokens
    if options.quick:
        rounds, samples, tokens, options.flat_blocks = 1, 2, 64, [2]
    shutil.rmtree(options.directory, ignore_errors=True)
    if options.cases:
        print("| case | engine | CPU-s per round | speed | peak MB | peak in blocks | written MB | disk MB | files |")
        print("|---|---|---|---|---|---|---|---|---|")
    for case in options.cases:
        compare_engines(options.directory / case, case, rounds, samples, tokens, options.quick)
        shutil.rmtree(options.directory / case)
    if options.flat_blocks:
        print(
            "| blocks | block MB | second block MB | median MB | last MB | peak MB | peak in blocks | CPU-s |\n"
            "|---|---|---|---|---|---|---|---|"
        )
    for blocks in options.flat_blocks:
        for size in options.flat_sizes:
            flatness(options.directory / f"flat-{blocks}", blocks, 4, 128, TINY if options.quick else FLAT[size])
            shutil.rmtree(options.directory / f"flat-{blocks}")


if __name__ == "__main__":
    main()
