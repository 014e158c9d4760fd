"""The queue of one machine: slots, order, retries with back-off, a clean stop. A cluster's job is a queue of one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from calibration.runs.disk import Need, space_problems
from recipes.errors import RecipeError
from workflows.batch.attempt import Child, Slot, torchrun
from workflows.batch.outcome import Outcome, judge_attempt
from workflows.batch.preflight import space_needs
from workflows.batch.state import BatchDirectory, Entry, orphan

_TICK_SECONDS = 0.2
_LONGEST_BACKOFF = 900.0
#: From the second Ctrl-C to SIGKILL, unless the queue is given another time.
_PATIENCE_SECONDS = 30.0
#: Beside its output and its activations a run writes logs and reports, even if nothing is left to compute.
_REPORT_BYTES = 1 << 20


@dataclass(frozen=True)
class Rules:
    """How a queue behaves. `tries`: attempts in a row that finish nothing before a run is given up; `backoff`: seconds before
    the second attempt; `until`: seconds since the epoch; `space_patience`: seconds to wait for space on a full disk."""

    tries: int = 3
    backoff: float = 30.0
    until: float | None = None
    space_patience: float = 3600.0
    overwrite: bool = False
    #: Whether a run that could be tried again is stopped instead: the cluster starts it on other nodes.
    once: bool = False

    def __post_init__(self) -> None:
        """Raises RecipeError for numbers that mean nothing, by their options."""
        problems = [] if self.tries >= 1 else [f"--tries {self.tries}: must be at least 1"]
        problems += [
            f"--{option} {value:g}: must be a number of {unit} that is not negative"
            for option, unit, value in (
                ("backoff", "seconds", self.backoff),
                ("space-patience", "minutes", self.space_patience / 60),
            )
            if not 0 <= value < math.inf
        ]
        if problems:
            raise RecipeError(problems)


@dataclass
class Waiting:
    """A run that waits for a slot, a time or disk space."""

    entry: Entry
    not_before: float = 0.0
    failures: int = 0
    #: Since when it has waited for disk space, in seconds since the epoch.
    starved_since: float | None = None


@dataclass
class Queue:
    """Works on `entries` in their order until all are done, failed or stopped.

    launcher: slot -> the arguments before `-m workflows.run` (torchrun's), none for one process. should_stop: polled; true
    lets every run finish its block. changed: called whenever a run starts, ends or finishes a block. failed: called with
    each run that is given up and the reason. patience: seconds from stopping at once to SIGKILL.
    """

    batch: BatchDirectory
    entries: Sequence[Entry]
    slots: Sequence[Slot]
    rules: Rules
    say: Callable[[str, str], None]
    launcher: Callable[[Slot], Sequence[str]] = lambda slot: torchrun(len(slot.gpus or ()))
    should_stop: Callable[[], bool] = lambda: False
    changed: Callable[[], None] = lambda: None
    failed: Callable[[Entry, str], None] = lambda entry, reason: None
    patience: float = _PATIENCE_SECONDS
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: list[Child] = field(default_factory=list)
    attempted: dict[str, Waiting] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    stopping: str = ""
    _signature: tuple[tuple[int, int], ...] = ()

    def work(self) -> None:
        """Returns after the last run has ended. KeyboardInterrupt (the second Ctrl-C) stops every run at once and is raised
        again."""
        self._take_stock()
        self.changed()
        try:
            while self.running or (self.waiting and not self.stopping):
                self._tick()
                if self.running or (self.waiting and not self.stopping):
                    time.sleep(_TICK_SECONDS)
        except KeyboardInterrupt:
            self._stop_at_once()
            raise
        finally:
            for waiting in self.waiting:
                self.outcomes.setdefault(waiting.entry.name, Outcome("stopped", self.stopping))
            self.changed()

    def stop(self, why: str) -> None:
        """Starts nothing more and lets every run finish its block."""
        if not self.stopping:
            self.stopping = why
            self.say(f"{why}: {len(self.running)} running, each finishes its block", "warning")
            for child in self.running:
                if not child.asked_to_stop:
                    child.ask_to_stop(once=True)

    def _take_stock(self) -> None:
        """Skips the runs that are done, watches those that a killed batch left running, queues the others."""
        free = list(self.slots)
        for entry in self.entries:
            attempts = self.batch.attempts(entry.name)
            left = orphan(attempts)
            if entry.problems:
                self._fail(entry, entry.problems[0])
            elif left is not None:
                slot = next((slot for slot in free if str(slot) == left["slot"]), free[0] if free else self.slots[0])
                if slot in free:
                    free.remove(slot)
                self.running.append(Child.adopt(self.batch, entry, left, slot))
                self.say(f"{entry.name}: still running since the last call (pid {left['pid']}); watched", "info")
            elif entry.output_state().kind == "done":
                self.outcomes[entry.name] = Outcome("done", "done before")
                self.say(f"{entry.name}: done and verified before", "info")
            else:
                self.batch.record(entry.name, "queued")
                self.waiting.append(Waiting(entry))
        self._signature = self._journal_sizes()

    def _tick(self) -> None:
        self._collect_ended()
        if self.should_stop():
            self.stop("stop requested")
        elif self.rules.until is not None and time.time() >= self.rules.until:
            self.stop(f"reached --until ({time.strftime('%H:%M', time.localtime(self.rules.until))})")
        if not self.stopping:
            self._start_ready_runs()
        signature = self._journal_sizes()
        if signature != self._signature:
            self._signature = signature
            self.changed()

    def _start_ready_runs(self) -> None:
        taken = [child.slot for child in self.running]
        for slot in self.slots:
            if slot in taken:
                continue
            ready = next((waiting for waiting in self.waiting if self._is_ready(waiting)), None)
            if ready is None:
                break
            self.waiting.remove(ready)
            child = Child.start(self.batch, ready.entry, slot, self.rules.overwrite, self.launcher(slot))
            self.attempted[ready.entry.name] = ready
            self.running.append(child)
            self.say(
                f"{ready.entry.name}: started" + (f" on {slot}" if str(slot) else "") + f", log {child.log}", "info"
            )
            self.changed()

    def _is_ready(self, waiting: Waiting) -> bool:
        now = time.time()
        if now < waiting.not_before:
            return False
        if waiting.starved_since is None:
            return True
        wanted = [*space_needs(waiting.entry), Need("log and reports", self.batch.path, _REPORT_BYTES)]
        missing = space_problems([*wanted, Need("journal and reports", waiting.entry.run.path, _REPORT_BYTES)])
        if missing and now - waiting.starved_since > self.rules.space_patience:
            self.waiting.remove(waiting)
            self._fail(
                waiting.entry, f"no space came back in {self.rules.space_patience / 60:g} min: {'; '.join(missing)}"
            )
        return not missing

    def _record_end(self, child: Child, code: int | None) -> None:
        entry = child.entry
        waiting = self.attempted.pop(entry.name, Waiting(entry))
        child.kill_orphans()
        outcome = judge_attempt(entry, code, child.began, child.log, child.log_from, child.asked_to_stop)
        if outcome.kind in ("transient", "space") and (self.stopping or self.rules.once):
            outcome = Outcome("stopped", outcome.reason)
        progressed = entry.progress() > child.before
        self.batch.record(
            entry.name, "ended", code=code, outcome=outcome.kind, reason=outcome.reason, peak_rss=child.peak_rss,
            cpu_seconds=child.cpu_seconds, seconds=round(time.time() - child.began, 1), progressed=progressed,
        )  # fmt: skip
        if outcome.kind in ("transient", "space"):
            self._retry_later(waiting, outcome, progressed)
        elif outcome.kind == "failed":
            self._fail(entry, outcome.reason)
        elif outcome.kind == "done":
            self.outcomes[entry.name] = outcome
            self.say(f"{entry.name}: done", "info")
        else:
            self.outcomes[entry.name] = outcome
            self.say(f"{entry.name}: {outcome.reason}; run the same command to resume", "warning")
        self.changed()

    def _retry_later(self, waiting: Waiting, outcome: Outcome, progressed: bool) -> None:
        waiting.failures = 1 if progressed else waiting.failures + 1
        if waiting.failures >= self.rules.tries:
            self._fail(waiting.entry, f"{outcome.reason} ({waiting.failures} attempts in a row finished nothing)")
            return
        delay = min(self.rules.backoff * 4 ** (waiting.failures - 1), _LONGEST_BACKOFF)
        waiting.not_before = time.time() + delay
        if outcome.kind == "space":
            waiting.starved_since = waiting.starved_since or time.time()
        elif progressed:
            waiting.starved_since = None
        self.waiting.append(waiting)
        order = [entry.name for entry in self.entries]
        self.waiting.sort(key=lambda other: order.index(other.entry.name))
        self.say(f"{waiting.entry.name}: {outcome.reason}; next attempt in {delay:.0f} s", "warning")

    def _fail(self, entry: Entry, reason: str) -> None:
        self.outcomes[entry.name] = Outcome("failed", reason)
        self.batch.record(entry.name, "gave_up", reason=reason)
        self.say(f"{entry.name}: failed: {reason}", "error")
        self.changed()
        self.failed(entry, reason)

    def _journal_sizes(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever a running run has finished a block."""
        found = []
        for child in self.running:
            try:
                stat = (child.entry.run.path / "journal.jsonl").stat()
                found.append((stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append((0, 0))
        return tuple(found)

    def _collect_ended(self) -> None:
        """Records every attempt that has ended since the last look."""
        for child in list(self.running):
            ended, code = child.poll()
            if ended:
                self.running.remove(child)
                self._record_end(child, code)

    def _stop_at_once(self) -> None:
        self.stopping = self.stopping or "stopped at once"
        deadline = time.monotonic() + self.patience
        for child in self.running:
            for _ in range(1 if child.asked_to_stop else 2):
                child.ask_to_stop()
        while self.running and time.monotonic() < deadline:
            self._collect_ended()
            time.sleep(_TICK_SECONDS)
        for child in self.running:
            child.kill()
            self.batch.record(child.entry.name, "ended", code=None, outcome="stopped", reason="killed: did not stop")
            self.outcomes[child.entry.name] = Outcome("stopped", "killed: did not stop")


def parse_slots(text: str | None) -> list[Slot]:
    """`0-3,4-7` -> two slots of four GPUs; `0,1` -> two of one; None -> one slot with all that the machine has. Raises
    RecipeError."""
    if text is None:
        return [Slot()]
    slots, seen = [], set[int]()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise RecipeError(f"--gpus {text}: {part!r} must be a GPU number or a range such as 0-3")
        gpus = tuple(range(int(first), int(last or first) + 1))
        if seen & set(gpus):
            raise RecipeError(f"--gpus {text}: GPU {min(seen & set(gpus))} is in two slots; name each GPU once")
        seen |= set(gpus)
        slots.append(Slot(gpus))
    return slots
