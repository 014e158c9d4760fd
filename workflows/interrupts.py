"""Handles Ctrl-C, SIGTERM and SIGHUP: after the first the current block is still finished, the second stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from recipes.errors import Interrupted

NOTICE = b"\nstopping after the block under way; once more stops at once, and that block is lost\n"


def hears_hangup() -> bool:
    """Whether a lost terminal (SIGHUP) stops this process, which is not so if it was started with nohup."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


class Interrupts:
    """Turns the signals into KeyboardInterrupt; inside `deferring` the first of them only sets `requested`. A lost
    terminal sends SIGHUP twice, from the kernel and from the shell: it counts once, and never as a second signal."""

    def __init__(self) -> None:
        self.requested = False
        #: Whether the current block can no longer be finished; torchrun sends SIGTERM if a rank is lost.
        self.hopeless: Callable[[], bool] = lambda: False
        self.silent = False
        self._deferring = self._hung_up = False

    def install(self) -> None:
        """Installs the handlers for SIGINT, SIGTERM and, unless it is ignored, SIGHUP."""
        for number in (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hears_hangup() else ())):
            signal.signal(number, self._handle)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """The work inside checks `requested` itself. Raises Interrupted if it ends with a request that it did not
        handle."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.requested:
            raise Interrupted("stopped after the last block; run the same command to resume")

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            if self._hung_up or self.requested:
                return
            self._hung_up = True
        if not self._deferring or self.requested or self.hopeless():
            raise KeyboardInterrupt
        self.requested = True
        if not self.silent:
            with suppress(OSError):  # the terminal may be gone, or the log's disk full
                os.write(2, NOTICE)  # not through the console, which may be writing a line
