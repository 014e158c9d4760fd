"""A real pretrained model: SmolLM2-135M-Instruct to NVFP4 W4A4, and English comes out of vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.whole_runs import LINEAR, run, write_recipe
from tests.models import smollm2
from tests.reference.engine import FORKED_PYTHON

pytestmark = pytest.mark.slow


def test_smollm2_speaks_english_after_nvfp4(tmp_path: Path) -> None:
    source = smollm2.write(tmp_path / "source")
    serving = {"python": FORKED_PYTHON, "max_tokens": 24, "prompts": ["The capital of France is the city of"]}
    recipe = write_recipe(
        tmp_path,
        source,
        LINEAR,
        calibration={"dataset": "bundled", "num_samples": 32, "max_seq_length": 512, "batch_size": 4},
        verify={"serving": serving | {"require": {"max_perplexity": 100}}},
    )
    done = run(recipe, "--json")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdicts"] == {"structure": "PASS", "fidelity": "PASS", "serving": "PASS"}
    text = " ".join(sample["text"] for sample in result["samples"])
    words = [word.strip(".,:;!?\"'()").lower() for word in text.split()]
    common = {"the", "of", "and", "a", "to", "in", "is", "it", "that", "for", "was", "on", "are", "as", "with", "we"}
    assert sum(word in common for word in words) >= 0.15 * len(words), text
    assert "Paris" in result["samples"][0]["text"], result["samples"][0]
