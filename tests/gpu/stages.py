"""Everything that a GPU is wanted for, in stages with a limit each; every stage writes its figures at once.

    python -m tests.gpu.stages OUT [--work DIR] [--device cuda|cpu] [--size full|tiny] [--only STAGE ...] [--budget 570]

OUT/STAGE.json holds `ok`, `seconds`, `facts` and, after a failure, the end of the error. A stage runs in a process of its own and
is ended at its limit; what the budget has no room for is `left out`. On a CPU with `--size tiny` it shows that the stages run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Seconds that each stage may take on the machine it is made for, in the order in which they run.
LIMITS = {"card": 60, "tests": 150, "convert": 120, "products": 90, "bytes": 150, "qwen3_moe": 200, "v4": 280}
#: Sizes of the models, of the batches and of the products.
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "copy": 4 << 30, "product": 8192, "blocks": 16, "samples": 64, "tokens": 2048, "batch": 8, "small": (4, 512),
        "experts": {"experts": 64, "hidden": 7168, "width": 3072, "top": 6, "tokens": 16384},
        "v4": {"hidden": 2048, "moe_intermediate": 1024, "experts": 64, "layers": 5, "heads": 16, "q_lora_rank": 512,
               "o_lora_rank": 256, "o_groups": 4},
        "qwen3_moe": {"blocks": 8, "hidden": 2048, "experts": 64, "moe_intermediate": 768, "top": 8},
    },
    "tiny": {
        "copy": 1 << 20, "product": 64, "blocks": 1, "samples": 2, "tokens": 32, "batch": 1, "small": (2, 32),
        "experts": {"experts": 4, "hidden": 64, "width": 32, "top": 2, "tokens": 48},
        "v4": {"layers": 2, "o_lora_rank": 64, "experts": 8},
        "qwen3_moe": {"blocks": 2, "hidden": 64, "experts": 8, "moe_intermediate": 32, "top": 2},
    },
}  # fmt: skip
#: Runs of this engine beside stock: name -> keys of the calibration, whether experts are computed one by one.
RUNS: dict[str, tuple[dict[str, Any], bool]] = {
    "all": ({}, False),
    "all, one by one": ({}, True),
    "topped_up 64": ({"experts": {"topped_up": 64}}, False),
    "stock": ({}, False),
}
#: Seconds below which no stage is started.
LEAST = 5.0
Facts = dict[str, Any]


class Context:
    """What a stage is given: the device, sizes, a folder for work, and a place for figures that a kill must not lose."""

    def __init__(self, device: str, size: str, work: Path, file: Path) -> None:
        self.device, self.size, self.work, self.file = device, SIZES[size], work, file
        self.tiny, self.facts = size == "tiny", Facts()

    def add(self, **facts: Any) -> None:
        """Keeps figures, on disk at once."""
        self.facts |= facts
        write(self.file, {"ok": False, "facts": self.facts, "error": "ended before its end"})


def write(file: Path, content: Any) -> None:
    """JSON, complete or not there."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(file)


def timed(call: Callable[[], object], device: str, rounds: int = 10) -> float:
    """Median seconds of a call, after three that are not counted."""
    import torch

    found = []
    for _ in range(rounds + 3):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[3:])


