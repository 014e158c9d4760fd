"""What becomes of freed memory."""

from __future__ import annotations

import contextlib
import ctypes

#: Parameters of glibc's mallopt (malloc.h) -> bytes. Below M_MMAP_THRESHOLD a tensor lies in the heap, whose end returns to the
#: system from M_TRIM_THRESHOLD on. Untouched, glibc maps every tensor above 32 MiB, and trims what it freed at the end.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
_THRESHOLDS = {M_TRIM_THRESHOLD: 2**28, M_MMAP_THRESHOLD: 2**30}


def reuse_freed_memory() -> None:
    """Lets this process use freed memory again at once. Otherwise it returns after every few large tensors, and the next
    ones cost a page fault for every 4 KiB: 1.3 of 12.8 CPU-s of a small DeepSeek-V4. `trim_memory` returns it still."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter, size in _THRESHOLDS.items():
            libc.mallopt(parameter, size)


def trim_memory() -> None:
    """Returns freed heap pages to the system: otherwise glibc keeps them, and memory grows block by block."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
