"""The tiny DeepSeek-V4 of `tests.models.deepseek_v4`, trained for some CPU minutes: its activations differ in size from module
to module as those of a real model do, and its perplexity means something. Random weights give neither.

    python -m tests.models.trained_v4 DIR

writes DIR/bf16 and DIR/fp8_mxfp4 (one set of weights), DIR/train.jsonl (the text it was trained on, for calibration) and
DIR/heldout.txt (for perplexity). The text is the prose and code of the bundled calibration set. The blocks of MTP stay random.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.data.batches import load_tokenizer
from calibration.data.table import BUNDLED
from calibration.model.skeleton import build_skeleton
from tests.models import deepseek_v4
from tests.models.deepseek_v4 import Sizes, Spec, Stored, entries, specs, stored_as, values
from tests.models.storage import new_directory

SEED = 0
#: Every tenth text is held out.
HELD_OUT = 10
LEARNING_RATE, WARMUP = 4e-3, 20
Report = Callable[[str], None]


def texts() -> tuple[list[str], list[str]]:
    """The texts to train on, and those held out."""
    rows = [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]
    found = [row["text"] for row in rows if "text" in row]
    held_out = [text for number, text in enumerate(found) if number % HELD_OUT == 0]
    return [text for number, text in enumerate(found) if number % HELD_OUT], held_out


def train(steps: int, rows: int = 4, length: int = 256, report: Report = print) -> dict[str, torch.Tensor]:
    """Trains for `steps` steps of `rows` windows of `length` tokens; the values of every tensor of the model, in float32 under
    their hub names. Deterministic for one machine and one number of threads."""
    torch.manual_seed(SEED)
    with TemporaryDirectory(prefix="trained-v4-") as work:
        source = deepseek_v4.write(Path(work) / "random", "bf16", seed=SEED)
        tokenizer = load_tokenizer(source, False)
        tokens, held_out = (
            torch.tensor(tokenizer("\n\n".join(part), verbose=False)["input_ids"], dtype=torch.int64)
            for part in texts()
        )
        skeleton = build_skeleton(Formats(Checkpoint.open(source)), Path(work), False, torch.device("cpu"))
        skeleton.load([skeleton.model])
    model = skeleton.model.float()
    parameters = [parameter.requires_grad_(True) for parameter in model.parameters() if parameter.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), foreach=True)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def held_out_loss() -> float:
        windows = held_out[: len(held_out) // length * length].view(-1, length)[:16]
        with torch.no_grad():
            return sum(loss_of(window[None]).item() for window in windows) / len(windows)

    report(
        f"{len(tokens)} tokens, {len(held_out)} held out; entropy of single tokens {unigram_entropy(tokens):.2f} nats"
    )
    generator, begun = torch.Generator().manual_seed(SEED), time.process_time()
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        starts = torch.randint(0, len(tokens) - length, (rows,), generator=generator).tolist()
        loss = loss_of(torch.stack([tokens[start : start + length] for start in starts]))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            seconds = time.process_time() - begun
            report(f"step {step + 1}: loss {loss.item():.3f}, held out {held_out_loss():.3f}; {seconds:.0f} CPU-s")
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {source: found[name].detach().clone() for name, source in skeleton.sources.items()}


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Nats a token that a model of single frequencies needs."""
    shares = torch.bincount(tokens).double() / len(tokens)
    return float(-(shares * shares.clamp_min(1e-12).log()).sum())


def write(directory: Path, stored: Stored, weights: dict[str, torch.Tensor]) -> Path:
    """Writes trained `weights` as `deepseek_v4.write` does random ones into the new or empty `directory`, and returns it."""
    sizes, wanted = Sizes(), list(specs(Sizes()))

    def values_of(spec: Spec) -> tuple[torch.Tensor, ...]:
        trained = weights.get(spec.name)
        if spec.kind == "table" or trained is None:
            return values(spec, stored, sizes, SEED)
        return stored_as(trained, spec, stored)

    new_directory(directory)
    deepseek_v4.write_tensors(directory, wanted, 3, [entries(spec, stored) for spec in wanted], values_of)
    deepseek_v4.write_side_files(directory, deepseek_v4.config(sizes, stored), "encoding_dsv4.py")
    return directory


def write_all(directory: Path, steps: int, report: Report = print) -> None:
    """Trains, and writes what the module's docstring says."""
    weights = train(steps, report=report)
    for stored in ("bf16", "fp8_mxfp4"):
        write(directory / stored, stored, weights)  # type: ignore[arg-type]
    training, held_out = texts()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in training)
    (directory / "train.jsonl").write_text(lines, encoding="utf-8")
    (directory / "heldout.txt").write_text("\n\n".join(held_out), encoding="utf-8")


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    write_all(given.directory, given.steps, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
