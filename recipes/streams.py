"""Guards standard streams that may be closed, broken or on a full disk, so that printing never decides how a command
ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO, cast

from recipes.errors import Interrupted

#: The exit code of a command that could not print its result, because standard output is closed (as the shell reports
#: for SIGPIPE) or its disk is full.
OUTPUT_LOST = 141


class Stream:
    """A standard stream whose writes and flushes never raise OSError. `lost` is the first error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Writes as much as possible; returns the length of `text`."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream, ignoring errors."""
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.lost = self.lost or error
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk may have space again later
                with contextlib.suppress(OSError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, self.stream.fileno())
                    os.close(null)


def guard_streams() -> None:
    """Gives this process a standard input, output and error that never raise. A closed one becomes /dev/null; otherwise
    the next opened file would get its number, and a library's output would go into a shard or the journal."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free number
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, Stream):
            continue
        if stream is None:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (the process's own)
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot print is not a defect
        setattr(sys, name, cast(TextIO, Stream(stream)))


def printed() -> int:
    """The exit code of a command whose result is its output: 0, or OUTPUT_LOST if some of it could not be written."""
    sys.stdout.flush()
    return OUTPUT_LOST if isinstance(sys.stdout, Stream) and sys.stdout.lost is not None else 0


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code of `main`, whatever happens to its standard streams; with that of `Interrupted` if
    Ctrl-C ends a command that does not say itself what that means."""
    guard_streams()
    try:
        code = main()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = Interrupted.exit_code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)
