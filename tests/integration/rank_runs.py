"""Runs of several ranks: processes of `interrupted_runs` with the environment that torchrun gives its own, and torchrun
itself."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.integration.attempts import Attempt
from tests.integration.interrupted_runs import Prepare, start


def as_rank(rank: int, size: int, port: int, then: Prepare | None) -> None:
    """Makes this process one of `size` ranks of this host; then runs `then`."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    if then is not None:
        then()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def start_ranks(
    attempt: Attempt, size: int = 2, prepare: Mapping[int, Prepare] | None = None, *options: str
) -> list[BaseProcess]:
    """Starts the ranks of one run; `prepare` maps a rank to what happens first in it. All write to one log."""
    port, prepare = free_port(), prepare or {}
    return [
        start(
            [str(attempt.recipe), *options], attempt.log, partial(as_rank, rank, size, port, prepare.get(rank))
        )
        for rank in range(size)
    ]  # fmt: skip


def end_ranks(attempt: Attempt, ranks: list[BaseProcess], since: int = 0) -> list[int]:
    """Waits for all ranks; their exit codes. `attempt.text` is what the run printed from byte `since` on."""
    deadline = time.monotonic() + 120
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        if process.exitcode is None:
            process.kill()
    attempt.text = attempt.log.read_bytes()[since:].decode(errors="replace")
    assert None not in codes, f"still running after 120 s: {codes} {attempt.text}"
    attempt.code = codes[0] or 0
    return [code for code in codes if code is not None]


def go(attempt: Attempt, size: int = 2, prepare: Mapping[int, Prepare] | None = None, *options: str) -> list[int]:
    """One run of `size` ranks to its end; their exit codes."""
    since = attempt.log.stat().st_size if attempt.log.exists() else 0
    return end_ranks(attempt, start_ranks(attempt, size, prepare, *options), since)


def messages(attempt: Attempt) -> list[str]:
    """The error lines of the last run."""
    return [line for line in attempt.text.splitlines() if line.startswith("error: ")]


def met(attempt: Attempt) -> Callable[[], bool]:
    """Whether the ranks have found each other: rank 0 has begun to tell of its stages."""
    return lambda: attempt.log.exists() and b"[inspect]" in attempt.log.read_bytes()


def block_begun(attempt: Attempt, block: int) -> Callable[[], bool]:
    """Whether the run's log of events says that `block` (from 0) is loaded."""
    events: Path = attempt.run_directory / "events.jsonl"
    return lambda: events.exists() and f'"event": "load", "block": {block}' in events.read_text()


def send(process: BaseProcess, number: signal.Signals) -> None:
    os.kill(process.pid or 0, number)
