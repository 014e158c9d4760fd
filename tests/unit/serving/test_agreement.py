"""Whether two sets of logits are those of one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from calibration.families.registry import open_source
from calibration.model.own_logits import own_logits
from tests.models import any_family
from verify.serving.agreement import engine_logits, judge_forward

GENERATOR = torch.Generator().manual_seed(0)
EXACT = [2 * torch.randn(length, 64, generator=GENERATOR) for length in (3, 100, 97)]


def noisy(size: float, share: float = 1.0) -> list[torch.Tensor]:
    """EXACT with noise at a share of all positions."""
    found = []
    for logits in EXACT:
        noise = size * torch.randn(logits.shape, generator=GENERATOR)
        found.append(logits + noise * (torch.rand(len(logits), 1, generator=GENERATOR) < share))
    return found


@pytest.mark.parametrize(
    ("engine", "own", "verdict"),
    [
        pytest.param(noisy(1e-6), None, "PASS", id="another order of float32 sums"),
        pytest.param(noisy(1.0, 0.05), None, "PASS", id="a token between two experts now and then"),
        pytest.param(noisy(1e-2), None, "FAIL", id="another model by little"),
        pytest.param(noisy(1.0, 0.3), None, "FAIL", id="another model at a third of all positions"),
        pytest.param(noisy(2e-2), noisy(2e-2), "PASS", id="as much as rounding costs"),
        pytest.param(noisy(2e-1), noisy(2e-2), "FAIL", id="more than rounding costs"),
        pytest.param(noisy(1.0), noisy(1.0), "UNCHECKED", id="where rounding costs too much"),
        pytest.param(noisy(float("nan")), None, "FAIL", id="NaN"),
        pytest.param(noisy(float("nan")), noisy(float("nan")), "FAIL", id="NaN, also by rounding"),
        pytest.param([logits[:, :-1] for logits in EXACT], None, "FAIL", id="another vocabulary"),
    ],
)
def test_one_model_differs_by_rounding_alone(
    engine: list[torch.Tensor], own: list[torch.Tensor] | None, verdict: str
) -> None:
    check = judge_forward(EXACT, engine, own, "")
    assert check.verdict == verdict, check
    assert check.id == "serving.forward"


def test_the_engines_logits_come_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        tensors = {"token_ids": torch.tensor([number]), "logits": torch.full((1, 4), float(number))}
        save_file(tensors, tmp_path / f"prompt.{number}.safetensors")
    ids, logits = engine_logits(tmp_path)
    assert ids == [[0], [2], [10]] and [float(found[0, 0]) for found in logits] == [0.0, 2.0, 10.0]


def test_transformers_own_logits_are_those_of_the_whole_model_in_memory(tmp_path: Path) -> None:
    """In float32, of rows of different lengths in their order, while one block at a time is in memory."""
    directory = any_family.write(tmp_path / "source", "granitemoe")
    rows = [[5, 6, 7], [8, 9], [10, 11, 12]]
    found = own_logits(open_source(directory), rows, tmp_path, torch.float32, False)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    for row, logits in zip(rows, found, strict=True):
        with torch.no_grad():
            wanted = whole(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    rounded = own_logits(open_source(directory), rows, tmp_path, torch.bfloat16, False)
    assert 1e-3 < float((rounded[0] - found[0]).abs().max()) < 1.0
