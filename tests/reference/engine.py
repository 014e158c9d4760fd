"""The real engine for tests: where it is, and one call that serves a checkpoint and returns logits and checks."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from recipes.checks import Serving
from tests.reference import forks
from tests.reference.compare import engine_logits
from verify.checks import Check
from verify.inside_vllm.processor import AT_IMPORT, PROBES
from verify.serving.serving import Experiment, verify_serving

PROCESSOR: dict[str, bool] = json.loads(os.environ.get("TEST_PROCESSOR", "{}"))
"""What `serve` makes vLLM believe of the CPU: TEST_PROCESSOR='{"amx": true}' runs the tests as on a machine with AMX."""
VLLM_PYTHON = os.environ.get("VLLM_PYTHON", str(Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"))
_FORKS = not set(AT_IMPORT) & set(PROCESSOR) and not torch.cuda.is_available()  # tried on the CPU only
FORKED_PYTHON = str(Path(__file__).with_name("forked_python")) if _FORKS else VLLM_PYTHON
"""VLLM_PYTHON without the 6 CPU-s of importing vLLM, see forks.py; VLLM_PYTHON itself where an import cannot be shared."""


def claims_too_much() -> bool:
    """Whether PROCESSOR has something that the processor at hand lacks."""
    return any(has and not getattr(torch.cpu, PROBES[feature])() for feature, has in PROCESSOR.items())


def random_prompts(vocab: int, lengths: tuple[int, ...] = (1, 3, 40, 300), seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of random token ids; 300 tokens close two windows of 128 and slide one."""
    chooser = random.Random(seed)
    return [{"kind": f"random {n}", "token_ids": [chooser.randrange(vocab) for _ in range(n)]} for n in lengths]


def serve(
    checkpoint: Path,
    log_dir: Path,
    prompts: list[dict[str, Any]],
    *,
    moe_input_scales: str = "stored",
    processor: Mapping[str, bool] | None = None,
    **options: Any,
) -> tuple[dict[str, Check], dict[str, Any], list[list[int]], list[torch.Tensor]]:
    """Serve in float32; returns checks by id, the worker's result, and token ids and logits per prompt.

    processor: what vLLM believes of the CPU, PROCESSOR unless said otherwise. `python`: FORKED_PYTHON unless said otherwise.
    """
    captured = log_dir / "captured"
    pretended = PROCESSOR if processor is None else processor
    defaults = {"python": FORKED_PYTHON, "dtype": "float32", "max_tokens": 8, "text": None}
    serving = Serving.model_validate(defaults | options)
    experiment = Experiment(prompts, captured, moe_input_scales, pretended)
    at_import = {feature: has for feature, has in pretended.items() if feature in AT_IMPORT}
    with patch.dict(os.environ, {forks.PROCESSOR: json.dumps(at_import)} if at_import else {}):
        checks, result = verify_serving(checkpoint, serving, log_dir, experiment=experiment)
    ids, logits = engine_logits(captured) if captured.exists() else ([], [])
    return {check.id: check for check in checks}, result, ids, logits
