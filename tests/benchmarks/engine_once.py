"""One calibration in a process of its own, of this engine or of stock llm-compressor; prints what it took as JSON.

python -m tests.benchmarks.engine_once METHOD RECIPE. See engine_benchmark.py.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from llmcompressor import oneshot
from llmcompressor.core import create_session
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4PreTrainedModel

import verify.report.plots  # noqa: F401  the report's matplotlib; imports are not what is measured
import workflows.run.calibrate  # noqa: F401
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.data.batches import load_batches, load_tokenizer
from calibration.engine.oneshot import quiet
from calibration.families.registry import family_of
from calibration.model.tracing import repaired_tracing
from calibration.plan.planner import make_plan
from calibration.runs.memory import PeakMemory, Sampler, anonymous_memory
from recipes.loader import load_recipe
from recipes.schema import Recipe
from workflows.progress import Reporter
from workflows.run.stages import calibrate, export, inspect
from workflows.run.state import Run


class PeakDisk(Sampler):
    """The most bytes and files below `directories` at any sample."""

    def __init__(self, *directories: Path) -> None:
        super().__init__(seconds=0.1)
        self.bytes = self.files = 0
        self._directories = directories

    def sample(self) -> None:
        """Takes the files of this moment into both peaks."""
        sizes = []
        for path in (path for directory in self._directories for path in directory.rglob("*")):
            try:
                sizes.append(path.stat().st_size if path.is_file() else 0)
            except OSError:  # renamed or removed meanwhile
                continue
        self.bytes, self.files = max(self.bytes, sum(sizes)), max(self.files, len(sizes))


def ours(recipe: Recipe) -> dict[str, Any]:
    """The stages inspect, calibrate and export: from the source to a finished checkpoint."""
    run = Run(recipe, Reporter("error"))
    run.make_plan()
    inspect(run, ["inspect", "calibrate", "export"])
    calibrate(run)
    export(run)
    events = [json.loads(line) for line in (run.directory.path / "events.jsonl").read_text().splitlines()]
    run.directory.close()
    return {"block_peaks": [event["peak_memory"] for event in events if event["event"] == "block"]}


def stock(recipe: Recipe) -> dict[str, Any]:
    """transformers' load, llm-compressor's oneshot and save_pretrained.

    Repaired where it could not run, or where it would calibrate another model: the F32 norms and the quantized config of
    DeepSeek-V4, the lost causal mask of Qwen3-MoE (calibration.model.tracing)."""
    assert recipe.calibration is not None
    directory = Path(recipe.source.checkpoint)
    data = load_batches(recipe.calibration, load_tokenizer(directory, False), source_directory=directory)
    checkpoint = Checkpoint.open(directory)
    formats = Formats(checkpoint)
    family = family_of(checkpoint.config)
    wanted = {family.model_name(module) for module in make_plan(checkpoint, formats, recipe).quantized}
    kept = [part for part in DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict if "norm" not in part]
    with ExitStack() as stack:
        stack.enter_context(patch.object(DeepseekV4PreTrainedModel, "_keep_in_fp32_modules_strict", kept))
        stack.enter_context(quiet(lambda event: None))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="eager")
        linearize_moe(model)
        clean = Path(recipe.output).with_name("clean-config")
        content = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        clean.mkdir(exist_ok=True)
        (clean / "config.json").write_text(json.dumps(content))
        model.config.name_or_path = str(clean)
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        ignore = [name for name in linears if name not in wanted]
        stack.enter_context(create_session())
        stack.enter_context(repaired_tracing())
        stack.enter_context(patch.object(IntermediatesCache, "pin_memory", lambda *_, **__: None))
        oneshot(
            model=model.eval(),
            recipe=QuantizationModifier(targets=["Linear"], scheme="NVFP4", ignore=ignore),
            dataset=data.batches,
            pipeline="sequential",
            processor=object(),
        )
        calibrated = time.process_time()
        model.save_pretrained(recipe.output, save_compressed=True)
    return {"save_cpu_seconds": time.process_time() - calibrated}


METHODS: dict[str, Callable[[Recipe], dict[str, Any]]] = {"ours": ours, "stock": stock}


def _written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


def main(method: str, recipe_path: Path) -> None:
    """Runs one method; CPU-seconds of its threads and children, bytes of anonymous memory, written and on disk."""
    torch.set_num_threads(1)
    recipe = load_recipe(recipe_path, [])
    output = Path(recipe.output)
    run_directory = output.with_name(output.name + ".run")
    base, written, wall, cpu = anonymous_memory(), _written(), time.monotonic(), time.process_time()
    memory = PeakMemory()
    with memory, PeakDisk(output, run_directory) as disk:
        facts = METHODS[method](recipe)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts |= {
        "seconds": wall,
        "cpu_seconds": cpu + children.ru_utime + children.ru_stime,
        "base": base,
        "peak_above_base": memory.take() - base,
        "written": _written() - written,
        "peak_disk": disk.bytes,
        "files": disk.files,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
