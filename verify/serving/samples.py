"""Whether generated text looks broken: nothing at all, one cycle of tokens without end, characters that are no text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LEAST_LOOP = 12
"""Tokens that a repeated tail must have to be called a loop, and repetitions of its cycle: a short sample may well end in
a row of dashes."""
LEAST_REPETITIONS = 3


def repeated_tail(ids: Sequence[int]) -> tuple[int, int]:
    """The longest end of `ids` that repeats one cycle at least LEAST_REPETITIONS times: (tokens of the cycle, tokens of
    the end), (0, 0) where there is none."""
    best = (0, 0)
    for period in range(1, len(ids) // LEAST_REPETITIONS + 1):
        length = period
        while length < len(ids) and ids[-1 - length] == ids[-1 - length + period]:
            length += 1
        if length >= LEAST_REPETITIONS * period and length > best[1]:
            best = (period, length)
    return best


def unprintable(text: str) -> float:
    """Share of characters that are control or replacement characters, 0 to 1. One replacement character at the end is a
    character that the sample's last token cut."""
    text = text.removesuffix("\ufffd")
    bad = sum(character == "\ufffd" or not (character.isprintable() or character in "\n\r\t") for character in text)
    return bad / len(text) if text else 0.0


def complaint(ids: Sequence[int], text: str, max_loop: float, max_unprintable: float, may_loop: bool) -> str | None:
    """What is wrong with a sample of token `ids` that decodes to `text`, None for nothing.

    max_loop, max_unprintable: shares of the sample (see recipes.schema.Require). may_loop: the prompt gives nothing to go
    on with, and a loop is no sign of damage.
    """
    if not ids or not text.strip():
        return "empty"
    period, length = repeated_tail(ids)
    if not may_loop and length >= LEAST_LOOP and length > max_loop * len(ids):
        what = "one token" if period == 1 else f"{period} tokens"
        return f"{what} over and over for {length} of {len(ids)}"
    _, most = Counter(ids).most_common(1)[0]
    if not may_loop and most >= LEAST_LOOP and most > max_loop * len(ids):
        return f"one token makes up {most} of {len(ids)}"
    share = unprintable(text)
    return f"{share:.0%} unprintable characters" if share > max_unprintable else None
