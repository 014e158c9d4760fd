"""One interpreter per test process that has imported vLLM and forks for every run: see preloaded.py."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from functools import cache
from pathlib import Path

from verify.serving.engine import environment

PRELOADED = Path(__file__).with_name("preloaded.py")


class Resident:
    """Runs `[python, WORKER, REQUEST, RESULT]` as `verify.serving.engine.run_process` does, by fork."""

    def __init__(self, python: str, worker: str) -> None:
        self.process = subprocess.Popen(
            [python, "-P", str(PRELOADED), worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)

    def run(self, command: list[str], log: Path, timeout: float) -> tuple[int, bool]:
        """The exit code (negative: the signal) and whether time ran out; whatever the run started is killed."""
        assert self.process.stdin is not None
        log.write_bytes(b"")
        self.process.stdin.write(json.dumps([*command[2:], str(log)]).encode() + b"\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + timeout
        child = int(self._line(deadline) or 0)
        assert child, "the import of vLLM took longer than a whole run may"
        try:
            code = self._line(deadline)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        if code is None:
            self._line(time.monotonic() + 60)
        return int(code or 0), code is None

    def _line(self, deadline: float) -> bytes | None:
        """The next answer; None when there is none in time."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            found = b""
            while not found.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                byte = os.read(self.process.stdout.fileno(), 1)
                assert byte, f"preloaded.py ended: {self.process.wait()}"
                found += byte
            return found

    def close(self) -> None:
        """End the interpreter."""
        self.process.kill()
        self.process.wait()


@cache
def resident(python: str, worker: str) -> Resident:
    """The one of this test process."""
    return Resident(python, worker)


def run_resident(command: list[str], log: Path, timeout: float) -> tuple[int, bool]:
    """`verify.serving.engine.run_process` without the import of vLLM."""
    return resident(*command[:2]).run(command, log, timeout)
