"""Reads and writes past the page cache (O_DIRECT) with reused, page-aligned buffers.

Buffered copies of hundreds of gigabytes cost several times the CPU time of direct ones and evict everything else from
memory. If a file system refuses O_DIRECT, or reads and writes that are aligned to 4 KiB, the same code goes through the page
cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from calibration.checkpoint.files import PARTIAL, explain, fsync_directory
from recipes.errors import EnvironmentProblem, SourceError

#: Alignment in bytes of all reads and writes, and of the tensors in converted shards: therefore the same on every machine.
PAGE = 4096
#: Neighboring extents closer than this (bytes) are read together.
_GAP = 64 * 1024
#: CRC-32's polynomial and the polynomial 1, with reflected bits.
_POLYNOMIAL, _ONE = 0xEDB88320, 1 << 31
_DIRECT = getattr(os, "O_DIRECT", 0)
Bytes = npt.NDArray[np.uint8]


class Buffer:
    """Page-aligned memory whose pages stay allocated: `array` is uint8 `[capacity]`."""

    def __init__(self, capacity: int) -> None:
        self._map = mmap.mmap(-1, max(-(-capacity // PAGE) * PAGE, PAGE))
        self.array: Bytes = np.frombuffer(self._map, np.uint8)


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [begin, end) of the file `shard`."""

    shard: str
    begin: int
    end: int


def runs(extents: Iterable[Extent]) -> list[Extent]:
    """The page-aligned reads that cover the extents."""
    merged: list[Extent] = []
    for extent in sorted(set(extents), key=lambda e: (e.shard, e.begin)):
        begin, end = extent.begin // PAGE * PAGE, -(-extent.end // PAGE) * PAGE
        if merged and merged[-1].shard == extent.shard and begin <= merged[-1].end + _GAP:
            merged[-1] = Extent(extent.shard, merged[-1].begin, max(end, merged[-1].end))
        else:
            merged.append(Extent(extent.shard, begin, end))
    return merged


def capacity(extents: Iterable[Extent]) -> int:
    """Bytes of buffer that `DirectReader.read` needs for these extents."""
    return sum(run.end - run.begin for run in runs(extents))


