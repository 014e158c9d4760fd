"""A tiny source for all tests of this folder, and a batch for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import standard
from workflows.batch.state import BatchDirectory


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standard.write(tmp_path_factory.mktemp("source") / "model", "qwen3")


@pytest.fixture
def batch(tmp_path: Path) -> BatchDirectory:
    return BatchDirectory(tmp_path / "b.run")
