"""One attempt at a run: its process, its log, its signals, and the processes that outlive it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import no_link
from calibration.runs.journal import process_began
from workflows.batch.state import BatchDirectory, Entry, alive
from workflows.interrupts import NOTICE

#: In the environment of every process that an attempt starts, so that what outlives it can be found.
MARK = "NVFP4_BATCH_RUN"
#: In the batch's directory: what dress rehearsals have proven, so that each different plan is rehearsed once.
REHEARSALS = "rehearsals"
_PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Slot:
    """GPUs that one run at a time has for itself, by their numbers; None: all that the machine has."""

    gpus: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return "" if self.gpus is None else "GPU " + ",".join(map(str, self.gpus))


@dataclass(eq=False)
class Child:
    """A process of `workflows.run`, in a session of its own: a Ctrl-C of the terminal does not reach it, and it survives
    the batch. `began`: seconds since the epoch; `log_from`: where its lines begin in `log`."""

    batch: BatchDirectory
    entry: Entry
    slot: Slot
    pid: int
    began: float
    log: Path
    log_from: int
    #: The line `begun` of an attempt that another process started.
    adopted: dict[str, Any] | None = None
    asked_to_stop: bool = False
    peak_rss: int | None = None
    cpu_seconds: float | None = None

    def __post_init__(self) -> None:
        #: `Entry.progress` at the start.
        self.before = self.entry.progress()

    @classmethod
    def start(
        cls, batch: BatchDirectory, entry: Entry, slot: Slot, overwrite: bool, launcher: Sequence[str] = (),
        first_node: bool = True,
    ) -> Child:  # fmt: skip
        """Starts the next attempt; `launcher`: the arguments before `-m workflows.run` (torchrun's). The process of a further
        node is part of the first node's attempt, but has a log of its own: what two hosts append to one file can be lost."""
        log = batch.runs(entry.name) / ("log.txt" if first_node else f"log.{socket.gethostname()}.txt")
        found = entry.output_state()
        if not has_work_for_ranks(entry):
            launcher = ()
        options = ["--from", "verify"] if found.kind == "verify" else []
        if found.kind == "foreign" and overwrite:
            options = ["--overwrite"]
        rehearsals = ["--rehearsals", str(batch.path / REHEARSALS)]
        environment = os.environ | {MARK: _mark(batch, entry), "PYTHONPATH": child_path()}
        if slot.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slot.gpus))
        log_from = log.stat().st_size if log.exists() else 0
        began = time.time()
        with open(log, "ab", opener=no_link) as file:
            process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "workflows.run", entry.recipe, *rehearsals, *options],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, preexec_fn=_prepare_torchrun if launcher else _prepare,
            )  # fmt: skip
        process.returncode = 0  # `poll` waits for it with wait4; Popen's destructor must not
        if first_node:
            batch.record(
                entry.name, "begun", pid=process.pid, began=process_began(process.pid), host=socket.gethostname(),
                log_from=log_from, slot=str(slot), options=options,
            )  # fmt: skip
        return cls(batch, entry, slot, process.pid, began, log, log_from)

    @classmethod
    def adopt(cls, batch: BatchDirectory, entry: Entry, attempt: dict[str, Any], slot: Slot) -> Child:
        """Watches an attempt whose batch was killed."""
        pid, began, log_from = int(attempt["pid"]), float(attempt["time"]), int(attempt["log_from"])
        return cls(batch, entry, slot, pid, began, batch.runs(entry.name) / "log.txt", log_from, attempt)

    def poll(self) -> tuple[bool, int | None]:
        """(whether it has ended, exit code as `judge_attempt` takes it)."""
        if self.adopted is not None:
            return not alive(self.adopted), None
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return False, None
        self.peak_rss = usage.ru_maxrss * 1024
        self.cpu_seconds = round(usage.ru_utime + usage.ru_stime, 1)
        return True, os.waitstatus_to_exitcode(status)

    def ask_to_stop(self, once: bool = False) -> None:
        """Sends SIGTERM: the run finishes its block; a second one stops it at once. `once`: sends nothing if the log says that
        the run was asked already, by a signal to all processes of a cluster's job. Under torchrun the workers get it."""
        self.asked_to_stop = True
        if once and NOTICE in _since(self.log, self.log_from):
            return
        for pid in _workers(self.pid) or [self.pid]:
            self._signal(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL to every process that the attempt started."""
        for pid in (self.pid, *_marked(_mark(self.batch, self.entry))):
            self._signal(pid, signal.SIGKILL)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        """Sends nothing to a process that attempts.jsonl names but no attempt of this batch started."""
        if self.adopted is None or pid in _marked(_mark(self.batch, self.entry)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_orphans(self) -> None:
        """Kills the processes that outlive their attempt (vLLM has a session of its own, and would keep its memory)."""
        for pid in _marked(_mark(self.batch, self.entry)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def has_work_for_ranks(entry: Entry) -> bool:
    """Whether several processes can share the next attempt: only calibration can be shared. A run with a budget has one: nodes
    would have to agree on whether it was measured already."""
    return not entry.budget and entry.method == "calibrate" and entry.output_state().kind not in ("verify", "done")


def child_path() -> str:
    """PYTHONPATH with this project in front: a run uses the code of its batch, whatever is installed."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(_PROJECT), *(path for path in inherited if path and path != str(_PROJECT))])


def resident_peak(pid: int) -> int | None:
    """Largest resident size so far of a living process, in bytes; None if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def torchrun(gpus: int, nodes: Sequence[str] = (), rank: int = 0, job: str = "") -> list[str]:
    """The arguments before `-m workflows.run` for one process per GPU; none for a single process. With several `nodes` (the
    names of all hosts) their agents meet at the first one, which has rank 0, at a port derived from the job's number; a
    node without GPUs has one process."""
    if max(gpus, 1) * max(len(nodes), 1) <= 1:
        return []
    ranks = ["-m", "torch.distributed.run", f"--nproc-per-node={max(gpus, 1)}", "--signals-to-handle=SIGQUIT"]
    if len(nodes) <= 1:
        return [*ranks, "--standalone"]
    # torchrun's c10d backend would ignore the nodes' order.
    return [
        *ranks, f"--nnodes={len(nodes)}", f"--node-rank={rank}", "--rdzv-backend=static", f"--rdzv-id={job}",
        f"--master-addr={nodes[0]}", f"--master-port={29400 + int(job) % 3000}",
    ]  # fmt: skip


def _prepare_torchrun() -> None:
    """torchrun's agent would kill its workers 30 seconds after a SIGTERM; they handle it themselves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _prepare()


def _prepare() -> None:
    """Slurm may send submitit's signal to every process of a job: only submitit's own must act on it. If memory runs out,
    the kernel must kill a run before the batch."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def _since(log: Path, begin: int) -> bytes:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(begin)
        return file.read()
    return b""


def _mark(batch: BatchDirectory, entry: Entry) -> str:
    return f"{batch.runs(entry.name).absolute()} on {socket.gethostname()}"


def _marked(mark: str) -> list[int]:
    wanted, found = f"{MARK}={mark}".encode(), []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def _workers(pid: int) -> list[int]:
    """The children of a torchrun process; none if `pid` is no torchrun."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"torch.distributed.run" in command:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            return [int(child) for child in children.split()]
    return []
