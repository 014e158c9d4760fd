"""A function that runs a stranger's program (a chat template, the regexes of a tokenizer), called in a forked process with
bounds on time and memory.

A signal handler interrupts no single long operation of the interpreter (`'x' * 10**10`), and a thread cannot be ended. A
process can: its address space, its processor time and the size of its answers are limited by the system, and whatever
it does otherwise (endless loop, crash of the interpreter) ends the process and not the run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Self

SECONDS, BYTES_A_SECOND = 10, 100_000
"""Processor time of one call, and the bytes of arguments that give it one second more."""
WALL_SECONDS = 600
"""Of one call on a machine that has no processor time to give, on top of the seconds above."""
MEMORY, MEMORY_SHARE = 1 << 30, 1000
"""Bytes that the process may take on top of what it has when it begins, and those for every byte of the arguments."""
ANSWER, ANSWER_SHARE = 1 << 20, 10
"""Bytes of an answer at most, and those for every byte of the arguments."""
_DONE, _RAISED = b"=", b"!"


class Exceeded(Exception):
    """The function broke a bound or its process; the message says which."""


class Bounded:
    """`function(*arguments) -> bytes` in a process of its own, forked at the first call and again after one that broke it.

    Arguments are pickled; answers come back as bytes, never as pickles. Use as a context manager: leaving it ends the
    process. The function sees this process as it was at the fork.
    """

    def __init__(self, function: Callable[..., bytes]) -> None:
        self._function = function
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def __call__(self, *arguments: Any) -> bytes:
        """The function's answer. Raises Exceeded for a broken bound, and ValueError with the type and first line of
        what the function raised."""
        connection, sent = self._connection or self._start(), ForkingPickler.dumps(arguments)
        most = ANSWER + ANSWER_SHARE * len(sent)
        try:
            connection.send_bytes(sent)
            if not connection.poll(WALL_SECONDS + _seconds(sent)):
                raise Exceeded(f"no end within {WALL_SECONDS + _seconds(sent)} seconds")
            answer = connection.recv_bytes(most + 1)
        except (EOFError, ConnectionError):
            raise Exceeded(self._why(_seconds(sent))) from None
        except OSError:  # recv_bytes, of an answer that is too long
            self._end()
            raise Exceeded(f"an answer of more than {most:,} bytes") from None
        except BaseException:
            self._end()
            raise
        if answer[:1] == _RAISED:
            raise ValueError(answer[1:].decode("utf-8", errors="replace"))
        return answer[1:]

    def _start(self) -> Connection:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._function, theirs, ours), daemon=True)
        self._process.start()
        theirs.close()
        self._connection = ours
        return ours

    def _why(self, seconds: int) -> str:
        """How the process ended, which it has or is about to."""
        self._process.join(WALL_SECONDS)
        code = self._process.exitcode
        self._end()
        if code == -signal.SIGXCPU:
            return f"no end within {seconds} seconds of processor time"
        if code == -signal.SIGABRT:  # what Rust code does when it gets none
            return "its process ended with SIGABRT, as for want of memory"
        return f"its process ended with {signal.Signals(-code).name if code and code < 0 else f'exit code {code}'}"

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process.close()
        self._connection = self._process = None


def _serve(function: Callable[..., bytes], connection: Connection, parents: Connection) -> None:
    """The process: answers calls until the parent closes its end, or is gone."""
    parents.close()
    faulthandler.disable()
    # Ctrl-C goes to the whole terminal; this process ends with its parent. What it prints is nobody's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    _limit(resource.RLIMIT_CORE, 0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    begins_with = _address_space()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            received = connection.recv_bytes()
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + _seconds(received))
            _limit(resource.RLIMIT_AS, begins_with + MEMORY + MEMORY_SHARE * len(received))
            connection.send_bytes(_answer(function, ForkingPickler.loads(received)))
    os._exit(0)


def _answer(function: Callable[..., bytes], arguments: tuple[Any, ...]) -> bytes:
    try:
        return _DONE + function(*arguments)
    except MemoryError:
        return _RAISED + f"MemoryError: more than {MEMORY >> 20} MiB of memory".encode()
    except BaseException as error:  # the program's own, of any type: a panic of Rust code is no Exception
        first = (str(error).strip().splitlines() or [""])[0]
        return _RAISED + f"{type(error).__name__}: {first}"[:500].encode("utf-8", errors="replace")


def _seconds(arguments: Any) -> int:
    return SECONDS + len(arguments) // BYTES_A_SECOND


def _limit(kind: int, value: int) -> None:
    """The soft limit, at most the hard one."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
