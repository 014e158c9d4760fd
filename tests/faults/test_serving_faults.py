"""Faults that only the running engine betrays: it predicts otherwise than the source, which is served beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.checkpoints import Good, make
from tests.faults.faults import FAULTS, Fault
from tests.faults.judge import served

pytestmark = pytest.mark.slow


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
