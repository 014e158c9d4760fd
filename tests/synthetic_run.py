"""A run directory as a long run leaves it, with figures from a random generator: for tests of what reads it."""

from __future__ import annotations

import json
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration.runs.journal import RunDirectory, process_began
from verify.checks import Check, to_json
from workflows.batch.state import BatchDirectory, Entry
from workflows.batch.summary import STATES

CHECKS = (
    Check("structure.open", "PASS", "headers, index and shards fit together", "no problem", "no problem", "headers"),
    Check(
        "fidelity.weights",
        "FAIL",
        "no quantized weight is far",
        "worst 1.41 (layers.7.ffn.experts.200.w2)",
        "<= 0.3",
        "read",
    ),
    Check(
        "fidelity.outliers",
        "WARN",
        "no module is far worse than its peers",
        "layers.7 <script>x</script>",
        "2 x",
        "read",
    ),
    Check("serving.load", "UNCHECKED", "the engine loads it", "not reached", "no error", "vLLM in its own process"),
)


def write(
    output: Path, blocks: int = 61, experts: int = 384, finished: int | None = None, verified: bool = True
) -> Path:
    """Writes `<output>.run/` with `finished` of `blocks` blocks calibrated and returns it."""
    random, directory = np.random.default_rng(0), RunDirectory(output)
    path = directory.path
    (path / "logs").mkdir(parents=True)
    finished = blocks if finished is None else finished
    directory.record("fingerprint", plan="p" * 64, blocks=blocks, parts={})
    directory.event("plan", digest="p" * 64, versions={"torch": "2.13.0", "llmcompressor": "0.14.0.1"}, actions={})
    directory.event("stage_started", stage="calibrate")
    for block in range(finished):
        directory.event("load", block=block, name=f"layers.{block}")
        tokens = random.lognormal(8, 0.7, experts).astype(int)
        directory.event(
            "block", block=block + 1, blocks=blocks, name=f"layers.{block}", modules=3 * experts,
            seconds=float(120 + random.normal(0, 6)), export_seconds=14.0, worst_error=0.1, parity=0.0,
            tokens_per_expert={str(n): int(count) for n, count in enumerate(tokens)},
            expert_errors={str(n): float(error) for n, error in enumerate(random.normal(0.095, 0.001, experts))},
            peak_memory=int(1.2e11 + 1e8 * random.normal()), bytes_written=14_000_000_000, shards=[],
        )  # fmt: skip
        directory.record("shards", plan="p" * 64, block=block, shards={f"model-{block}.safetensors": "0"}, result={})
    if finished == blocks:
        directory.event("stage_finished", stage="calibrate", seconds=8123.4)
    _json(path / "plan.json", _plan(blocks))
    (path / "recipe.yaml").write_text("source: {checkpoint: /models/V4}  # <b>not bold</b>\n")
    if verified:
        _json(path / "fidelity.json", fidelity(random, blocks, experts))
        _json(path / "verify.json", to_json(CHECKS))
        _json(path / "serving.json", SERVED)
        directory.record("verified", structure="PASS", fidelity="FAIL", serving="UNCHECKED")
    return path


def remeasure(output: Path, losses: list[float], perplexity: float, **changes: Any) -> None:
    """Replaces what the serving engine measured on the run of `output`."""
    windows = [{"nll": loss} for loss in losses]
    _json(RunDirectory(output).path / "serving.json", SERVED | {"windows": windows, "perplexity": perplexity} | changes)


