"""Runs of the command line in real processes that can be killed, started by fork from one process that has imported
everything: an import costs seconds, a run of a tiny model tenths of one."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.forced import force_if_asked

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.integration.interrupted_runs", "tests.integration.late_imports"])
#: What changes files for good; a kill just before and just after each is every state that a crash can leave, but for
#: half-written files, which random kills leave.
STEPS = ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (shutil, "copyfile"))

Prepare = Callable[[], None]


def start(arguments: list[str], log: Path, prepare: Prepare | None = None) -> BaseProcess:
    """Starts `python -m workflows.run ARGUMENTS` in a process of its own; `prepare` (a picklable function) runs in it
    first, stdout and stderr go to `log`."""
    process = _CONTEXT.Process(target=_main, args=(arguments, log, prepare))  # type: ignore[attr-defined]
    process.start()
    return process  # type: ignore[no-any-return]


def wait_until(happened: Callable[[], bool], processes: list[BaseProcess]) -> None:
    """Fails if one of the processes ends before it has happened."""
    while not happened():
        time.sleep(0.02)
        assert all(process.is_alive() for process in processes), [process.exitcode for process in processes]


def interrupt(pid: int, number: signal.Signals) -> None:
    """Sends a signal and waits until it is taken: a second one that finds the first still waiting is lost with it."""
    os.kill(pid, number)
    while waiting_signals(pid) >> (number - 1) & 1:
        time.sleep(0.01)
    time.sleep(0.5)  # Python runs its handler after the call under way, which a busy machine makes long


def waiting_signals(pid: int) -> int:
    """The set of signals that were sent to a process and not taken yet, bit n - 1 for signal n; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    if "State:\tZ" in status:
        return 0
    return int(status.partition("ShdPnd:")[2].split()[0], 16)


def finish(arguments: list[str], log: Path, prepare: Prepare | None = None) -> tuple[int, str]:
    """Runs to the end; returns the exit code (-9 when killed) and what this run printed."""
    begin = log.stat().st_size if log.exists() else 0
    process = start(arguments, log, prepare)
    process.join(120)
    code, text = process.exitcode, log.read_text()[begin:]
    if code is None:
        process.kill()
    assert code is not None, f"still running after 120 s: {text}"
    return code, text


class KillAt:
    """Kills its own process with SIGKILL at the `number`-th step, or counts the steps into `count_to`."""

    def __init__(self, number: int, count_to: Path | None = None) -> None:
        self.number, self.count_to, self.seen = number, count_to, 0

    def __call__(self) -> None:
        for owner, name in STEPS:
            setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            result = original(*args, **kwargs)
            self._tick()
            return result

        return step

    def _tick(self) -> None:
        self.seen += 1
        if self.count_to is not None:
            self.count_to.write_text(str(self.seen))
        if self.seen == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def run_command(module: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS`, by fork from the process that has imported everything: the same but for 6 CPU-s."""
    with TemporaryDirectory() as directory:
        streams = [Path(directory) / name for name in ("stdout", "stderr")]
        process = _CONTEXT.Process(target=_run_command, args=(module, arguments, streams))  # type: ignore[attr-defined]
        process.start()
        process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in streams))


def _run_command(module: str, arguments: list[str], streams: list[Path]) -> None:
    for descriptor, path in enumerate(streams, 1):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    force_if_asked()
    sys.argv = [module, *arguments]
    warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of the module that is imported already
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _main(arguments: list[str], log: Path, prepare: Prepare | None) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from workflows.run.__main__ import main

    torch.set_num_threads(1)
    force_if_asked()
    if prepare is not None:
        prepare()
    sys.exit(main(arguments))
