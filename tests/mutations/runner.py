"""Runs mutations by seed, each within bounds on time and memory, and says which of them ended in what is no verdict."""

from __future__ import annotations

import random
import resource
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from tests.mutations.kinds import KINDS, Kind, scratch

#: Processor seconds of one mutation; and seconds by the clock, for what waits.
SECONDS, CLOCK_SECONDS = 2.0, 60.0
#: Address space beyond what the process has when a kind begins.
MEMORY_BYTES = 4 << 30


class TooSlow(BaseException):
    """No Exception: no handler of the code under test may take it for its own."""


@dataclass
class Outcome:
    """What came of many mutations of one kind. `failures`: seed -> traceback."""

    kind: str
    done: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)
    failures: dict[int, str] = field(default_factory=dict)

    def report(self) -> str:
        """For people; each failure with the command that replays it."""
        lines = [
            f"{self.kind}: {self.done:,} mutations, {self.refused:,} refused or judged FAIL, {len(self.failures)} failures, "
            f"{self.seconds:.1f} s, slowest {self.slowest[0]:.3f} s (seed {self.slowest[1]})"
        ]
        lines += [f"python -m tests.mutations {self.kind} {seed}\n{text}" for seed, text in self.failures.items()]
        return "\n".join(lines)


def run(name: str, seeds: Iterable[int], most_failures: int = 10) -> Outcome:
    """Runs the mutations of one kind by their seeds; stops at `most_failures`."""
    outcome, began = Outcome(name), time.monotonic()
    with TemporaryDirectory(prefix="mutations-", dir=scratch()) as directory:
        kind = KINDS[name][0](Path(directory))
        with _bounded(), closing(kind):
            for seed in seeds:
                _one(kind, name, seed, outcome)
                if len(outcome.failures) >= most_failures:
                    break
    outcome.seconds = time.monotonic() - began
    return outcome


def _one(kind: Kind, name: str, seed: int, outcome: Outcome) -> None:
    rng, began = random.Random(f"{name}:{seed}"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
    try:
        outcome.refused += kind.run(rng)
    except kind.documented as error:
        outcome.refused += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        if (problem := _message_problem(str(error))) is not None:
            outcome.failures[seed] = problem
    except (Exception, TooSlow):
        outcome.failures[seed] = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    outcome.done += 1
    took = time.process_time() - began
    outcome.slowest = max(outcome.slowest, (took, seed))
    if took > SECONDS and seed not in outcome.failures:  # a handler of every exception took TooSlow for its own
        outcome.failures[seed] = f"took {took:.1f} processor seconds"


def _message_problem(text: str) -> str | None:
    """What a message must not be: empty, endless, or acting on a terminal."""
    if not text.strip():
        return "an empty message"
    if len(text) > 100_000:
        return f"a message of {len(text):,} letters: {text[:500]}"
    strange = [letter for letter in text if not letter.isprintable() and letter not in "\n\t\u00a0\u3000"]
    return f"a message with {strange[:5]!r}: {text[:500]!r}" if strange else None


@contextmanager
def _bounded() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {SECONDS} processor seconds or {CLOCK_SECONDS} s")

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in handlers.items():
            signal.signal(number, handler)
