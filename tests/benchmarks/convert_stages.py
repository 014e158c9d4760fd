"""Where the CPU-seconds of a conversion go: every stage, under every variant of the kernels, and the kernels alone in memory.

    python -m tests.benchmarks.convert_stages [--directory DIR] [--gigabytes 1] [--rounds 3] [--levels avx512 avx2 ...]

For a machine that is slower than others: one run names the stage, and whether it computes, moves memory or waits for the
kernel (minor faults, system time). Rounds of the variants alternate, each in a process of its own, on the source of
`convert_benchmark`; medians. A stage is what its own functions take, without the stages that they call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.utils import patch_attr

from calibration.checkpoint import direct, kernels, native
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.nvfp4 import RANGE
from calibration.convert import work
from tests.benchmarks import fp8_source
from tests.benchmarks.convert_benchmark import forget
from tests.benchmarks.convert_once import pipeline

#: Stage -> the functions it consists of (owner, name); the C functions are stages of their own.
STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "read (preadv, past the page cache)": ((direct.DirectReader, "read"),),
    "scales of tiles (to float32, checked)": ((work.Work, "_stripe"), (kernels, "check_scales")),
    "maxima, outside C": ((kernels, "amax"),),
    "dequantize, by torch": ((kernels, "_values"),),
    "quantize and pack, outside C": ((kernels, "quantize"),),
    "constants, and what is left of a job": ((work.Work, "do"),),
    "CRC-32 (zlib)": ((zlib, "crc32"),),
    "reserve the file (fallocate)": ((direct.DirectWriter, "__init__"),),
    "write (pwrite, past the page cache)": ((direct.DirectWriter, "append"),),
    "make it durable (fsync, rename)": ((direct.DirectWriter, "finish"),),
}
REST = "threads, plan, journal"
_GB, _MIB = 1e9, 2**20


class Stages:
    """CPU-seconds, seconds and minor page faults of each stage, from any number of threads."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self._lock, self._local = threading.Lock(), threading.local()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside belongs to `name`, but for stages inside it."""
        inner: list[list[float]] = self._local.__dict__.setdefault("stack", [])
        inner.append([0.0, 0.0, 0.0])
        begun = _now()
        try:
            yield
        finally:
            whole = [after - before for after, before in zip(_now(), begun, strict=True)]
            own = [all_ - nested for all_, nested in zip(whole, inner.pop(), strict=True)]
            with self._lock:
                self.taken[name] = [a + b for a, b in zip(self.taken[name], own, strict=True)]
            if inner:
                inner[-1] = [a + b for a, b in zip(inner[-1], whole, strict=True)]

    def timed(self, function: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        """`function` as a stage, by its first argument if no name is given."""

        def inside(*arguments: Any, **options: Any) -> Any:
            with self.stage(name or f"C: {arguments[0]}"):
                return function(*arguments, **options)

        return inside


def _now() -> tuple[float, float, float]:
    """CPU-seconds of this thread, the clock, minor faults of this thread."""
    return time.thread_time(), time.monotonic(), resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def once(level: str, source: Path, output: Path) -> dict[str, Any]:
    """One conversion in this process with the kernels of `level`: `stages` (CPU-seconds, seconds, faults) and the whole."""
    from contextlib import ExitStack

    torch.set_num_threads(1)
    for directory in (output, output.with_name(output.name + ".run")):
        shutil.rmtree(directory, ignore_errors=True)
    os.sync()
    stages = Stages()
    with ExitStack() as stack:
        stack.enter_context(native.use(level))
        for name, functions in STAGES.items():
            for owner, function in functions:
                stack.enter_context(patch_attr(owner, function, stages.timed(getattr(owner, function), name)))
        stack.enter_context(patch_attr(native, "call", stages.timed(native.call)))
        before, clock = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        pipeline(source, output)
        seconds, after = time.monotonic() - clock, resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    known = [sum(column) for column in zip(*stages.taken.values(), strict=True)]
    stages.taken[REST] = [user + system - known[0], 0.0, faults - known[2]]
    whole = {"seconds": seconds, "user": user, "system": system, "faults": faults}
    return {"stages": dict(stages.taken), "whole": whole}


def machine() -> list[str]:
    """What a reader of the tables must know of the machine; costs in units that compare machines, not programs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    wanted = ("avx2", "avx512bw", "avx512_vbmi", "avx512_bf16", "amx_tile", "hypervisor")
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    here = [
        f"{facts.get('model name', platform.processor())}, {os.cpu_count()} CPUs, {facts.get('cpu MHz', '?')} MHz, caches "
        f"{' '.join(path.read_text().strip() for path in caches)}; {' '.join(w for w in wanted if w in flags)}",
        f"Linux {platform.release()}, zlib {zlib.ZLIB_RUNTIME_VERSION}, load average {os.getloadavg()[0]:.1f}, levels "
        f"{' '.join(native.levels())}, bugs worked around: {facts.get('bugs', '?')}",
    ]
    data = np.random.default_rng(0).integers(0, 256, 64 * _MIB, np.uint8)
    target = np.zeros_like(data)
    crc = _cpu(lambda: zlib.crc32(data.data)) / data.size * _GB
    copied = _cpu(lambda: np.copyto(target, data)) / data.size * _GB
    touched = _cpu(lambda: np.ones(data.size, np.uint8)) - _cpu(lambda: target.fill(1))
    call = _cpu(lambda: [os.getppid() for _ in range(100_000)]) / 100_000 * 1e9
    return [
        *here,
        f"CPU-s/GB: CRC-32 {crc:.3f}, copy in memory {copied:.3f}, first touch {touched / data.size * _GB:.3f}; "
        f"a system call {call:.0f} ns",
    ]


def _cpu(function: Callable[[], object], times: int = 5) -> float:
    """CPU-seconds of one call, the least of several."""
    taken = []
    for _ in range(times + 1):
        begun = time.thread_time()
        function()
        taken.append(time.thread_time() - begun)
    return min(taken[1:])


def kernels_alone(levels: list[str]) -> list[str]:
    """A table of CPU-s per 10^9 weights of each C function: 2^17 weights (in the cache) / 2^25 (in memory)."""
    names: dict[str, list[str]] = defaultdict(list)
    for level in levels:
        with native.use(level):
            cells: dict[str, list[str]] = defaultdict(list)
            for columns, rows in ((1024, 128), (4096, 8192)):
                for name, taken in _kernels_once(rows, columns).items():
                    cells[name].append(f"{taken:.3f}")
        for name, pair in cells.items():
            names[name].append(" / ".join(pair))
    head = ["| CPU-s per 10^9 weights, cache / memory | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
    return [*head, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in names.items())]


def _kernels_once(rows: int, columns: int) -> dict[str, float]:
    weights, groups, tile = rows * columns, rows * columns // 16, 128
    values = torch.randn(weights, generator=torch.Generator().manual_seed(0)) * 0.02
    e4m3 = (values * 1000).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    plain = values.to(torch.bfloat16).view(torch.int16).numpy()
    grid = np.full((rows // tile, columns // tile), 1e-3, np.float32)
    maxima, alike, row = np.empty(groups, np.uint8), np.full(groups, 0x70, np.uint8), np.empty(columns // 16, np.uint8)
    packed, scales, largest = np.zeros(weights // 2, np.uint8), np.zeros(groups, np.uint8), RANGE / 0.12
    bf16 = native.FLOATS["BF16"]

    def fp8_quantize(of: np.ndarray[Any, Any]) -> object:
        return native.call("fp8_quantize", e4m3.ctypes.data, rows, columns, of.ctypes.data, grid.ctypes.data, tile, tile,
                           largest, packed.ctypes.data, scales.ctypes.data)  # fmt: skip

    made = {
        "fp8_maxima": lambda: native.call("fp8_maxima", e4m3.ctypes.data, groups, maxima.ctypes.data),
        "fp8_amax": lambda: native.call(
            "fp8_amax", maxima.ctypes.data, rows, columns // 16, grid.ctypes.data, tile, tile // 16, row.ctypes.data
        ),
        "fp8_quantize (dequantize, scale, pack)": lambda: fp8_quantize(maxima),
        "fp8_quantize, one maximum a tile (without its thresholds)": lambda: fp8_quantize(alike),
        "float_amax, BF16": lambda: native.call("float_amax", bf16, plain.ctypes.data, weights),
        "float_quantize, BF16": lambda: native.call(
            "float_quantize", bf16, plain.ctypes.data, groups, largest, packed.ctypes.data, scales.ctypes.data
        ),
        "mxfp4_maxima": lambda: native.call("mxfp4_maxima", e4m3.ctypes.data, weights // 32, maxima.ctypes.data),
    }
    return {name: _cpu(function) / weights * 1e9 for name, function in made.items()}


def table(results: dict[str, list[dict[str, Any]]], gigabytes: float) -> list[str]:
    """CPU-s a GB of source by stage, one column a level; in brackets what the clock says, where it is more than twice that."""

    def median(level: str, *keys: Any) -> float:
        taken = []
        for found in results[level]:
            for key in keys:
                found = found.get(key, [0.0] * 3) if isinstance(found, dict) else found[key]
            taken.append(found)
        return float(statistics.median(taken)) / gigabytes

    def cell(level: str, name: str) -> str:
        cpu, wall, faults = (median(level, "stages", name, number) for number in range(3))
        waits = f" ({wall:.3f})" if wall > max(2 * cpu, 0.01) else ""
        return f"{cpu:.3f}{waits}" + (f", {faults / 1000:.0f}k faults" if faults >= 1000 else "")

    found = {name for rounds in results.values() for once_ in rounds for name in once_["stages"]}
    order = [*STAGES, REST]
    order[2:2] = sorted(found - {*order})
    lines = ["| CPU-s/GB (clock) | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(cell(level, name) for level in results) + " |" for name in order if name in found
    ]
    for name, keys in {
        "**all**": ("user", "system"),
        "of it in the system": ("system",),
        "clock": ("seconds",),
    }.items():
        cells = (f"{sum(median(level, 'whole', key) for key in keys):.3f}" for level in results)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/benchmark"))
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3, help="of the C variants; torch, far slower, takes one")
    parser.add_argument("--levels", nargs="+", choices=native.levels(), default=[*native.levels()][::-1])
    parser.add_argument(
        "--once", nargs=3, metavar=("LEVEL", "SOURCE", "OUTPUT"), help="one round in this process: JSON"
    )
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options.once[0], *map(Path, options.once[1:]))))
        return
    print(*machine(), "", sep="\n")
    base = options.directory / "stages"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    source = fp8_source.write(base / "source", max(round(options.gigabytes / 0.504), 1))
    results: dict[str, list[dict[str, Any]]] = {level: [] for level in options.levels}
    for turn in range(options.rounds):
        for level in options.levels[:: -1 if turn % 2 else 1]:
            if level != "torch" or turn == 0:
                forget(source)
                command = [sys.executable, "-m", __spec__.name, "--once", level, str(source), str(base / "output")]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[level].append(json.loads(done.stdout.splitlines()[-1]))
    print(*table(results, Checkpoint.open(source).total_bytes / _GB), "", sep="\n")
    print(*kernels_alone([level for level in options.levels if level in native.LEVELS]), sep="\n")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
