"""Ctrl-C, SIGTERM and SIGHUP: the first lets the block under way be finished, the second stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from recipes.errors import Interrupted

NOTICE = b"\nstopping after the block under way; once more stops at once, and that block is lost\n"


def hears_hangup() -> bool:
    """Whether a lost terminal (SIGHUP) shall stop this process; not one that was started with nohup."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


class Interrupts:
    """Turns the signals into KeyboardInterrupt; inside `deferring` the first of them only sets `requested`. A lost terminal
    sends SIGHUP from the kernel and again from the shell: it asks once, and never stops a block that is asked for."""

    def __init__(self) -> None:
        self.requested = False
        #: Whether the block under way cannot be finished any more; torchrun sends SIGTERM where a rank is lost.
        self.hopeless: Callable[[], bool] = lambda: False
        self.silent = False
        self._deferring = self._hung_up = False

    def install(self) -> None:
        """Takes over SIGINT, SIGTERM and, unless it is ignored, SIGHUP of this process."""
        for number in (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hears_hangup() else ())):
            signal.signal(number, self._handle)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Work inside looks at `requested` itself. Raises Interrupted when it ended without having done so."""
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
                os.write(2, NOTICE)  # not through the console, which may be in the middle of a line
