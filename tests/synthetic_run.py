"""A run directory as a long run leaves it, with figures from a random generator: for tests of what reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from calibration.journal import RunDirectory
from verify.checks import Check
from verify.report import to_json

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
        _json(path / "serving.json", {"samples": SAMPLES})
        directory.record("verified", structure="PASS", fidelity="FAIL", serving="UNCHECKED")
    return path


SAMPLES = [
    {"kind": "short", "prompt": "The capital of France is", "text": " Paris.", "source_text": " Paris, the"},
    {"kind": "code", "prompt": "def f():\n" + "x" * 400, "text": "<img src=http://example.org/x>", "source_text": None},
]


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
            "checkpoint": "/models/V4", "family": "deepseek_v4", "parameters": 1_573_000_000_000,
            "bytes": 865_000_000_000, "blocks": blocks,
        },
        "plan": {
            "groups": {"experts": {"scheme": "NVFP4", "modules": 70455}}, "output_bytes": 911_300_000_000,
            "bits_per_parameter": 4.63, "digest": "p" * 64,
        },
    }  # fmt: skip


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
