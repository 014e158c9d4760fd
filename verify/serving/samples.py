"""Judges whether generated text looks broken: empty, an endless cycle of tokens, unprintable characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LEAST_LOOP = 12
"""Tokens and repetitions that a repeated tail needs to count as a loop: a short sample may legitimately end in a row of
dashes."""
LEAST_REPETITIONS = 3


def repeated_tail(ids: Sequence[int]) -> tuple[int, int]:
    """The longest tail of `ids` that repeats one cycle at least LEAST_REPETITIONS times: (tokens of the cycle, tokens
    of the tail); (0, 0) if there is none."""
    best = (0, 0)
    for period in range(1, len(ids) // LEAST_REPETITIONS + 1):
        length = period
        while length < len(ids) and ids[-1 - length] == ids[-1 - length + period]:
            length += 1
        if length >= LEAST_REPETITIONS * period and length > best[1]:
            best = (period, length)
    return best


def unprintable(text: str) -> float:
    """Fraction of characters that are control or replacement characters, 0 to 1. One replacement character at the end
    is not counted: the sample's last token cut that character."""
    text = text.removesuffix("\ufffd")
    bad = sum(character == "\ufffd" or not (character.isprintable() or character in "\n\r\t") for character in text)
    return bad / len(text) if text else 0.0


def complaint(ids: Sequence[int], text: str, max_loop: float, max_unprintable: float, may_loop: bool) -> str | None:
    """What is wrong with a sample of token `ids` that decodes to `text`; None if nothing is.

    max_loop, max_unprintable: shares of the sample (see recipes.schema.Require). may_loop: the prompt has too little
    content to continue, so that a loop is not a sign of damage.
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
