"""Matches regular expressions of a recipe or a checkpoint within a time limit.

Python's `re` cannot be interrupted: `(a|aa)+b` on a long name runs longer than any night. The `regex` package has a
timeout and, in its version 0, the same meaning for every pattern that `Pattern` accepts. vLLM and compressed-tensors
match with `re`, so a pattern must compile with it too.
"""

from __future__ import annotations

import re
import time
import warnings

import regex  # type: ignore[import-untyped]

#: A match of a module's name takes about 2 microseconds; 70,000 names and ten patterns take about 2 seconds.
SECONDS_PER_MATCH = 1.0
SECONDS_IN_ALL = 10.0
LONGEST = 20_000
# A brace that does not open a repeat count: text for `re`, a fuzzy match for `regex`.
_TEXT_BRACE = re.compile(r"\{(?!\d+(,\d*)?\}|,\d*\})")


class PatternError(ValueError):
    """Raised for a regular expression that does not compile or takes too long; the message says which, and the
    remedy."""


class TimeLimit:
    """A limit on the CPU time of all patterns of one recipe or one checkpoint together, including compilation."""

    def __init__(self, seconds: float = SECONDS_IN_ALL) -> None:
        self.left = seconds


class Pattern:
    """A regular expression, matched from the beginning of a name as `re.match` does.

    Patterns with the same `limit` share its time. Raises PatternError for a pattern that `re` refuses, that `re` and
    `regex` read differently, or that has more than 20,000 characters.
    """

    def __init__(self, text: str, limit: TimeLimit | None = None) -> None:
        self.text, self._limit = text, limit or TimeLimit()
        if len(text) > LONGEST:
            raise PatternError(f"has {len(text):,} characters, at most {LONGEST:,} are taken; split it")
        started = time.thread_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)
                re.compile(text)
            self._compiled = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, ValueError, OverflowError, RecursionError, FutureWarning) as error:
            raise PatternError(f"does not compile ({error})") from None
        if _TEXT_BRACE.search(re.sub(r"\\.", "", text, flags=re.DOTALL)):
            raise PatternError(r"has a brace that is no repeat count; write \{ for the character")
        self._spend(started)

    def match(self, name: str) -> bool:
        """Whether the pattern matches from the beginning of `name`. Raises PatternError if the time has run out."""
        started = time.thread_time()
        try:
            matched = self._compiled.match(name, timeout=SECONDS_PER_MATCH)
        except TimeoutError:
            self._limit.left -= time.thread_time() - started
            raise _slow(f"more than {SECONDS_PER_MATCH:g} s for the name {name[:80]}") from None
        self._spend(started)
        return matched is not None

    def _spend(self, started: float) -> None:
        self._limit.left -= time.thread_time() - started
        if self._limit.left < 0:
            raise _slow(f"the patterns together more than {SECONDS_IN_ALL:g} s")


def _slow(what: str) -> PatternError:
    return PatternError(f"takes too long to match, {what}; write it without repeats inside of repeats")