def batch(directory: BatchDirectory, root: Path) -> list[Entry]:
    """A night of six runs, one in every state that a batch knows."""
    size, hours = 911_300_000_000, 3600.0
    entries = {}
    for state in STATES:
        name = f"DeepSeek-V4-Pro-num_samples_256-{state}"
        entries[state] = Entry(
            name, "v4.yaml", str(root / f"{name}.yaml"), str(root / name), method="calibrate", plan_digest="p" * 64,
            recipe_digest="r", output_bytes=size, source_bytes=865_000_000_000, bits_per_parameter=4.63,
            parameters=1_573_000_000_000,
        )  # fmt: skip
        (directory.runs(name)).mkdir(parents=True)
        (directory.runs(name) / "log.txt").write_text("log")
    begun = {"fact": "begun", "host": socket.gethostname(), "pid": os.getpid(), "began": process_began(os.getpid())}
    over = {"seconds": 7 * hours, "peak_rss": 171_000_000_000}
    record = {state: partial(directory.record, entry.name) for state, entry in entries.items()}
    record["running"]("begun", **{key: value for key, value in begun.items() if key != "fact"})
    write(Path(entries["running"].output), finished=30, verified=False)
    record["retrying"]("ended", outcome="transient", reason="killed by SIGKILL (out of memory?)", **over)
    record["stopped"]("ended", outcome="stopped", reason="stopped after a finished block", **over)
    reason = "block 7 (model.layers.7), batch 0: the hidden states are not finite; is the source damaged? " * 2
    record["failed"]("gave_up", reason=reason)
    done = entries["done"]
    write(Path(done.output), blocks=3, experts=4)
    (done.run.path / "report.html").write_text("report")
    _json(done.run.path / "serving.json", SERVED)
    Path(done.output).mkdir()
    for name in ("model-0.safetensors", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"):
        (Path(done.output) / name).write_text("x")
    done.run.event("plan", digest="p" * 64, recipe="r")
    done.run.record("verified", structure="PASS", fidelity="PASS", serving="PASS")
    record["done"]("begun", **{key: value for key, value in begun.items() if key not in ("fact", "pid")}, pid=1)
    record["done"]("ended", outcome="done", reason="", **over)
    return list(entries.values())


SAMPLES = [
    {"kind": "short", "prompt": "The capital of France is", "text": " Paris.", "source_text": " Paris, the"},
    {"kind": "code", "prompt": "def f():\n" + "x" * 400, "text": "<img src=http://example.org/x>", "source_text": None},
]


#: What the serving engine measured.
SERVED: dict[str, Any] = {
    "samples": SAMPLES, "perplexity": 5.213, "windows": [{"nll": 1.62}, {"nll": 1.70}, {"nll": 1.63}],
    "scored": {"kind": "windows", "count": 3, "tokens": 1536, "digest": "d" * 64},
    "source": {
        "perplexity": 5.12, "nll_difference": 0.018, "nll_error": 0.002, "agreement": {"kl": 0.0123, "top1": 0.957}
    },
}  # fmt: skip


def fidelity(random: np.random.Generator, blocks: int, experts: int) -> dict[str, Any]:
    """The table that `verify.fidelity` writes, one expert of block 7 being a stranger."""
    rows: list[list[Any]] = []
    for block in range(blocks):
        for expert in range(experts):
            for projection in ("w1", "w2", "w3"):
                odd = (block, expert, projection) == (7, 200, "w2")
                error = 1.41 if odd else float(random.normal(0.095, 0.0008))
                module = f"layers.{block}.ffn.experts.{expert}.{projection}"
                rows.append(
                    [module, "routed expert", block, expert, projection, round(error, 5), 20.4, 0.995, 0.01, 0.0]
                )
    drift = np.cumsum(random.lognormal(-8, 0.3, blocks))
    figures = ["relative_error", "sqnr_db", "cosine", "saturated", "zero_groups"]
    return {
        "columns": ["module", "part", "block", "expert", "projection", *figures],
        "rows": rows,
        "blocks": [
            {
                "block": n,
                "cosine": 1 - 4e-4,
                "cosine_propagated": float(1 - drift[n]),
                "relative_error": 0.03,
                "tokens": 512,
            }
            for n in range(blocks)
        ],
        "group_scales": {"edges_log2": list(range(-9, 10)), "counts": {"routed expert": list(range(1, 19))}},
        "source": "Output and source dequantized, Frobenius norms.",
    }


def _plan(blocks: int) -> dict[str, Any]:
    return {
        "checkpoint": {
            "checkpoint": "/models/V4", "family": "deepseek_v4 (tested)", "model_type": "deepseek_v4",
            "parameters": 1_573_000_000_000,
            "bytes": 865_000_000_000, "blocks": blocks, "tensors": 139_583,
        },
        "plan": {
            "groups": {"experts": {"scheme": "NVFP4", "modules": 70455}}, "output_bytes": 911_300_000_000,
            "bits_per_parameter": 4.63, "digest": "p" * 64,
        },
    }  # fmt: skip


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
