"""Reads every byte of a checkpoint once, past the page cache, in reused buffers, and computes the digests of its
shards.

Threads take jobs in file order: each reads its bytes and passes the tensors in them to a judge. Memory per thread is
two buffers of one job and the judge's scratch, whatever the checkpoint's size.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from calibration.checkpoint.direct import PAGE, Buffer, Bytes, DirectReader, Extent, capacity
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import Checkpoint
from recipes.errors import SourceError

#: Bytes of one read; pieces of a tensor start at multiples of it, so that no element and no NVFP4 group is cut.
JOB = 8 * 2**20
#: One thread reads while the other two process what they have read.
_THREADS = min(3, (os.cpu_count() or 1) + 1)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [begin, end) of tensor `header`, counted from the tensor's own first byte."""

    header: TensorHeader
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Job:
    """Bytes [begin, end) of a shard and the pieces of tensors in them."""

    shard: str
    begin: int
    end: int
    pieces: tuple[Piece, ...]


class Judge:
    """Inspects the bytes; each thread has its own. `other` is the same piece of another checkpoint, if requested."""

    def look(self, piece: Piece, data: Bytes, other: Bytes | None) -> None:
        """Inspects one piece. `data` and `other` are uint8 and only valid during the call."""
        raise NotImplementedError


def read_all(
    output: Checkpoint,
    judge: Callable[[], Judge],
    same: Mapping[str, TensorHeader],
    source: Checkpoint | None,
    digests: Mapping[str, str],
    progress: Progress | None = None,
) -> tuple[list[Judge], dict[str, str]]:
    """Reads every shard once. `same` maps tensors to the tensors of `source` whose bytes the judge also receives;
    `digests` names the shards to digest, with a digest of the wanted kind (`sha256` hex or `crc32:<hex>:<bytes>`).
    Returns the judges and the shards' digests. Raises SourceError if a file cannot be read to its end."""
    jobs, lock, judges = _jobs(output), threading.Lock(), list[Judge]()
    reader, beside = DirectReader(output.directory), DirectReader(source.directory) if source else None
    chain = _Digests(digests)
    done, failed = [0], threading.Event()

    def work() -> None:
        mine, buffer, second = judge(), Buffer(JOB + 2 * PAGE), Buffer(PAGE)
        with lock:
            judges.append(mine)
        try:
            while not failed.is_set():
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                extent = Extent(job.shard, job.begin, job.end)
                data = reader.read([extent], buffer)[extent]
                chain.add(job, data, failed)
                others = _extents(job, same)
                if others and beside is not None:
                    wanted = capacity(others.values())
                    second = second if len(second.array) >= wanted else Buffer(wanted)
                    found = beside.read(others.values(), second)
                for piece in job.pieces:
                    at = piece.header.begin + piece.begin - job.begin
                    other = found[others[piece.header.name]] if piece.header.name in others and beside else None
                    mine.look(piece, data[at : at + piece.end - piece.begin], other)
                with lock:
                    done[0] += sum(piece.end - piece.begin for piece in job.pieces)
                    if progress is not None:
                        progress(done[0], output.total_bytes)
        except BaseException:
            failed.set()
            raise

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for future in [pool.submit(work) for _ in range(_THREADS)]:
                future.result()
    finally:
        reader.close()
        if beside is not None:
            beside.close()
    return judges, chain.finished()


def _jobs(output: Checkpoint) -> Iterator[_Job]:
    """Yields jobs that cover every byte of every shard, including headers, in the order of the files."""
    by_shard: dict[str, list[TensorHeader]] = {}
    for header in output.tensors.values():
        by_shard.setdefault(header.shard, []).append(header)
    for shard in output.shards:
        headers = sorted(by_shard.get(shard, []), key=lambda header: header.begin)
        begin = end = headers[0].begin if headers else (output.directory / shard).stat().st_size
        for first in range(0, begin, JOB):
            yield _Job(shard, first, min(first + JOB, begin), ())
        pieces: list[Piece] = []
        for header in headers:
            for first in range(0, header.nbytes, JOB):
                last = min(first + JOB, header.nbytes)
                if pieces and header.begin + last - begin > JOB:
                    yield _Job(shard, begin, end, tuple(pieces))
                    begin, pieces = end, []
                pieces.append(Piece(header, first, last))
                end = header.begin + last
        if pieces:
            yield _Job(shard, begin, end, tuple(pieces))


def _extents(job: _Job, same: Mapping[str, TensorHeader]) -> dict[str, Extent]:
    """Tensor -> the location of its piece in the source; a job contains at most one piece of a tensor."""
    found = {}
    for piece in job.pieces:
        other = same.get(piece.header.name)
        if other is not None and other.nbytes == piece.header.nbytes:
            found[piece.header.name] = Extent(other.shard, other.begin + piece.begin, other.begin + piece.end)
    return found


class _Digests:
    """Computes digests of whole shards from jobs that arrive out of order: each waits for the previous one."""

    def __init__(self, wanted: Mapping[str, str]) -> None:
        self._wanted, self._turn = wanted, threading.Condition()
        self._position = dict.fromkeys(wanted, 0)
        self._sha = {shard: hashlib.sha256() for shard, spelled in wanted.items() if not spelled.startswith("crc32:")}
        self._crc = dict.fromkeys(wanted.keys() - self._sha.keys(), 0)

    def add(self, job: _Job, data: Bytes, failed: threading.Event) -> None:
        if job.shard not in self._wanted:
            return
        with self._turn:
            while self._position[job.shard] != job.begin:
                if failed.is_set():
                    raise SourceError(f"{job.shard}: reading stopped")
                self._turn.wait(0.1)
        if job.shard in self._sha:
            self._sha[job.shard].update(data.data)
        else:
            self._crc[job.shard] = zlib.crc32(data.data, self._crc[job.shard])
        with self._turn:
            self._position[job.shard] = job.end
            self._turn.notify_all()

    def finished(self) -> dict[str, str]:
        sha = {shard: value.hexdigest() for shard, value in self._sha.items()}
        return sha | {s: f"crc32:{value:08x}:{self._position[s]}" for s, value in self._crc.items()}
