"""Standard streams that may be closed, broken or on a full disk: how a command ends is never decided by its printing."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO, cast

#: A command whose result is what it prints could not print it: nobody reads its standard output any more (as the shell says
#: of a program that SIGPIPE ended), or its disk is full.
OUTPUT_LOST = 141


class Stream:
    """A standard stream whose writes and flushes raise no OSError. `lost` is the first one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Writes what can be written; as many characters as `text` has."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.lost = self.lost or error
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk may have room again
                with contextlib.suppress(OSError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, self.stream.fileno())
                    os.close(null)


def guard_streams() -> None:
    """Gives this process a standard input, output and error that raise nothing. A closed one becomes /dev/null: the next
    file would get its number, and what a library prints would go into a shard or the journal."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, Stream):
            continue
        if stream is None:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (the process's own)
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot print is no defect
        setattr(sys, name, cast(TextIO, Stream(stream)))


def printed() -> int:
    """The exit code of a command whose result is what it printed: 0, or OUTPUT_LOST if standard output took not all."""
    sys.stdout.flush()
    return OUTPUT_LOST if isinstance(sys.stdout, Stream) and sys.stdout.lost is not None else 0


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code of a command line, whatever becomes of its standard streams."""
    guard_streams()
    try:
        code = main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)