class DirectReader:
    """Reads extents of the shards in `directory`, from any number of threads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, extents: Iterable[Extent], buffer: Buffer) -> dict[Extent, Bytes]:
        """Extent -> its bytes, uint8, as views into `buffer`. Raises SourceError if a file ends early."""
        wanted = list(extents)
        at, found = 0, {}
        spans = runs(wanted)
        places = []
        for run in spans:
            got = self._fill(run, buffer.array[at : at + run.end - run.begin])
            places.append((run, at, got))
            at += run.end - run.begin
        for extent in wanted:
            for run, start, got in places:
                if run.shard == extent.shard and run.begin <= extent.begin and extent.end <= run.end:
                    if extent.end - run.begin > got:
                        raise SourceError(
                            f"{self.directory / extent.shard}: ends before byte {extent.end}; it changed while it was read"
                        )
                    first = start + extent.begin - run.begin
                    found[extent] = buffer.array[first : first + extent.end - extent.begin]
                    break
        return found

    def _fill(self, run: Extent, target: Bytes) -> int:
        """Returns the number of bytes read: fewer than requested only at the end of the file."""
        got, view = 0, memoryview(target.data)

        def read(file: int) -> int:
            return os.preadv(file, [view[got:]], run.begin + got)

        while got < len(target):
            try:
                count = _aligned_or_cached(self._open(run.shard), read)
            except OSError as error:
                raise SourceError(f"{self.directory / run.shard}: cannot be read: {error.strerror}") from None
            got += count
            if count == 0 or count % PAGE:
                break
        return got

    def _open(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = _open(self.directory / shard, os.O_RDONLY | os.O_NONBLOCK)
            return self._files[shard]

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()


class DirectWriter:
    """Writes one file sequentially as `<path>.partial`; `finish` makes it durable and renames it.

    Each piece comes in a Buffer whose first page corresponds to the file's page that contains the piece's first byte.
    Only the end of the previous piece in that page is copied in front of it.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        """Creates the file and reserves `nbytes`. Raises EnvironmentProblem if that fails."""
        self.path, self.nbytes, self.crc = path, nbytes, 0
        self._partial = path.with_name(path.name + PARTIAL)
        self._position = 0
        self._last = Buffer(PAGE)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.unlink(missing_ok=True)  # if a link were there, its target would be overwritten
            self._file = _open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            raise EnvironmentProblem(explain(path, error, nbytes, error.errno == errno.ENOSPC)) from None
        try:
            os.posix_fallocate(self._file, 0, max(nbytes, 1))
        except OSError as error:
            # EINVAL: the C library emulates it by writing single bytes, which O_DIRECT refuses.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                self.abandon()
                raise EnvironmentProblem(explain(path, error, nbytes, error.errno == errno.ENOSPC)) from None

    def append(self, buffer: Buffer, nbytes: int, crc: int) -> None:
        """Writes `nbytes` that start at `buffer.array[position % PAGE]`; `crc` is their CRC-32."""
        begin = self._position % PAGE
        self.crc = join_crc(self.crc, crc, nbytes)
        buffer.array[:begin] = self._last.array[:begin]
        whole = (begin + nbytes) // PAGE * PAGE
        self._write(buffer.array[:whole], self._position - begin)
        rest = begin + nbytes - whole
        self._last.array[:rest] = buffer.array[whole : whole + rest]
        self._position += nbytes

    def finish(self) -> str:
        """Makes the file durable under its final name; returns its digest (see `digest`)."""
        assert self._position == self.nbytes, f"{self.path}: {self._position} of {self.nbytes} bytes: a defect here"
        if self._position % PAGE:
            self._write(self._last.array, self._position // PAGE * PAGE)
        try:
            os.ftruncate(self._file, self.nbytes)
            os.fsync(self._file)
            os.close(self._file)
            self._partial.replace(self.path)
            fsync_directory(self.path.parent)
        except OSError as error:
            raise EnvironmentProblem(explain(self.path, error, self.nbytes, error.errno == errno.ENOSPC)) from None
        return _spell(self.crc, self.nbytes)

    def abandon(self) -> None:
        """Closes and removes the partial file."""
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._partial.unlink(missing_ok=True)

    def _write(self, data: Bytes, offset: int) -> None:
        view, done = memoryview(data.data), 0

        def write(file: int) -> int:
            return os.pwrite(file, view[done:], offset + done)

        try:
            while done < len(data):
                done += _aligned_or_cached(self._file, write)
        except OSError as error:
            raise EnvironmentProblem(explain(self.path, error, self.nbytes, error.errno == errno.ENOSPC)) from None


def digest(path: Path, buffer: Buffer) -> str:
    """CRC-32 and size of a file, `crc32:<hex>:<bytes>`. It detects a torn or altered shard at a sixth of the CPU time
    of SHA-256, which would cost as much as the conversion itself."""
    reader, size, crc = DirectReader(path.parent), path.stat().st_size, 0
    step = len(buffer.array) // PAGE * PAGE
    try:
        for begin in range(0, size, step):
            extent = Extent(path.name, begin, min(begin + step, size))
            crc = zlib.crc32(reader.read([extent], buffer)[extent].data, crc)
    finally:
        reader.close()
    return _spell(crc, size)


def join_crc(front: int, back: int, nbytes: int) -> int:
    """CRC-32 of two concatenated byte strings, from the CRC-32 of each; `nbytes` is the length of the second. Thereby
    each worker computes the CRC of its own output and the writer only writes. Source: zlib's crc32_combine."""
    return _multiply(_shift(nbytes), front) ^ back


@cache
def _shift(nbytes: int) -> int:
    """x^(8 nbytes) modulo the CRC's polynomial."""
    power, square, exponent = _ONE, _ONE >> 1, 8 * nbytes
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square, exponent = _multiply(square, square), exponent >> 1
    return power


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo CRC-32's, bit 31 the constant term."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _spell(crc: int, nbytes: int) -> str:
    return f"crc32:{crc:08x}:{nbytes}"


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, 0o644)


def _aligned_or_cached(file: int, transfer: Callable[[int], int]) -> int:
    """The bytes that `transfer` reads from or writes to `file`; through the page cache from now on if the file system wants
    O_DIRECT aligned to more than PAGE (tried: XFS with sectors of 16 KiB)."""
    try:
        return transfer(file)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)
    return transfer(file)
