"""Measures the memory that a run itself holds: anonymous pages, without the source's mapped files, which the system may
drop."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")


class Sampler:
    """Calls `sample` every `seconds` in a thread of its own while the context is open."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def sample(self) -> None:
        """Looks once; a subclass says at what."""
        raise NotImplementedError

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            self.sample()


class PeakMemory(Sampler):
    """Samples this process's anonymous memory."""

    def __init__(self) -> None:
        super().__init__(seconds=0.02)
        self._peak = 0

    def sample(self) -> None:
        """Takes the memory of this moment into the peak."""
        self._peak = max(self._peak, anonymous_memory())

    def take(self) -> int:
        """The highest sample since the last call, in bytes."""
        peak, self._peak = max(self._peak, anonymous_memory()), 0
        return peak


def anonymous_memory() -> int:
    """Anonymous resident memory of this process in bytes; if the system does not report it, the peak of all resident
    memory."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory() -> int:
    """Bytes of anonymous memory that this process can have, including what it already holds: the machine's available
    memory, or less if a control group limits it."""
    page = Path("/proc/meminfo").read_text()
    free = next(int(line.split()[1]) * 1024 for line in page.splitlines() if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    for limit, statistics, key in (
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ):
        try:
            lines = (group / statistics).read_text().splitlines()
            used = next(int(line.split()[1]) for line in lines if line.split()[0] == key)
            free = min(free, int((group / limit).read_text()) - used)
        except (OSError, ValueError, StopIteration):  # no such group, or "max"
            continue
    return free + anonymous_memory()
