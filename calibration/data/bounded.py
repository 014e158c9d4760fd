"""Calls a function that runs a stranger's program (a chat template, a tokenizer's regexes) in a forked process with
bounds on time and memory.

A signal handler cannot interrupt a single long operation of the interpreter (`'x' * 10**10`), and a thread cannot be
killed. A process can: the system limits its address space and CPU time, and anything else it does (endless loop, crash
of the interpreter) ends the process, not the run.
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
"""CPU seconds of one call, and the bytes of arguments that add one second."""
WALL_SECONDS = 600
"""Additional wall-clock seconds of one call, for a machine without idle processors."""
MEMORY, MEMORY_SHARE = 1 << 30, 1000
"""Bytes that the process may allocate after its start, and additional bytes per byte of arguments."""
ANSWER, ANSWER_SHARE = 1 << 20, 10
"""Largest answer in bytes, and additional bytes per byte of arguments."""
_DONE, _RAISED = b"=", b"!"


class Exceeded(Exception):
    """Raised if the function exceeded a bound or its process died; the message says which."""


class Bounded:
    """`function(*arguments) -> bytes` in a process of its own, forked at the first call and again after a call that
    killed it.

    Arguments are pickled; answers come back as bytes, never as pickles. Use as a context manager: leaving it ends the
    process. The function sees the state of this process at the time of the fork.
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
        """The function's answer. Raises Exceeded if a bound is exceeded, and ValueError with the type and first line of
        an exception of the function."""
        connection, sent = self._connection or self._start(), ForkingPickler.dumps(arguments)
        most = ANSWER + ANSWER_SHARE * len(sent)
        try:
            connection.send_bytes(sent)
            if not connection.poll(WALL_SECONDS + _seconds(sent)):
                raise Exceeded(f"no end within {WALL_SECONDS + _seconds(sent)} seconds")
            answer = connection.recv_bytes(most + 1)
        except (EOFError, ConnectionError):
            raise Exceeded(self._why(_seconds(sent))) from None
        except OSError:  # raised by recv_bytes if the answer is too long
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
        """How the process ended; waits for its end."""
        self._process.join(WALL_SECONDS)
        code = self._process.exitcode
        self._end()
        if code == -signal.SIGXCPU:
            return f"no end within {seconds} seconds of processor time"
        if code == -signal.SIGABRT:  # Rust code aborts if an allocation fails
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
    """Main function of the process: answers calls until the parent closes its end of the pipe or is gone."""
    parents.close()
    faulthandler.disable()
    # Ctrl-C reaches every process of the terminal, but this process ends with its parent. Its output is discarded.
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
    except BaseException as error:  # the program can raise anything; a Rust panic is not an Exception
        first = (str(error).strip().splitlines() or [""])[0]
        return _RAISED + f"{type(error).__name__}: {first}"[:500].encode("utf-8", errors="replace")


def _seconds(arguments: Any) -> int:
    return SECONDS + len(arguments) // BYTES_A_SECOND


def _limit(kind: int, value: int) -> None:
    """Sets the soft limit, at most to the hard limit."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
