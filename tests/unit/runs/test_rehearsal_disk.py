"""Disks before the work: room on the real file system, a real probe file, and activations by their formula."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from calibration.checkpoint.files import write_safely
from calibration.forecast.cost import boundary_bytes, scratch_bytes
from calibration.runs.disk import Need, existing, probe_write, space_problems
from calibration.runs.memory import anonymous_memory, available_memory
from recipes.errors import EnvironmentProblem
from workflows.batch.outcome import _FULL


def test_needs_of_one_file_system_are_added(tmp_path: Path) -> None:
    half = shutil.disk_usage(tmp_path).free * 2 // 3
    output, scratch = Need("output", tmp_path / "a" / "b", half), Need("activations", tmp_path / "c", half)
    assert space_problems([output]) == space_problems([scratch]) == []
    (problem,) = space_problems([output, scratch])
    assert f"output {half:,} and activations {half:,}" in problem and f"needs {2 * half:,}" in problem


def file_system(inodes: int, free: int) -> Callable[[object], SimpleNamespace]:
    """statvfs of a file system with eight blocks of 512 bytes free."""
    return lambda place: SimpleNamespace(f_files=inodes, f_favail=free, f_blocks=9, f_bfree=8, f_bavail=8, f_frsize=512)


def test_inodes_are_counted_and_told_as_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [Need("output", tmp_path / "a", 1, 20), Need("activations", tmp_path, 0, 10)]
    assert space_problems(needs) == []
    monkeypatch.setattr(os, "statvfs", file_system(100, 29))
    (problem,) = space_problems(needs)
    assert "29 inodes free, the run needs 30 (output 20 and activations 10); remove files there" in problem
    monkeypatch.setattr(os, "statvfs", file_system(0, 0))
    assert space_problems(needs) == []  # btrfs counts none


def test_a_write_without_an_inode_names_the_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(partial: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for inodes, said in (
        (0, "no inode is left .*4,096 bytes are free"),
        (1, "the disk is full: 7 bytes wanted, 4,096 free"),
    ):
        monkeypatch.setattr(os, "statvfs", file_system(9, inodes))
        with pytest.raises(EnvironmentProblem, match=said) as caught:
            write_safely(tmp_path / "not" / "there", full, 7)
        assert any(words in str(caught.value) for words in _FULL)  # a batch waits for room


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
