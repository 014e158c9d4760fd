"""Disks before the work: room on the real file system, a real probe file, and activations by their formula."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from calibration.cost import boundary_bytes, scratch_bytes
from calibration.disk import Need, existing, probe_write, space_problems
from calibration.memory import anonymous_memory, available_memory
from recipes.errors import EnvironmentProblem


def test_needs_of_one_file_system_are_added(tmp_path: Path) -> None:
    half = shutil.disk_usage(tmp_path).free * 2 // 3
    output, scratch = Need("output", tmp_path / "a" / "b", half), Need("activations", tmp_path / "c", half)
    assert space_problems([output]) == space_problems([scratch]) == []
    (problem,) = space_problems([output, scratch])
    assert f"output {half:,} and activations {half:,}" in problem and f"needs {2 * half:,}" in problem


def test_probe_leaves_nothing(tmp_path: Path) -> None:
    assert probe_write(tmp_path / "not" / "there", "tag", 3 << 20) > 0
    assert not list(tmp_path.iterdir()) and existing(tmp_path / "not" / "there") == tmp_path


@pytest.mark.parametrize("place", ["/proc/nvfp4", "file"])
def test_probe_names_the_place_that_takes_no_file(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    where = tmp_path / place
    with pytest.raises(EnvironmentProblem, match="cannot be written there"):
        probe_write(where, "tag", 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_scratch_holds_two_boundaries_at_most() -> None:
    """As counted in a run by test_disk_holds_two_boundaries_at_most, and what enters the first block beyond the limit."""
    assert [scratch_bytes(100, blocks, None) for blocks in (1, 2, 3, 60)] == [100, 200, 200, 200]
    assert [scratch_bytes(100, blocks, 30) for blocks in (1, 2, 3)] == [70, 170, 200]
    assert boundary_bytes(10, [(2, 5), (1, 3)]) == 13 * (20 + 24) + 2 * 25 * 2 + 9 * 2


def test_available_memory_is_no_more_than_the_machine_has() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert anonymous_memory() < available_memory() <= total
