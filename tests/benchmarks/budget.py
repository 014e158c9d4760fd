"""Loss against size: `budget` at several sizes, beside all layers in NVFP4 and the outer blocks kept in BF16 at the same size.

    python -m tests.benchmarks.budget --directory DIR [--model upcycled] [--first 8]

The sizes are those of 2, 4, 7, 1 and 11 pairs of outer blocks kept (`--pairs`). The units are measured once, through `python -m
workflows.run --stages inspect`, and each size chooses among what was measured. One output, all in NVFP4, serves all sizes:
its observers see exact inputs, so the bytes of a layer do not depend on the schemes of the others. A layer that is chosen to be
BF16 has the source's weight, one in FP8_BLOCK weight and inputs rounded as the measurement does. DIR and its results of BF16
and round to nearest are those of tests/benchmarks/accuracy.py; what is measured here is kept in DIR/MODEL-budget.json. `--text N`
measures the units on N tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import nn

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.engine import sensitivity
from calibration.model.skeleton import build_skeleton
from calibration.plan.schemes import FP8_BLOCK
from calibration.plan.task import Task
from recipes.schema import Recipe
from tests.benchmarks import accuracy
from tests.benchmarks.accuracy import LINEAR, RTN, TEXTS, Bench, Result, paired
from tests.benchmarks.headroom import hooked, scaled_layers
from verify.fidelity import forward

PAIRS = (2, 4, 7, 1, 11)


def recipe(source: Path, output: Path, samples: int, **sections: Any) -> dict[str, Any]:
    """A recipe of round to nearest, as accuracy.calibrate writes it."""
    data = {"dataset": "bundled", "num_samples": samples, "max_seq_length": 512, "batch_size": 4}
    return {"source": {"checkpoint": str(source)}, "output": str(output), "calibration": data} | sections


def modifiers(ignore: list[str]) -> list[dict[str, Any]]:
    """Round to nearest of all layers but those that `ignore` matches."""
    return [{"QuantizationModifier": {"targets": LINEAR, "scheme": "NVFP4", "ignore": ignore}}]


def outer(source: Path, pairs: int) -> list[str]:
    """An ignore entry for the first and the last `pairs` blocks."""
    blocks = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    numbers = [*range(pairs), *range(blocks - pairs, blocks)]
    return [rf"re:^model\.layers\.(?:{'|'.join(map(str, numbers))})\."] if pairs else []


def bits(source: Path, sections: dict[str, Any]) -> tuple[float, float]:
    """Bits per parameter of the output of a recipe, and per weight of the layers that the recipes quantize."""
    made = Recipe.model_validate(recipe(source, source.parent / "unused", 1, **sections))
    task = Task.open(made, source)
    layers = [
        step for step in task.plan.steps.values() if step.source.endswith(".weight") and ".layers." in step.source
    ]
    layers = [step for step in layers if "norm" not in step.source and not step.source.endswith("gate.weight")]
    nbytes = sum(output.nbytes for step in layers for output in step.outputs)
    elements = sum(torch.Size(task.source.header(step.source).shape).numel() for step in layers)
    return task.plan.bits_per_parameter, 8 * nbytes / elements


def chosen(directory: Path, source: Path, samples: int, size: float, tokens: int) -> dict[str, Any]:
    """The sections of the recipe that a run with this budget writes out; the measurement of another size is used again."""
    place = directory / f"{source.name}.budget-{tokens}-{size:.3f}"
    run = place / "output.run"
    shutil.rmtree(place, ignore_errors=True)
    run.mkdir(parents=True)
    for known in directory.glob(f"{source.name}.budget-{tokens}-*/output.run/budget.json"):
        shutil.copyfile(known, run / "budget.json")
        break
    asked = {"bits_per_parameter": size, "candidates": ["NVFP4", "FP8_BLOCK", "bfloat16"], "tokens": tokens}
    body = recipe(source, place / "output", samples, modifiers=modifiers([]), budget=asked)
    (place / "recipe.yaml").write_text(yaml.safe_dump(body))
    command = [sys.executable, "-m", "workflows.run", str(place / "recipe.yaml"), "--stages", "inspect"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return {"modifiers": yaml.safe_load((run / "recipe.yaml").read_text())["modifiers"]}


def schemes(source: Path, sections: dict[str, Any]) -> dict[str, str]:
    """Module -> scheme, of what a recipe quantizes."""
    plan = Task.open(Recipe.model_validate(recipe(source, source.parent / "unused", 1, **sections)), source).plan
    return {module: plan.groups[str(step.group)].name for module, step in plan.quantized.items()}


@torch.no_grad()
def evaluate(bench: Bench, nearest: Path, chosen: dict[str, str]) -> Result:
    """Loss with the modules `chosen` in their schemes and the others in BF16; `nearest` has all of them in NVFP4."""
    found = Result({}, {}, {})
    with TemporaryDirectory() as work:
        original = build_skeleton(Formats(Checkpoint.open(bench.source)), Path(work), False, torch.device("cpu"))
        formats = Formats(Checkpoint.open(nearest))
        emulated = forward._of_output(original, formats)
        scales = {name: (module, scale) for module, (name, scale) in scaled_layers(original, emulated, formats).items()}
        nvfp4 = [scales[name][0] for name, scheme in chosen.items() if scheme == "NVFP4"]
        last: list[Any] = [None, 0.0, None]
        hooks: dict[nn.Linear, Any] = {
            m: accuracy._SharedInput(scale, last) for m, scale in scales.values() if m in nvfp4
        }
        emulated.load(nvfp4)
        original.load([*original.outside_blocks(), *original.blocks.values()])
        for name, scheme in chosen.items():
            if scheme == "FP8_BLOCK":
                module = scales[name][0]
                module.weight.data = sensitivity.rounded_weight(module.weight.data, FP8_BLOCK)
                hooks[module] = forward.fp8_input
        head = original.model.get_output_embeddings()
        with hooked(hooks):
            for text, tokens in bench.tokens.items():
                losses, kls, agree = [], [], []
                for ids, state in zip(tokens, bench.states[text], strict=False):
                    mine = original.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
                    base = F.linear(state, head.weight)[0].float().log_softmax(-1)
                    losses.append(F.nll_loss(mine[:-1], ids[0, 1:]).item())
                    kls.append(F.kl_div(mine, base, reduction="sum", log_target=True).item() / len(mine))
                    agree.append((mine.argmax(-1) == base.argmax(-1)).float().mean().item())
                found.nll[text], found.kl[text] = losses, sum(kls) / len(kls)
                found.top1[text] = sum(agree) / len(agree)
    return found


def table(results: dict[str, dict[str, Any]], base: Result) -> str:
    """A row for each result, in the order of size."""
    lines = [
        "| what | bits per parameter | bits per weight of the layers | prose: dNLL | reference: dNLL | KL | units or blocks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(results.items(), key=lambda pair: (pair[1]["bits"], pair[0])):
        result = Result(**row["result"])
        losses = [paired(result.nll[text], base.nll[text]) for text in TEXTS]
        cells = [f"{mean:+.3f} +- {error:.3f}" for mean, error in losses]
        kl = " / ".join(f"{result.kl[text]:.3f}" for text in TEXTS)
        lines.append(
            f"| {name} | {row['bits']:.2f} | {row['layers']:.2f} | {' | '.join(cells)} | {kl} | {row['what']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--model", choices=("smollm2", "upcycled"), default="smollm2")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--first", type=int, help="evaluate on the first windows alone")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS)
    parser.add_argument("--text", type=int, default=512)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bench = accuracy.prepare(options.directory, options.model, options.windows)
    shared = options.directory / f"{options.model}-{options.windows}-{options.samples}.json"
    known = json.loads(shared.read_text()) if shared.exists() else {}
    base = Result(**known["BF16"]) if "BF16" in known and bench.states else accuracy.evaluate(bench, None)
    nearest = options.directory / f"{options.model}.{accuracy._slug(RTN, options.samples)}" / "output"
    if not nearest.is_dir():
        accuracy.calibrate(nearest.parent, bench.source, options.samples, {"modifiers": modifiers([])})
    fewer = replace(bench, tokens={text: found[: options.first] for text, found in bench.tokens.items()})
    file = options.directory / f"{options.model}-budget.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def measure(name: str, what: str, sections: dict[str, Any]) -> None:
        if name in results:
            return
        size, layers = bits(bench.source, sections)
        result = evaluate(fewer, nearest, schemes(bench.source, sections))
        results[name] = {"bits": size, "layers": layers, "what": what, "result": asdict(result)}
        file.write_text(json.dumps(results, indent=1))
        print(table(results, base), flush=True)

    for pairs in options.pairs:
        kept = {"modifiers": modifiers(outer(bench.source, pairs))}
        size = bits(bench.source, kept)[0]
        sections = chosen(options.directory, bench.source, options.samples, size, options.text)
        budget = (
            options.directory / f"{bench.source.name}.budget-{options.text}-{size:.3f}" / "output.run" / "budget.json"
        )
        counts = Counter(json.loads(budget.read_text())["choice"].values())
        words = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        measure(f"budget {size:.3f}" + (f", {options.text} tokens" if options.text != 512 else ""), words, sections)
        measure(f"first and last {pairs} kept", f"{2 * pairs} blocks in BF16", kept)
    measure("all NVFP4", "", {"modifiers": modifiers([])})
    print(table(results, base))


if __name__ == "__main__":
    main()
