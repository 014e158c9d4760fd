"""The real engine for tests: where it is, and one call that serves a checkpoint and returns logits and checks."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch

from recipes.schema import Serving
from tests.reference.compare import engine_logits
from verify.checks import Check
from verify.serving import verify_serving

VLLM_PYTHON = os.environ.get("VLLM_PYTHON", str(Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"))


def random_prompts(vocab: int, lengths: tuple[int, ...] = (1, 3, 40, 300), seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of random token ids; 300 tokens close two windows of 128 and slide one."""
    chooser = random.Random(seed)
    return [{"kind": f"random {n}", "token_ids": [chooser.randrange(vocab) for _ in range(n)]} for n in lengths]


def serve(
    checkpoint: Path, log_dir: Path, prompts: list[dict[str, Any]], moe_input_scales: str = "stored", **options: Any
) -> tuple[dict[str, Check], dict[str, Any], list[list[int]], list[torch.Tensor]]:
    """Serve in float32; returns checks by id, the worker's result, and token ids and logits per prompt."""
    captured = log_dir / "captured"
    defaults = {"python": VLLM_PYTHON, "dtype": "float32", "max_tokens": 8, "text": None}
    serving = Serving.model_validate(defaults | options)
    checks, result = verify_serving(
        checkpoint, serving, log_dir, prompts=prompts, write_logits=captured, moe_input_scales=moe_input_scales
    )
    ids, logits = engine_logits(captured) if captured.exists() else ([], [])
    return {check.id: check for check in checks}, result, ids, logits
