"""How much of unseen text saturates calibrated input scales, and what headroom costs or gains.

    python -m tests.benchmarks.headroom --directory DIR [--source CHECKPOINT --data FILE --text FILE]

The source is quantized as the recipe says by this project's engine, once for each number of calibration samples. Headroom
divides the stored input global scales, as `calibration.input_headroom` does. Without --source: SmolLM2-135M-Instruct, bundled
data, and the help text of Python, which no bundled text holds. Loss of transformers' model with the output's weights and
quantized inputs (`calibration.checkpoint.nvfp4.quantize_dequantize`), paired by window with the loss of the source in BF16.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import nn

from calibration.checkpoint.formats import Formats, module_of
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.nvfp4 import RANGE
from calibration.data.batches import load_tokenizer
from calibration.model.skeleton import build_skeleton
from calibration.model.source_model import SourceModel
from recipes.checks import Serving
from tests.benchmarks.v4_methods import ROUTED
from tests.models import smollm2
from verify.fidelity import forward
from verify.serving.serving import read_text

SAMPLES, HEADROOM = (8, 32, 128), (1.0, 1.25, 1.5, 2.0, 4.0)
LINEAR = r"re:^model\.layers\.\d+\..*_proj$"


@dataclass
class Saturated:
    """Values of one module's input, and how many of them lie beyond each of the extremes `admitted`."""

    admitted: list[float]
    values: int = 0
    beyond: list[int] = field(default_factory=list)

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].abs().flatten().float()
        # Few values reach the least of the extremes, and the others are counted among these.
        large = x[x > min(self.admitted)]
        counts = [int((large > limit).sum()) for limit in self.admitted]
        self.beyond = [a + b for a, b in zip(self.beyond or [0] * len(counts), counts, strict=True)]
        self.values += x.numel()


def calibrate(directory: Path, source: Path, target: str, data: str, samples: int) -> Path:
    """The output of a run of the engine with `samples` samples of 256 tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    body = {
        "source": {"checkpoint": str(source)},
        "output": str(directory / "output"),
        "modifiers": [{"QuantizationModifier": {"targets": [target], "scheme": "NVFP4"}}],
        "calibration": {"dataset": data, "num_samples": samples, "max_seq_length": 256, "batch_size": 4},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(body))
    command = [sys.executable, "-m", "workflows.run", str(directory / "recipe.yaml"), "--no-rehearsal", "--stages"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    subprocess.run([*command, "inspect,calibrate,export"], check=True, capture_output=True, env=environment)
    return directory / "output"


def windows(source: Path, text: str, count: int, length: int) -> list[torch.Tensor]:
    """The first `count` windows of the text, int64 `[1, length]`."""
    ids = torch.tensor(load_tokenizer(source, False)(text, verbose=False)["input_ids"], dtype=torch.int64)
    return list(ids[: count * length].view(-1, 1, length))


def losses(model: nn.Module, tokens: list[torch.Tensor]) -> list[float]:
    """Mean negative log-likelihood of each window, in nats a token."""
    found = []
    for ids in tokens:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        found.append(F.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    return found


@contextmanager
def hooked(hooks: dict[nn.Linear, Any]) -> Iterator[None]:
    """Inside, each layer runs its hook on its inputs."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def paired(found: list[float], base: list[float]) -> str:
    """Mean difference with its standard error."""
    delta = torch.tensor(found, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    return f"{delta.mean().item():+.4f} +- {delta.std().item() / math.sqrt(len(delta)):.4f}"


def measure(source: Path, outputs: dict[int, Path], tokens: list[torch.Tensor]) -> None:
    """Prints a row for each number of samples and each headroom."""
    with TemporaryDirectory() as work, torch.no_grad():
        original = build_skeleton(Formats(Checkpoint.open(source)), Path(work), False, torch.device("cpu"))
        formats = {samples: Formats(Checkpoint.open(output)) for samples, output in outputs.items()}
        emulated = {samples: forward._of_output(original, found) for samples, found in formats.items()}
        layers = {s: scaled_layers(original, emulated[s], formats[s]) for s in outputs}
        names = {module: name for module, (name, _) in layers[min(outputs)].items()}
        cases = [(samples, headroom) for samples in outputs for headroom in HEADROOM]
        seen = {
            # 2688 / (2688 / amax) is amax within a float32 rounding; the next BF16 value is further away.
            module: Saturated([forward.SLACK * RANGE / float(layers[s][module][1]) * headroom for s, headroom in cases])
            for module in names
        }
        original.load(original.outside_blocks())
        blocks = list(original.blocks.values())
        original.load(blocks)
        with hooked(seen):
            base = losses(original.model, tokens)
        original.unload(blocks)
        print(f"BF16 source: {sum(base) / len(base):.4f} nats over {len(tokens)} windows of {tokens[0].numel()} tokens")
        print(
            "| samples | headroom | saturated | worst module | NLL above BF16 | above headroom 1 |\n|---|---|---|---|---|---|"
        )
        for samples in outputs:
            emulated[samples].load(blocks)
            unwidened: list[float] = []
            for headroom in HEADROOM:
                hooks = {m: forward._NvFp4Input(scale / headroom) for m, (_, scale) in layers[samples].items()}
                with hooked(hooks):
                    found = losses(original.model, tokens)
                unwidened = unwidened or found
                at = cases.index((samples, headroom))
                shares = {m: s.beyond[at] / s.values for m, s in seen.items() if s.values}
                worst = max(shares, key=shares.__getitem__)
                total = sum(s.beyond[at] for s in seen.values() if s.values) / sum(s.values for s in seen.values())
                named = f"{names[worst]} {shares[worst]:.1e}" if total else ""
                modules = sum(share > 0 for share in shares.values())
                print(
                    f"| {samples} | {headroom:g} | {total:.1e} in {modules} of {len(shares)} modules | "
                    f"{named} | {paired(found, base)} | {paired(found, unwidened)} |",
                    flush=True,
                )
            emulated[samples].unload(blocks)


def scaled_layers(
    original: SourceModel, emulated: SourceModel, output: Formats
) -> dict[nn.Linear, tuple[str, torch.Tensor]]:
    """The layers with an input global scale: module name of the source, scale `[1]`."""
    return {
        module: (module_of(stored), scale)
        for block in original.blocks.values()
        for module, stored, scale in forward._scaled_inputs(original, emulated, output, block)
    }


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="a DeepSeek-V4; its routed experts are quantized")
    parser.add_argument("--data", default="bundled")
    parser.add_argument("--text", default="bundled", help="held-out text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    source, target = options.source, ROUTED if options.source else LINEAR
    if source is None:
        source = options.directory / "source"
        if not source.exists():
            smollm2.write(source)
    text = read_text(Serving(text=options.text, windows=options.windows, window_tokens=options.tokens))
    assert text is not None
    outputs = {}
    for samples in SAMPLES:
        directory = options.directory / str(samples)
        done = (directory / "output" / "recipe.yaml").exists()
        outputs[samples] = directory / "output" if done else calibrate(directory, source, target, options.data, samples)
    torch.set_num_threads(1)
    measure(source, outputs, windows(source, text, options.windows, options.tokens))


if __name__ == "__main__":
    main()
