"""Freed memory is used again without page faults, and the collector leaves out what existed before a run."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from calibration.checkpoint.collector import collector_paused, objects_frozen

#: Ten times 40 MiB, above what glibc would ever keep in its heap: prints the page faults of all but the first.
FAULTS = """
import resource
import sys
{before}
def use():
    return len(b"x" * (40 << 20))
use()
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(9):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


def faults(before: str) -> int:
    command = [sys.executable, "-c", FAULTS.format(before=before)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_large_tensor_after_another_causes_no_page_faults() -> None:
    reused = faults("from calibration.model.heap import reuse_freed_memory; reuse_freed_memory()")
    assert 20 * reused < faults("")


class Node:
    other: Node


def cycle() -> weakref.ref[Node]:
    left, right = Node(), Node()
    left.other, right.other = right, left
    return weakref.ref(left)


def test_nothing_is_collected_while_the_collector_is_paused_and_it_is_as_before_afterwards() -> None:
    @collector_paused()
    def failing() -> None:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ValueError

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with pytest.raises(ValueError):
                failing()
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


def test_only_what_is_made_inside_is_collected_inside() -> None:
    gc.collect()
    old = cycle()
    with objects_frozen():
        with objects_frozen(), collector_paused():  # neither thaws what the outer one has frozen
            pass
        new = cycle()
        gc.collect()
        assert old() is not None and new() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None
