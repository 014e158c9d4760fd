"""The ranks of one run as torchrun starts them: how they synchronize, learn of a failure and end together.

Ranks meet at a barrier in torchrun's store and wait in Python, where a signal can end the wait. A rank that fails
publishes its failure in the store; a watcher thread of every rank checks the store and the other processes twice a
second. Collectives of gloo or nccl, which cannot be interrupted, only run right after a barrier, on data that is ready.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from calibration.checkpoint import native
from calibration.runs.journal import process_began
from calibration.runs.ranks import PATIENCE, Ended, Failure, Ranks
from recipes.errors import EnvironmentProblem, Interrupted, WorkflowError

T = TypeVar("T")

#: Seconds between two checks for failures, and between two heartbeats.
LOOK, BEAT = 0.5, 5.0
#: Seconds without a heartbeat after which a rank of another host counts as lost. A rank that computes still sends them.
SILENCE = 300.0
#: Seconds that one transfer of tensors may take, not counting the time in which rank 0 writes a shard.
TRANSFER = 3600.0
#: Seconds to end in good order after a failure; torchrun kills the remaining processes after 30.
GRACE = 20.0


class Stopped(KeyboardInterrupt):
    """Raised in the main thread after another rank failed; `Ranks.agree` returns that failure."""


class Process(NamedTuple):
    """Where a rank runs; `began` distinguishes it from a later process with the same pid."""

    host: str
    pid: int
    began: str | None


def connect() -> Ranks:
    """The ranks that torchrun started, or the only one. Raises EnvironmentProblem if they cannot connect."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=SILENCE)))
        return _Connected(store, rank, size)
    except (ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and the ranks cannot meet at MASTER_ADDR:MASTER_PORT: {error}; "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from None


class _Connected(Ranks):
    """One of several ranks. `store` is torchrun's; the module's docstring says what it is used for."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store: Any = PrefixStore("workflows", store)
        self._meetings, self._lost, self._ending, self._channel = 0, set[int](), False, False
        self._beats = {other: (b"", time.monotonic()) for other in range(size) if other != rank}
        self._beaten = 0.0
        pid = os.getpid()
        self.processes = list[Process]()
        # There are no heartbeats yet: if a rank dies now, this one only notices that it does not come.
        introduction = Process(socket.gethostname(), pid, process_began(pid))
        self.processes = [process for _, process in self._exchange("introduction", introduction, SILENCE)]
        self._visible = {
            other for other in self._beats
            if self.processes[other].host == self.processes[rank].host and self._lives(other)
        }  # fmt: skip
        signal.signal(signal.SIGUSR1, self._interrupt)
        sys.unraisablehook = partial(_report_unraisable, sys.unraisablehook)
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="other ranks", daemon=True)
        self._watcher.start()

    @property
    def speaks(self) -> bool:
        return self.rank == min(set(range(self.size)) - self._lost)

    @property
    def local(self) -> int:
        return sum(process.host == self.processes[self.rank].host for process in self.processes)

    @property
    def device(self) -> torch.device | None:
        accelerator = native.accelerator()
        # With its index: prefetch threads have a current device of their own.
        return None if accelerator is None else torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))

    def start(self) -> None:
        device = self.device
        if device is not None:
            count = torch.accelerator.device_count()
            if device.index >= count:
                raise EnvironmentProblem(
                    f"local rank {device.index} on {socket.gethostname()}: only {count} {device.type} devices there; "
                    f"give torchrun --nproc-per-node {count}"
                )
            torch.accelerator.set_device_index(device.index)
        self.all_gather("start", None)
        backend = "gloo"
        if device is not None:
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        # A store connection of its own: the watcher must be able to use the other one while the group waits for a rank.
        with self._channel_errors():
            dist.init_process_group(
                backend, store=PrefixStore("channel", self._store.clone()), rank=self.rank, world_size=self.size,
                timeout=timedelta(seconds=TRANSFER),
            )  # fmt: skip
        self._channel = True

    def stop(self) -> None:
        self.all_gather("stop", None)
        if self._channel:
            dist.destroy_process_group()
        self._channel = False

    def all_gather(self, what: str, value: T, patience: float = PATIENCE) -> list[T]:
        with self._channel_errors():
            posted = self._exchange(what, value, patience)
        strange = [name for name, _ in posted if name != what]
        if strange:
            raise RuntimeError(f"rank {self.rank} came for {what!r}, another one for {strange[0]!r}: a defect here")
        return [value for _, value in posted]

    def _exchange(self, what: str, value: T, patience: float) -> list[tuple[str, T]]:
        """What every rank posts at the next meeting, by rank. Raises RuntimeError if the store is gone."""
        self._meetings += 1
        keys = [f"meeting {self._meetings} {rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], pickle.dumps((what, value)))
        pause, began_waiting = 0.001, time.monotonic()
        while not self._store.check(keys):
            if time.monotonic() - began_waiting > patience:
                late = [self._name(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
                raise EnvironmentProblem(f"{what}: {', '.join(late)} did not come within {patience:.0f} s")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        posted = [pickle.loads(self._store.get(key)) for key in keys]
        if self._meetings > 2:  # all ranks have come here, so all have read the values of two barriers ago
            self._store.delete_key(f"meeting {self._meetings - 2} {self.rank}")
        return posted

    def all_reduce_min(self, tensor: torch.Tensor) -> None:
        with self._channel_errors():
            dist.all_reduce(tensor, dist.ReduceOp.MIN)

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        with self._channel_errors():
            dist.all_reduce(tensor, dist.ReduceOp.SUM)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        raw = self._bytes(tensor)
        with self._channel_errors():
            dist.broadcast(raw, source)
        tensor.copy_(raw.view(tensor.dtype).reshape(tensor.shape))

    def send(self, tensor: torch.Tensor, target: int = 0) -> None:
        with self._channel_errors():
            dist.send(self._bytes(tensor), target)

    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        with self._channel_errors():
            dist.recv(raw, source)
        return raw.view(dtype).reshape(tuple(shape))

    def _bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(self.device or "cpu")

    def failing(self) -> bool:
        return self._look() is not None

    def agree(self, error: WorkflowError) -> WorkflowError:
        self._ending = True
        problems = list(error.problems)
        if self.rank and not isinstance(error, Interrupted):
            problems[0] = f"{self._name(self.rank)}: {problems[0]}"
        self.failure = self.failure or self._look() or self._publish(Failure(self.rank, error.exit_code, problems))
        return Ended(self.failure)

    def end(self) -> None:
        self._ending, until = True, time.monotonic() + 2 * GRACE
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(RuntimeError):
            self._store.set(f"left {self.rank}", b"1")
            while self.failure is not None and time.monotonic() < until:
                if all(self._store.check([f"left {other}"]) or self._gone(other) for other in self._beats):
                    break
                time.sleep(0.02)
        self._done.set()
        self._watcher.join()
        if self._channel and self.failure is not None and self.device is not None:
            os._exit(self.failure.exit_code)  # destroying a broken nccl group may wait for the lost rank

    def _name(self, rank: int) -> str:
        process = self.processes[rank] if self.processes else None
        return f"rank {rank} of {self.size}" + (f" on {process.host} (pid {process.pid})" if process else "")

    def _publish(self, failure: Failure) -> Failure:
        """Publishes `failure`; returns the one that was published first."""
        with suppress(RuntimeError):
            published = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
            failure = Failure(**json.loads(published))
        return failure

    def _watch(self) -> None:
        found_at = None
        while not self._done.wait(LOOK):
            self.failure = self.failure or self._look()
            if self.failure is None or self._ending:
                continue
            found_at = found_at or time.monotonic()
            if time.monotonic() - found_at > GRACE:  # the main thread hangs in a collective
                if self.speaks:
                    os.write(2, ("error: " + "\n".join(self.failure.problems) + "\n").encode())
                os._exit(self.failure.exit_code)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _interrupt(self, number: int, frame: object) -> None:
        if self.failure is not None and not self._ending:
            raise Stopped

    def _look(self) -> Failure | None:
        """A published failure, or the loss of a rank that ended without publishing one."""
        try:
            failure = self._published()
            if failure is None:
                self._give_sign()
                gone = next((other for other in self._beats if self._gone(other)), None)
                # A rank that failed publishes its failure before it ends.
                failure = self._published() or (None if gone is None else self._publish(self._loss(gone)))
        except RuntimeError:  # the store is gone, and torchrun with it
            local = {other for other in self._visible if self._lives(other)}
            self._lost |= self._beats.keys() - local
            gone = min(self._lost, default=0)
            # A rank that has lost torchrun's own store ends by itself. Without torchrun rank 0 has the store.
            known = gone in self._visible - local and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            failure = self._loss(gone if known else None)
        if failure is not None and failure.lost:
            self._lost.add(failure.rank)
        return failure

    def _published(self) -> Failure | None:
        if not self._store.check(["failure"]):
            return None
        return Failure(**json.loads(self._store.get("failure")))

    def _give_sign(self) -> None:
        now = time.monotonic()
        if now - self._beaten < BEAT:
            return
        self._beaten = now
        self._store.set(f"beat {self.rank}", str(now))
        for other, (last, _) in self._beats.items():
            beat = self._store.get(f"beat {other}") if self._store.check([f"beat {other}"]) else b""
            if beat != last:
                self._beats[other] = beat, now

    def _gone(self, other: int) -> bool:
        dead = other in self._visible and not self._lives(other)
        silent = time.monotonic() - self._beats[other][1] > SILENCE
        return (dead or silent) and not self._store.check([f"left {other}"])

    def _lives(self, other: int) -> bool:
        return process_began(self.processes[other].pid) == self.processes[other].began is not None

    def _loss(self, rank: int | None) -> Failure:
        rest = "all ranks have stopped; what is finished stays, run the same command again to resume"
        if rank is None:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            what = f"torchrun's store at {where} no longer answers: torchrun or its host has ended"
        elif rank in self._visible and not self._lives(rank):
            what = f"{self._name(rank)} is gone without a word: killed, or out of memory"
        else:
            what = f"{self._name(rank)} has given no sign of life for {SILENCE:.0f} s"
        return Failure(rank or 0, EnvironmentProblem.exit_code, [f"{what}; {rest}"], lost=rank is not None)

    @contextmanager
    def _channel_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # The connection to a rank that ended breaks before the watcher notices: wait for the watcher, whose message
            # says more.
            time.sleep(4 * LOOK)
            raise EnvironmentProblem(f"{self._name(self.rank)}: the connection to the others broke: {error}") from None


def _report_unraisable(report: Callable[[Any], Any], caught: Any) -> None:
    """Keeps Python from printing a Stopped raised where it is dropped (a finalizer, a weak reference's callback); it is
    raised again."""
    if caught.exc_type is not Stopped:
        report(caught)
