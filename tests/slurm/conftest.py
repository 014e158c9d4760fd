"""One Slurm, one set of sources and one reference output for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.batch_runs import QWEN, single_run, write_recipe, write_sources
from tests.slurm.local_cluster import LocalSlurm
from tests.slurm.slurm_runs import DATA


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    with LocalSlurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def reference(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one uninterrupted run with `DATA` writes, in one process."""
    root = tmp_path_factory.mktemp("reference")
    return single_run(write_recipe(root, "qwen", sources["qwen"], QWEN, calibration=DATA), root / "alone")
