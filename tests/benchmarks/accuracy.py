"""What each method keeps: loss of the real model after each recipe, paired by window with the loss in BF16.

    python -m tests.benchmarks.accuracy --directory DIR [--model upcycled] [--only NAME ...] [--against NAME]
        [--methods FILE] [--vllm NAME]

Each method calibrates through this project's engine (tests/benchmarks/engine_once.py: CPU-seconds of one thread, memory above
the base) and is evaluated by transformers' model with the output's weights and inputs quantized as vLLM does, on windows of two
texts that no calibration text holds: the reference of the Python language, and a novel. `--methods FILE` adds methods: YAML,
name -> sections of a recipe. `--bounds NAME` evaluates an output with quantized weights and exact inputs, and the reverse.
`--vllm NAME` measures one output in vLLM too. What was measured is kept in DIR/MODEL.json; the table is of all that it holds.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import nn

from calibration.checkpoint import nvfp4
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.model.skeleton import build_skeleton
from tests.benchmarks.headroom import hooked, scaled_layers, windows
from tests.benchmarks.perplexity import nll
from tests.models import routers, smollm2, upcycled
from verify.fidelity import forward
from verify.unseen_text import help_text

#: Pride and Prejudice, public domain; later versions of the package left it out.
NOVEL = "guidellm==0.3.0"
LINEAR = [r"re:^model\.layers\.\d+\..*(_proj|\.w[123])$"]
TEXTS = ("prose", "reference")
#: Model -> routed experts of each block, of which two are chosen, and whether its routers are trained.
MODELS = {
    "smollm2": (0, False),
    "upcycled": (upcycled.EXPERTS, False),
    "upcycled16": (16, False),
    "upcycled-trained": (upcycled.EXPERTS, True),
    "upcycled16-trained": (16, True),
}
#: Windows of each text's end that routers are trained on.
ROUTER_WINDOWS = 8
RTN = "round to nearest"


def _quantized(modifier: str = "QuantizationModifier", **arguments: Any) -> dict[str, Any]:
    return {"modifiers": [{modifier: {"targets": LINEAR, "scheme": "NVFP4"} | arguments}]}


def _smoothed(smoothing: dict[str, Any], **quantized: Any) -> dict[str, Any]:
    return {"modifiers": [smoothing, *_quantized(**quantized)["modifiers"]]}


_SMOOTHQUANT = {"SmoothQuantModifier": {"smoothing_strength": 0.5}}
_AWQ = {"AWQModifier": {"n_grid": 8}}
#: Name -> sections of the recipe that differ from the base.
METHODS: dict[str, dict[str, Any]] = {
    RTN: _quantized(),
    "memoryless_mse": _quantized(weight_observer="memoryless_mse"),
    "nvfp4_expanded_mse": _quantized(weight_observer="nvfp4_expanded_mse"),
    "nvfp4_expanded_imatrix": _quantized(weight_observer="nvfp4_expanded_imatrix"),
    "nvfp4_four_six": _quantized(weight_observer="nvfp4_four_six"),
    "nvfp4_mse": _quantized(weight_observer="nvfp4_mse"),
    "nvfp4_weighted": _quantized(weight_observer="nvfp4_weighted"),
    "GPTQ": _quantized("GPTQModifier"),
    "GPTQ of quantized inputs": _quantized("GPTQModifier", quantized_inputs=True),
    "GPTQ, nvfp4_weighted": _quantized("GPTQModifier", weight_observer="nvfp4_weighted"),
    "GPTQ of quantized inputs, nvfp4_weighted": _quantized(
        "GPTQModifier", weight_observer="nvfp4_weighted", quantized_inputs=True
    ),
    "SmoothQuant 0.5": _smoothed(_SMOOTHQUANT),
    "SmoothQuant 0.5, nvfp4_weighted": _smoothed(_SMOOTHQUANT, weight_observer="nvfp4_weighted"),
    "SmoothQuant 0.5, GPTQ of quantized inputs": _smoothed(
        _SMOOTHQUANT, modifier="GPTQModifier", quantized_inputs=True
    ),
    "SmoothQuant 0.5, GPTQ of quantized inputs, nvfp4_weighted": _smoothed(
        _SMOOTHQUANT, modifier="GPTQModifier", weight_observer="nvfp4_weighted", quantized_inputs=True
    ),
    "AWQ": _smoothed(_AWQ),
    "AWQ, nvfp4_weighted": _smoothed(_AWQ, weight_observer="nvfp4_weighted"),
    "AWQ, GPTQ of quantized inputs, nvfp4_weighted": _smoothed(
        _AWQ, modifier="GPTQModifier", weight_observer="nvfp4_weighted", quantized_inputs=True
    ),
}


#: The same for models with experts: which tokens an expert is calibrated on; without a word, all.
_TOKENS: dict[str, Any] = {"routed": "routed"} | {f"topped_up {n}": {"topped_up": n} for n in (16, 64, 256)}
EXPERT_METHODS: dict[str, dict[str, Any]] = {
    f"{start}{name}": method | {"calibration": {"experts": experts}}
    for start, method in (("", _quantized()), ("nvfp4_weighted, ", _quantized(weight_observer="nvfp4_weighted")))
    for name, experts in _TOKENS.items()
}


@dataclass
class Result:
    """One evaluation: mean NLL of each window in nats a token, KL and top-1 agreement with BF16, by text. CPU-seconds and
    bytes above the base of the calibration; None for BF16 and bounds."""

    nll: dict[str, list[float]]
    kl: dict[str, float]
    top1: dict[str, float]
    cpu_seconds: float | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Bench:
    """A model, its windows (int64 `[1, tokens]`) by text, and the states that enter its head in BF16, by text."""

    directory: Path
    source: Path
    tokens: dict[str, list[torch.Tensor]]
    states: dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class _SharedInput:
    """`forward._NvFp4Input`, but layers that share input and scale quantize it once. `last`: input, scale, result."""

    scale: torch.Tensor
    last: list[Any]

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.last[0] is not arguments[0] or self.last[1] != float(self.scale):
            self.last[:] = arguments[0], float(self.scale), nvfp4.quantize_dequantize(arguments[0], self.scale)
        return self.last[2], *arguments[1:]


def novel(directory: Path) -> str:
    """The novel; pip fetches the package that holds it into `directory` once."""
    place = directory / "novel"
    if not place.is_dir():
        partial = directory / "novel.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), NOVEL]
        subprocess.run(pip, check=True)
        partial.rename(place)
    text = gzip.decompress((place / "guidellm" / "data" / "prideandprejudice.txt.gz").read_bytes()).decode()
    return text[text.index("It is a truth universally") :]


@torch.no_grad()
def evaluate(bench: Bench, output: Path | None, weights: bool = True, inputs: bool = True) -> Result:
    """Loss of an output's `weights` (else the source's, smoothed as the output's are) with its quantized `inputs` (else exact
    ones); BF16 without an output, which also fills `bench.states`."""
    found = Result({}, {}, {})
    with TemporaryDirectory() as work:
        original = build_skeleton(Formats(Checkpoint.open(bench.source)), Path(work), False, torch.device("cpu"))
        hooks: dict[nn.Linear, Any] = {}
        filled, smoothed = original, None
        if output is not None:
            formats = Formats(Checkpoint.open(output))
            emulated = forward._of_output(original, formats)
            filled = emulated if weights else original
            smoothed = None if weights else forward._smoothing(None, formats, original)
            if inputs:
                layers = scaled_layers(original, emulated, formats)
                last: list[Any] = [None, 0.0, None]
                hooks = {module: _SharedInput(scale, last) for module, (_, scale) in layers.items()}
                for block in original.blocks.values():
                    hooks |= dict.fromkeys(forward.fp8_layers(original, emulated, formats, block), forward.fp8_input)
        original.load(original.outside_blocks())
        for block in original.blocks.values():
            if smoothed is None:
                filled.load([block])
            else:
                forward._load_smoothed(original, block, smoothed)
        head, entering = original.model.get_output_embeddings(), list[torch.Tensor]()
        with hooked(hooks | {head: lambda _, given: entering.append(given[0])}):
            for text, tokens in bench.tokens.items():
                losses, kls, agree = [], [], []
                for at, ids in enumerate(tokens):
                    logits = original.model(input_ids=ids, use_cache=False).logits[0].float()
                    states = bench.states.setdefault(text, [])
                    if len(states) <= at:
                        assert output is None, "BF16 is evaluated first"
                        states.append(entering[-1])
                    base = F.linear(states[at], head.weight)[0].float().log_softmax(-1)
                    agree.append((logits.argmax(-1) == base.argmax(-1)).float().mean().item())
                    mine = logits.log_softmax(-1)
                    losses.append(F.nll_loss(mine[:-1], ids[0, 1:]).item())
                    kls.append((base.exp() * (base - mine)).sum(-1).mean().item())
                    entering.clear()
                found.nll[text], found.kl[text] = losses, sum(kls) / len(kls)
                found.top1[text] = sum(agree) / len(agree)
    return found


def calibrate(directory: Path, source: Path, samples: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Runs a recipe into `<directory>/output` in a process of its own; what engine_once measured."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    data = {"dataset": "bundled", "num_samples": samples, "max_seq_length": 512, "batch_size": 4}
    body = {"source": {"checkpoint": str(source)}, "output": str(directory / "output")} | sections
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(body | {"calibration": data | sections.get("calibration", {})}))
    command = [sys.executable, "-m", "tests.benchmarks.engine_once", "ours", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr[-2000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def paired(found: list[float], base: list[float]) -> tuple[float, float]:
    """Mean difference over the windows that both have, the first ones, and its standard error."""
    count = min(len(found), len(base))
    delta = torch.tensor(found[:count], dtype=torch.float64) - torch.tensor(base[:count], dtype=torch.float64)
    return float(delta.mean()), float(delta.std()) / math.sqrt(len(delta))


def table(results: dict[str, Result], against: str | None = None) -> str:
    """A row for each result; the share of round to nearest's loss that a method keeps, by text. `against`: a method whose
    loss is subtracted too, window by window."""
    titles = ["method", "prose: dNLL", "reference: dNLL", "share closed, prose / reference", "KL", "top-1", "CPU-s", "x RTN",
              "memory", *([f"against {against}, prose / reference"] if against else [])]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    base, nearest = results["BF16"], results.get(RTN)
    for name, result in results.items():
        differences = {text: paired(result.nll[text], base.nll[text]) for text in TEXTS}
        cells = [f"{mean:+.3f} +- {error:.3f}" for mean, error in differences.values()]
        if nearest is None or name == "BF16":
            cells.append("")
        else:
            whole = {text: paired(nearest.nll[text][: len(result.nll[text])], base.nll[text])[0] for text in TEXTS}
            cells.append(" / ".join(f"{1 - differences[text][0] / whole[text]:.0%}" for text in TEXTS))
        cells.append(" / ".join(f"{result.kl[text]:.3f}" for text in TEXTS))
        cells.append(" / ".join(f"{result.top1[text]:.1%}" for text in TEXTS))
        cpu = result.cpu_seconds
        cells.append("" if cpu is None else f"{cpu:.0f}")
        known = cpu is not None and nearest is not None and nearest.cpu_seconds is not None
        cells.append(f"{cpu / nearest.cpu_seconds:.2f}" if known else "")  # type: ignore[operator,union-attr]
        cells.append("" if result.peak is None else f"{result.peak / 2**20:.0f} MiB")
        if against:
            other = results[against]
            beside = [paired(result.nll[text], other.nll[text]) for text in TEXTS]
            cells.append("" if name in ("BF16", against) else " / ".join(f"{a:+.3f} +- {b:.3f}" for a, b in beside))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    perplexity = " / ".join(f"{math.exp(sum(base.nll[t]) / len(base.nll[t])):.2f}" for t in TEXTS)
    return "\n".join([*lines, "", f"BF16 perplexity, prose / reference: {perplexity}"])


def prepare(directory: Path, model: str, count: int) -> Bench:
    """The model's checkpoint, its windows and its states in BF16."""
    dense = directory / "smollm2"
    if not dense.exists():
        smollm2.write(dense)
    source = directory / model
    texts = dict(zip(TEXTS, (novel(directory), help_text()), strict=True))
    if not source.exists():
        experts, trained = MODELS[model]
        ends = [text[-ROUTER_WINDOWS * 512 * 8 :] for text in texts.values()] if trained else []
        unseen = [ids for text in ends for ids in windows(dense, text, ROUTER_WINDOWS, 512)]
        inputs = routers.mlp_inputs(dense, unseen) if trained else []
        trained_routers = [routers.train(found, experts, f"block {n}") for n, found in enumerate(inputs)]
        upcycled.write(source, dense, experts=experts, routers=trained_routers)
    tokens = {name: windows(source, text[: count * 512 * 8], count, 512) for name, text in texts.items()}
    kept = directory / f"{model}-{count}.states.pt"
    return Bench(directory / model, source, tokens, torch.load(kept) if kept.exists() else {})


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, of each text")
    parser.add_argument("--first", type=int, help="evaluate methods on the first windows alone: a table in less time")
    parser.add_argument("--samples", type=int, default=32, help="of 512 tokens, of the bundled calibration text")
    parser.add_argument("--only", action="append", help="names of methods; round to nearest always runs")
    parser.add_argument("--against", help="a method that runs in round to nearest's place, to pair others with")
    parser.add_argument("--methods", type=Path, help="YAML: name -> sections of a recipe")
    parser.add_argument("--bounds", action="append", default=[], help="a method whose two halves are evaluated alone")
    parser.add_argument("--vllm", help="a method that is measured in vLLM too")
    parser.add_argument("--again", action="store_true", help="calibrate and evaluate again what --only names")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bench = prepare(options.directory, options.model, options.windows)
    methods = (
        METHODS
        | (EXPERT_METHODS if MODELS[options.model][0] else {})
        | (yaml.safe_load(options.methods.read_text()) if options.methods else {})
    )
    wanted = [options.against or RTN, *(options.only if options.only is not None else methods)]
    file = options.directory / f"{options.model}-{options.windows}-{options.samples}.json"
    results = {
        name: Result(**result) for name, result in (json.loads(file.read_text()) if file.exists() else {}).items()
    }

    def keep(name: str, result: Result) -> None:
        # Read again: another process may have measured another method meanwhile.
        on_disk = json.loads(file.read_text()) if file.exists() else {}
        results.update({other: Result(**found) for other, found in on_disk.items()} | {name: result})
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({other: asdict(found) for other, found in results.items()}, indent=1))
        partial.rename(file)

    if "BF16" not in results or not bench.states:
        bench.states.clear()
        keep("BF16", evaluate(bench, None))
        torch.save(bench.states, options.directory / f"{options.model}-{options.windows}.states.pt")
    fewer = replace(bench, tokens={text: found[: options.first] for text, found in bench.tokens.items()})
    for name in dict.fromkeys(wanted):
        if name in results and not (options.again and name in (options.only or ())):
            continue
        place = options.directory / f"{options.model}.{_slug(name, options.samples)}"
        facts = calibrate(place, bench.source, options.samples, methods[name])
        result = evaluate(fewer, place / "output")
        result.cpu_seconds, result.peak = facts["cpu_seconds"], facts["peak_above_base"]
        keep(name, result)
        shown = {other: results[other] for other in ("BF16", RTN, options.against, name) if other in results}
        print(table(shown, options.against), flush=True)
    for name in options.bounds:
        output = options.directory / f"{options.model}.{_slug(name, options.samples)}" / "output"
        keep(f"{name}, inputs exact", evaluate(fewer, output, inputs=False))
        keep(f"{name}, weights exact", evaluate(fewer, output, weights=False))
    print(table(results, options.against))
    if options.vllm:
        output = options.directory / f"{options.model}.{_slug(options.vllm, options.samples)}" / "output"
        served = nll(output, options.directory / "logs", options.windows)
        mean, error = paired(served, results[options.vllm].nll["reference"])
        print(f"vLLM on {options.vllm}, reference: {mean:+.4f} +- {error:.4f} nats from what is measured here")


def _slug(name: str, samples: int) -> str:
    return f"{samples}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


if __name__ == "__main__":
    main()
