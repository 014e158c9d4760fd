"""Faults that only the running engine betrays: it predicts otherwise than the source, which is served beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recipes.schema import Serving
from tests.faults.checkpoints import Good, make
from tests.faults.faults import FAULTS, Fault
from tests.reference.engine import VLLM_PYTHON, random_prompts
from verify.checks import Check
from verify.serving.serving import Experiment, source_as_stored, verify_serving

pytestmark = pytest.mark.slow


def served(good: Good, directory: Path, logs: Path) -> list[Check]:
    """The checks of a served checkpoint, its source served too. Random weights predict so little that no KL goes far
    above 1, the default limit: the recipe asks for more here."""
    options = Serving.model_validate(
        {"python": VLLM_PYTHON, "max_tokens": 8, "text": None, "require": {"max_kl": 0.3, "min_top1": 0.5}}
    )
    experiment, source = Experiment(random_prompts(1024, (40, 200))), source_as_stored(good.source, options)
    checks, _ = verify_serving(directory, options, logs, source=source, experiment=experiment)
    return checks


def failing(good: Good, directory: Path, logs: Path) -> list[str]:
    """The serving checks that say FAIL."""
    return [check.id for check in served(good, directory, logs) if check.verdict == "FAIL"]


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.level == "serving"], ids=lambda fault: fault.name)
def test_the_fault_is_caught(tmp_path: Path, fault: Fault) -> None:
    good = make(fault.base, tmp_path / "good")
    directory = Path(shutil.copytree(good.directory, tmp_path / "output"))
    fault.spoil(directory)
    assert fault.check in failing(good, directory, tmp_path / "logs")
    assert failing(good, good.directory, tmp_path / "good-logs") == []