def card(context: Context) -> None:
    """What the card and the machine do at best: the rates that other stages are measured against."""
    import torch

    device, size = context.device, context.size
    context.add(torch=torch.__version__, cpus=os.cpu_count())
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        context.add(card=facts.name, bytes=facts.total_memory, cuda=torch.version.cuda)
    left, right = torch.randn(2, size["product"], size["product"], device=device).to(torch.bfloat16)
    context.add(product_tflops=2 * size["product"] ** 3 / timed(lambda: left @ right, device) / 1e12)
    source = torch.empty(size["copy"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    context.add(copy_gb_per_s=2 * size["copy"] / timed(lambda: target.copy_(source), device) / 1e9)
    host = torch.empty(size["copy"] // 4, dtype=torch.uint8, pin_memory=device == "cuda")
    part = target[: len(host)]
    context.add(to_device_gb_per_s=len(host) / timed(lambda: part.copy_(host, non_blocking=True), device) / 1e9)
    file = context.work / "bytes"
    data = os.urandom(1 << 20) * (len(host) >> 20 or 1)
    begin = time.perf_counter()
    with file.open("wb") as out:
        out.write(data)
        os.fsync(out.fileno())
    context.add(disk_write_gb_per_s=len(data) / (time.perf_counter() - begin) / 1e9)
    file.unlink()


def tests(context: Context) -> None:
    """The tests that need a GPU (`make test-gpu`); on a CPU they are only looked up."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    places = ["tests/unit/checkpoint/test_kernels.py", "tests/integration/test_engine_source.py"]
    looked_up = ["--collect-only"] if context.device == "cpu" else []
    done = subprocess.run([*command, *looked_up, *places], capture_output=True, text=True, check=False, cwd=ROOT)
    context.add(end=done.stdout.splitlines()[-1:] or done.stderr[-500:])
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-1000:])


def convert(context: Context) -> None:
    """Conversion by the GPU, by the C kernels and by torch on the CPU: the same bytes, and GB of source a second."""
    from calibration.checkpoint import native
    from calibration.checkpoint.index import Checkpoint
    from tests.benchmarks import fp8_source
    from tests.benchmarks.convert_benchmark import digest, forget
    from tests.benchmarks.convert_once import pipeline

    small = {"experts": 8, "hidden": 256, "intermediate": 128} if context.tiny else {}
    source = fp8_source.write(context.work / "source", context.size["blocks"], **small)
    size, digests = Checkpoint.open(source).total_bytes, set()
    context.add(source_bytes=size, levels=native.levels())
    for level in ("cuda", next(name for name in reversed(native.levels()) if name != "cuda")):
        with native.use(level, context.device):
            for round_ in range(1 if context.tiny else 2):
                output = context.work / f"{level}-{round_}"
                forget(source)
                begin, cpu = time.perf_counter(), time.process_time()
                pipeline(source, output)
                context.add(**{
                    f"{level}_gb_per_s": size / (time.perf_counter() - begin) / 1e9,
                    f"{level}_cpu_s_per_gb": (time.process_time() - cpu) * 1e9 / size,
                })  # fmt: skip
                digests.add(digest(output))
                shutil.rmtree(output)
    context.add(same_bytes=len(digests) == 1)
    assert len(digests) == 1, "the levels give different bytes"


def products(context: Context) -> None:
    """TFLOP/s of one call of a block's experts: all in a few products, one by one, and routed tokens alone."""
    import torch
    from llmcompressor.modeling.moe.context import moe_calibration_context
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from calibration.engine.experts import ExpertCalibration
    from calibration.model.weight_buffer import WeightBuffer

    sizes, device = context.size["experts"], torch.device(context.device)
    config = MixtralConfig(
        hidden_size=sizes["hidden"], intermediate_size=sizes["width"], num_local_experts=sizes["experts"],
        num_experts_per_tok=sizes["top"], dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        experts = LinearExperts2D.get_linear_experts_cls(MixtralExperts)(config)
    linears = [getattr(experts[n], f"{leaf}_proj") for n in range(sizes["experts"]) for leaf in ("gate", "up", "down")]
    buffer = WeightBuffer(device, [linear.weight for linear in linears])
    for linear in linears:
        linear.weight = torch.nn.Parameter(buffer.take(linear.weight).normal_(0, 0.02), requires_grad=False)
    tokens, top = sizes["tokens"], sizes["top"]
    hidden = torch.randn(tokens, sizes["hidden"], device=device).to(torch.bfloat16)
    index = torch.rand(tokens, sizes["experts"], device=device).topk(top).indices
    weights = torch.full((tokens, top), 1 / top, dtype=torch.bfloat16, device=device)
    every = 2 * sizes["hidden"] * sizes["width"] * tokens * (2 * sizes["experts"] + top)
    own = 2 * sizes["hidden"] * sizes["width"] * tokens * 3 * top
    made = {}
    for name, stacked, everyone in (
        ("all", True, True), ("all, one by one", False, True), ("routed", True, False), ("routed, one by one", False, False),
    ):  # fmt: skip
        calibration = ExpertCalibration()
        calibration.stacked = stacked
        with torch.no_grad(), calibration.installed():
            if everyone:
                with moe_calibration_context():
                    spent = timed(lambda: experts(hidden, index, weights), context.device, 3)
                    made[name] = experts(hidden, index, weights)
            else:
                spent = timed(lambda: experts(hidden, index, weights), context.device, 3)
                made[name] = experts(hidden, index, weights)
        context.add(**{f"{name}: tflops": (every if everyone else own) / spent / 1e12, f"{name}: seconds": spent})
        if device.type == "cuda":
            context.add(**{f"{name}: accelerator_bytes": torch.cuda.max_memory_allocated()})
    worst = max(float((value - made["all"]).abs().max() / made["all"].abs().max()) for value in made.values())
    context.add(largest_relative_difference=worst)
    assert worst < 2**-5, "the ways give different outputs"


def engines(work: Path, case: str, sizes: dict[str, Any], data: dict[str, int]) -> tuple[Path, dict[str, Path]]:
    """A source of one case below `work`, and a recipe for each of RUNS; `data` are keys of the calibration."""
    from tests.benchmarks import engine_benchmark

    source = make_source(work / "source", case, sizes)
    name = "v4-bf16" if case == "v4" else case
    recipes = {
        run: engine_benchmark.write_recipe(work / run, source, name, data | keys) for run, (keys, _) in RUNS.items()
    }
    return source, recipes


def make_source(directory: Path, case: str, sizes: dict[str, Any]) -> Path:
    """Random weights in BF16, of DeepSeek-V4's or Qwen3-MoE's form."""
    import dataclasses
    from unittest.mock import patch

    from tests.models import deepseek_v4, standard

    if case == "v4":
        return deepseek_v4.write(directory, "bf16", **sizes)
    form = standard.FORMS["qwen3_moe"]
    extra = dict(form.extra) | {
        "moe_intermediate_size": sizes["moe_intermediate"], "num_experts": sizes["experts"], "num_experts_per_tok": sizes["top"]
    }  # fmt: skip
    wanted = {key: sizes[key] for key in ("blocks", "hidden", "experts", "moe_intermediate")}
    with patch.dict(standard.FORMS, {"qwen3_moe": dataclasses.replace(form, extra=tuple(extra.items()), **wanted)}):
        return standard.write(directory, "qwen3_moe")


def once(method: str, recipe: Path, one_by_one: bool = False, hide: bool = False) -> Facts:
    """One calibration (tests.gpu.once) in a process of its own; with `hide` on the CPU."""
    threads = str(min(8, os.cpu_count() or 1))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    if hide:
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu.once", method, str(recipe), *(["--one-by-one"] if one_by_one else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{method} {recipe}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def bytes_(context: Context) -> None:
    """Small models on the device twice and on the CPU: the same bytes twice, and the CPU's but for the input global scales."""
    from tests.benchmarks.convert_benchmark import digest
    from tests.benchmarks.engine_benchmark import compare

    samples, tokens = context.size["small"]
    data, held = {"num_samples": samples, "max_seq_length": tokens}, dict[str, bool]()
    for case in ("v4", "qwen3_moe"):
        _, recipes = engines(context.work / case, case, SIZES["tiny"][case], data)
        outputs = {run: recipe.parent / "output" for run, recipe in recipes.items()}
        for run in ("all", "topped_up 64"):
            once("ours", recipes[run])
            first = digest(outputs[run])
            shutil.rmtree(outputs[run])
            shutil.rmtree(outputs[run].with_name("output.run"))
            once("ours", recipes[run])
            held[f"{case}, {run}: the same bytes twice"] = first == digest(outputs[run])
            on_device = outputs[run].rename(outputs[run].with_name("device"))
            shutil.rmtree(outputs[run].with_name("output.run"))
            once("ours", recipes[run], hide=True)
            compared, rounded = compare(on_device, outputs[run])
            context.add(**held, **{f"{case}, {run}: tensors": compared, f"{case}, {run}: rounded": rounded})
    assert all(held.values()), "two runs on one machine gave different bytes"


def against_stock(case: str) -> Callable[[Context], None]:
    """A stage: a model of gigabytes by this engine in its ways, then by stock llm-compressor, from the same weights."""

    def stage(context: Context) -> None:
        from tests.benchmarks.engine_benchmark import block_bytes, compare

        keys = {"num_samples": "samples", "max_seq_length": "tokens", "batch_size": "batch"}
        data = {key: context.size[name] for key, name in keys.items()}
        source, recipes = engines(context.work, case, context.size[case], data)
        block = block_bytes(source)
        context.add(block_bytes=block, source_bytes=sum(path.stat().st_size for path in source.iterdir()))
        for run, recipe in recipes.items():
            found = once("stock" if run == "stock" else "ours", recipe, RUNS[run][1])
            for figure in ("host_bytes", "accelerator_bytes"):
                if figure in found:
                    found[figure.replace("bytes", "blocks")] = found[figure] / block
            context.add(**{run: found})
        compared, rounded = compare(recipes["all"].parent / "output", recipes["stock"].parent / "output")
        context.add(tensors=compared, rounded=rounded)
        seconds = {run: float(context.facts[run]["seconds"]) for run in recipes}
        context.add(times_faster={run: seconds["stock"] / seconds[run] for run in recipes})

    return stage


STAGES: dict[str, Callable[[Context], None]] = {
    "card": card, "tests": tests, "convert": convert, "products": products, "bytes": bytes_,
    "qwen3_moe": against_stock("qwen3_moe"), "v4": against_stock("v4"),
}  # fmt: skip


def run_here(name: str, context: Context) -> None:
    """Runs one stage in this process and writes its file."""
    shutil.rmtree(context.work, ignore_errors=True)
    context.work.mkdir(parents=True)
    begin, error = time.perf_counter(), ""
    try:
        STAGES[name](context)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"[-4000:]
    seconds = round(time.perf_counter() - begin, 2)
    write(
        context.file,
        {"ok": not error, "seconds": seconds, "facts": context.facts, **({"error": error} if error else {})},
    )
    shutil.rmtree(context.work, ignore_errors=True)
    if error:
        raise SystemExit(f"{name}: {error}")


def run_all(names: list[str], given: argparse.Namespace) -> int:
    """Runs each stage in a process of its own. Returns how many did not end well."""
    end, failed = time.monotonic() + given.budget, 0
    for name in names:
        file, limit = given.out / f"{name}.json", min(LIMITS[name] * given.patience, end - time.monotonic())
        if limit < LEAST:
            write(file, {"ok": False, "left out": "no time"})
            failed += 1
            continue
        command = [sys.executable, "-m", "tests.gpu.stages", str(given.out), "--here", name, "--work", str(given.work)]
        process = subprocess.Popen(
            [*command, "--device", given.device, "--size", given.size], cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            held = json.loads(file.read_text()) if file.exists() else {"ok": False}
            write(file, held | {"error": f"ended at its limit of {limit:.0f} s"})
            code = 124
        failed += code != 0
        print(f"{name}: {'ok' if code == 0 else f'failed ({code})'}: {file.read_text()}", flush=True)
    return failed


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-work")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--budget", type=float, default=570, help="seconds for all stages")
    parser.add_argument("--patience", type=float, default=1, help="factor on the limits of all stages")
    parser.add_argument("--here", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out, given.work = given.out.resolve(), given.work.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.here is not None:
        work = given.work / given.here
        run_here(given.here, Context(given.device, given.size, work, given.out / f"{given.here}.json"))
        return
    raise SystemExit(1 if run_all(given.only, given) else 0)


if __name__ == "__main__":
    main()
