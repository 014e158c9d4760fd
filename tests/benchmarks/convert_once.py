"""One conversion in a process of its own; prints what it took as JSON. See convert_benchmark.py.

python -m tests.benchmarks.convert_once METHOD SOURCE OUTPUT
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from calibration.checkpoint.direct import Bytes, Extent
from calibration.convert.layout import Job
from calibration.convert.pipeline import convert
from calibration.convert.work import Totals, Work
from calibration.plan.task import Task
from calibration.runs.journal import RunDirectory
from recipes.schema import Recipe

EXPERTS = r"^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"
TARGET = f"re:{EXPERTS}"


def pipeline(source: Path, output: Path) -> None:
    """This project's conversion to NVFP4A16, or to the scheme that the environment names in SCHEME."""
    scheme = os.environ.get("SCHEME", "NVFP4A16")
    quantize = {"QuantizationModifier": {"targets": [TARGET], "scheme": scheme}}
    recipe = Recipe.model_validate(
        {"source": {"checkpoint": str(source)}, "output": str(output), "method": "convert", "modifiers": [quantize]}
    )
    directory = RunDirectory(output).open()
    convert(Task.open(recipe, source), directory)
    directory.close()


def input_output_alone(source: Path, output: Path) -> None:
    """The same pipeline, files and buffers with the compute and the digest left out."""

    def nothing(self: Work, job: Job, data: dict[Extent, Bytes], room: Bytes | None) -> Totals:
        return Totals()

    Work.do = nothing  # type: ignore[method-assign]
    zlib.crc32 = lambda data, value=0: 0  # type: ignore[assignment]
    pipeline(source, output)


def original(source: Path, output: Path) -> None:
    """The algorithm of the project's first script, from reference/conversion.md: float32 dequantization, one global
    scale per tensor, searchsorted on midpoints, whole shards in memory; right only so far that it runs."""
    output.mkdir(parents=True)
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    for shard in sorted(source.glob("*.safetensors")):
        written: dict[str, torch.Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not re.search(EXPERTS, name.removesuffix(".weight")):
                    continue
                weight = file.get_tensor(name).to(torch.float32)
                scale = file.get_tensor(name.replace(".weight", ".weight_scale_inv"))
                rows, columns = weight.shape
                height, width = -(-rows // scale.shape[0]), -(-columns // scale.shape[1])
                expanded = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
                weight = weight * expanded
                global_scale = 448.0 * 6.0 / weight.abs().max()
                groups = weight.reshape(rows, -1, 16)
                group_scale = (groups.abs().amax(-1) / 6.0 * global_scale).to(torch.float8_e4m3fn)
                effective = group_scale.to(torch.float32) / global_scale
                scaled = (groups / effective.unsqueeze(-1)).reshape(rows, columns)
                codes = torch.searchsorted(midpoints, scaled.abs()).to(torch.uint8)
                codes |= (scaled < 0).to(torch.uint8) << 3
                module = name.removesuffix(".weight")
                written[f"{module}.weight_packed"] = codes[:, 0::2] | (codes[:, 1::2] << 4)
                written[f"{module}.weight_scale"] = group_scale
                written[f"{module}.weight_global_scale"] = global_scale.reshape(1)
        save_file(written, output / shard.name)


def model_free_ptq(source: Path, output: Path) -> None:
    """llm-compressor's model_free_ptq to NVFP4A16, FP8 tiles undone by compressed-tensors' own converter."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
    from llmcompressor import model_free_ptq as convert_model_free

    convert_model_free(
        str(source), str(output), scheme="NVFP4A16", ignore=[f"re:^(?!{EXPERTS[1:]})"], max_workers=2,
        converter=FP8BlockDequantizer(targets=[TARGET]),
    )  # fmt: skip


METHODS: dict[str, Callable[[Path, Path], None]] = {
    "pipeline": pipeline,
    "input_output_alone": input_output_alone,
    "original": original,
    "model_free_ptq": model_free_ptq,
}


def main(method: str, source: Path, output: Path) -> None:
    """Runs one method and prints seconds, CPU-seconds of its threads and children, and the largest memory in bytes."""
    torch.set_num_threads(2)
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name(output.name + ".run"), ignore_errors=True)
    os.sync()  # freed blocks are discarded with the next commit: not in the time of what is measured
    wall, cpu = time.monotonic(), time.process_time()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    METHODS[method](source, output)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu += after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    # Not ru_maxrss: that one begins at the memory of the process that forked this one.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "peak_memory": peak}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
