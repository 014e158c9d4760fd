"""How a command begins and ends: standard streams that may be closed, broken or on a full disk, and signals, decide
neither its exit code nor print a traceback."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from recipes.errors import Interrupted

if TYPE_CHECKING:
    import argparse

#: The exit code of a command that could not print its result, because standard output is closed (as the shell reports
#: for SIGPIPE) or its disk is full.
OUTPUT_LOST = 141
_INTERRUPTED = "error: interrupted"
#: Standard output, once other prints go to standard error.
_reserved: TextIO | None = None


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
            self.lost = self.lost or error.with_traceback(None)  # it holds frames, and files that nobody closed
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


def reserve_stdout() -> None:
    """Keeps this process's standard output for `print_result`. Whatever else is printed, by a library in Python or C or by a
    child, goes to standard error, so that a reader of JSON finds nothing else."""
    global _reserved
    guard_streams()
    if _reserved is None:
        file = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace")  # noqa: SIM115 (to the end)
        _reserved = cast(TextIO, Stream(file))
        sys.stdout.flush()
        os.dup2(2, 1)


def results() -> TextIO:
    """Where a command prints its result: standard output, which `reserve_stdout` may have kept for it."""
    return _reserved or sys.stdout


def print_result(text: str) -> None:
    """Prints lines of a command's result, at once."""
    print(text, file=results(), flush=True)


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line (default: this process's); `--help` is a result."""
    with contextlib.redirect_stdout(results()):
        return parser.parse_args(arguments)


def printed() -> int:
    """The exit code of a command whose result is its output: 0, or OUTPUT_LOST if some of it could not be written."""
    stream = results()
    stream.flush()
    return OUTPUT_LOST if isinstance(stream, Stream) and stream.lost is not None else 0


def begin_command() -> None:
    """Guards a process that was started as `python -m` before the imports of its command: Ctrl-C, SIGTERM or a lost
    terminal end it at once, with the exit code of `Interrupted` and one line. Nothing is under way then, and a
    KeyboardInterrupt inside an import may be swallowed by the library. Does nothing in any other process.

    Called by the packages that hold commands, which Python imports before their `__main__`."""
    if sys.argv[:1] == ["-m"]:  # only while Python looks for the module to run
        reserve_stdout()
        _handle_signals(_end_at_once)
        # Imports make half a million objects, and full collections of them take 0.9 of 6 CPU-s. Later ones are as rare as without
        # this: Python makes one only after a quarter as many further objects.
        gc.set_threshold(700, 10, 100)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code of `main`, whatever happens to its standard streams; with that of `Interrupted` if
    Ctrl-C, SIGTERM or a lost terminal ends a command that does not say itself what that means."""
    reserve_stdout()
    code = 1  # of an exception that is a defect
    try:
        _handle_signals(signal.default_int_handler)  # raises KeyboardInterrupt, whatever the signal
        code = main()
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        code = Interrupted.exit_code
    except SystemExit as ended:  # of argparse
        code = int(ended.code or 0)
    finally:
        _handle_signals(lambda number, frame: os._exit(code))  # a thread that is still waited for prints no traceback
        atexit.register(_handle_signals, signal.SIG_IGN)  # Python resets other handlers before the last second
        for stream in (results(), sys.stdout, sys.stderr):
            stream.flush()
    gc.collect()
    gc.freeze()  # or the interpreter's end goes through all objects three times more: 1 CPU-s
    sys.exit(code)


def _handle_signals(handler: Any) -> None:
    """Sets the handler of the signals that ask a command to end, but of those that it was started to ignore (nohup)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _end_at_once(number: int, frame: object) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # torchrun's further ranks would repeat the line
        with contextlib.suppress(OSError):
            os.write(2, f"{_INTERRUPTED}\n".encode())
    os._exit(Interrupted.exit_code)
