"""Shows progress to the operator: a rich progress line on a terminal, plain lines in a pipe, events.jsonl always."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from calibration.runs.journal import RunDirectory
from recipes.units import clock
from verify.report.tables import PlainConsole

_LEVELS = ("debug", "info", "warning", "error")


class _Lines(PlainConsole):
    """Standard error; if its pipe is closed (`2>&1 | tee` was killed), the run continues without output."""

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own version would end the process."""
        self.quiet = True


class Reporter:
    """Prints lines at or above `level` to stderr, unless `muted`, and writes every event to the run directory."""

    def __init__(self, level: str = "info", muted: bool = False) -> None:
        self.console = _Lines(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 200)
        self.level, self.muted = _LEVELS.index(level), muted
        self.directory: RunDirectory | None = None
        #: Called after every event, to update what depends on events.
        self.watch: Callable[[], None] = lambda: None
        self._bar: tuple[Progress, TaskID] | None = None
        self._started = 0.0
        self._pending = self._steps = 0

    def say(self, text: str, level: str = "info") -> None:
        """Prints one line for people."""
        if _LEVELS.index(level) >= self.level and not self.muted:
            style = {"warning": "yellow", "error": "bold red"}.get(level)
            with contextlib.suppress(OSError):  # a log on a full disk must not end the run
                self.console.print(text, style=style, soft_wrap=True)

    def event(self, name: str, /, **facts: Any) -> None:
        """Writes one line to events.jsonl; does nothing before the run directory is open."""
        if self.directory is not None:
            self.directory.event(name, **facts)
            self.watch()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announces a stage, measures its time, and records how it ended."""
        started = time.monotonic()
        self.event("stage_started", stage=name)
        self.say(f"[{name}]")
        try:
            yield
        except BaseException as error:
            self.event("stage_failed", stage=name, seconds=_since(started), error=str(error) or type(error).__name__)
            raise
        self.event("stage_finished", stage=name, seconds=_since(started))
        self.say(f"[{name}] done in {_since(started):.1f} s")

    @contextmanager
    def counting(self, description: str, total: int, done: int = 0) -> Iterator[None]:
        """Shows a progress bar of `total` steps, `done` of them by an earlier run, around calls of `block`; lines
        instead of a bar if stderr is not a terminal."""
        self._started, self._pending, self._steps = time.monotonic(), total - done, 0
        if not self.console.is_terminal or self.level > 1 or self.muted:
            yield
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            self._bar = (bar, bar.add_task(description, total=total, completed=done))
            try:
                yield
            finally:
                self._bar = None

    @contextmanager
    def transfer(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """Yields a callback `(bytes done, total bytes)`, which prints a line with rate and ETA at every tenth of the
        total."""
        started, said = time.monotonic(), 0

        def progress(done: int, total: int) -> None:
            nonlocal said
            tenth = 10 * done // total if total else 10
            if tenth > said:
                said, elapsed = tenth, time.monotonic() - started
                eta = elapsed / done * (total - done)
                self.event("bytes", done=done, total=total, elapsed=round(elapsed, 1), eta=round(eta, 1))
                rate = done / max(elapsed, 1e-9) / 1e6
                self.say(
                    f"{description} {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate:,.0f} MB/s, ETA {clock(eta)}"
                )

        yield progress

    def block(self, number: int, total: int, facts: dict[str, Any]) -> None:
        """Reports a finished block, with what an operator at 3 a.m. needs to know."""
        elapsed = time.monotonic() - self._started
        self._steps += 1
        eta = elapsed / self._steps * max(self._pending - self._steps, 0)
        self.event("block", block=number, blocks=total, elapsed=round(elapsed, 1), eta=round(eta, 1), **facts)
        tokens = list(facts.get("tokens_per_expert", {}).values())
        seen = f", tokens/expert min {min(tokens)} median {statistics.median(tokens):.0f}" if tokens else ""
        error = f", worst relative error {facts['worst_error']:.3f}" if facts.get("worst_error") is not None else ""
        self.say(
            f"block {number}/{total}  elapsed {clock(elapsed)}, ETA {clock(eta)}{seen}{error}, "
            f"peak memory {facts['peak_memory'] / 1e9:.2f} GB, written {facts['bytes_written'] / 1e6:.1f} MB"
        )
        if self._bar is not None:
            self._bar[0].advance(self._bar[1])


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)
