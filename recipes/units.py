"""Sizes and durations as people read them."""

from __future__ import annotations

from datetime import timedelta

#: timedelta holds at most 8.6e13 seconds, and a value read from a file can be anything.
_LONGEST = 1e12


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    return str(timedelta(seconds=round(max(min(seconds, _LONGEST), -_LONGEST))))


def duration(seconds: float) -> str:
    """`1.2 s` below two minutes, else `h:mm:ss`."""
    return f"{seconds:.1f} s" if seconds < 120 else clock(seconds)


def size(nbytes: float) -> str:
    """`1.2 GB`, in powers of ten."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
