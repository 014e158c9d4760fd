"""Errors a user can cause, each with the exit code that `workflows.run` documents.

They are in the lowest layer, so that every layer above can raise them. A message names the file, the key or tensor, the
rule, the value and the remedy; the command line prints it without a traceback.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


class WorkflowError(Exception):
    """Base of every error that ends a command with one message instead of a traceback."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [printable(text) for text in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


def printable(text: str) -> str:
    """`text` made safe for a terminal, a log or a page: control characters, bidirectional marks and lone surrogates are
    escaped as in Python (`\\x1b`). Line breaks, tabs and all kinds of spaces are kept."""
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in "\n\t" or unicodedata.category(letter) == "Zs"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def collapsed(problems: Iterable[str]) -> list[str]:
    """Replaces problems that only differ in numbers (block, expert, shard) by the first one and a count of the
    others."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        # w1, w2, w3: the projections of an expert.
        alike.setdefault(re.sub(r"\.w[123]\b", ".w", without_numbers(problem)), []).append(problem)
    return [first + (f" (and {len(rest)} more like this)" if rest else "") for first, *rest in alike.values()]


def without_numbers(text: str) -> str:
    """`text` with every separate number (`layers.3`, `block 3`, `00003-of`) replaced by N, but not the digits of a word
    (`w1`, `FP8`, `128x128`)."""
    return re.sub(r"(?<![A-Za-z0-9_])\d+(?![A-Za-z0-9_])", "N", text)


def first_of(problems: list[str], most: int = 100) -> list[str]:
    """The first `most` problems and a count of the others, because a hostile file can have a million."""
    return [*problems[:most], *([f"and {len(problems) - most:,} further problems"] if len(problems) > most else [])]


class RecipeError(WorkflowError):
    """The recipe or the command line is wrong: unknown key, bad value, target that matches nothing."""

    exit_code = 2


class SourceError(WorkflowError):
    """The source checkpoint or the data set is missing, damaged or not supported."""

    exit_code = 3


class EnvironmentProblem(WorkflowError):
    """The machine is the problem: no vLLM environment, no disk space, output not empty, a file that cannot be
    written."""

    exit_code = 4


class VerificationFailed(WorkflowError):
    """The output exists, and at least one of its checks has failed."""

    exit_code = 5


class BatchFailed(WorkflowError):
    """At least one run of a batch failed; the summary says which and why."""

    exit_code = 6


class Interrupted(WorkflowError):
    """Stopped by Ctrl-C or SIGTERM; what was written stays, and the same command resumes."""

    exit_code = 130

    def __init__(
        self,
        problems: str | Iterable[str] = "interrupted: what is finished stays; run the same command again to resume",
    ) -> None:
        super().__init__(problems)
