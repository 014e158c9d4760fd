"""Executes a plan without calibration (methods convert and plain): from weight statistics, without loading a model.

Workers take jobs in the order of the output files, read their bytes past the page cache, convert them and pass them to
one writer, which keeps that order. A finished shard has its final name before its journal line is written; after a
kill, the same call resumes after the last journaled shard and writes the same bytes. Memory is limited to the buffers:
at most `workers` inputs and `workers + 2` outputs of one job each (see `layout`), whatever the checkpoint's size.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from calibration.checkpoint import native
from calibration.checkpoint.direct import PAGE, Buffer, DirectReader, DirectWriter, digest
from calibration.checkpoint.index import changed_shards, shard_state
from calibration.convert.layout import Job, ShardLayout
from calibration.convert.work import Totals, Work
from calibration.plan.task import Task
from calibration.runs.disk import Need, space_problems
from calibration.runs.fingerprint import require_unchanged
from calibration.runs.journal import RunDirectory
from calibration.runs.output import remove_unfinished, start_over
from recipes.errors import EnvironmentProblem, SourceError

#: `on_progress(done, total)` in bytes of output, including shards that were finished before; called a few times per
#: second.
Progress = Callable[[int, int], None]
_TICK = 0.2
#: Upper limit of the default number of workers, which is one more than processors, so that the disk is busy while they
#: compute. A dozen outrun any disk, and each holds a buffer.
_MOST_WORKERS = 16
#: Disk bytes reserved for headers, config, tokenizer and the run directory.
_SPARE = 64 * 2**20


@dataclass(frozen=True)
class Conversion:
    """The result of one call. Bytes are those of this call; counts are those of the whole output."""

    shards: int
    resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    level: str
    workers: int
    quantized: int
    cast: int
    copied: int
    consumed: int
    #: MXFP4 modules whose values were kept exactly, and those that were requantized.
    lossless: int
    requantized: int
    #: Global scales converted to the other dialect (see `Inverted`).
    inverted: int
    inexact: int
    worst: float
    widened: int
    one_way: tuple[str, ...]


def convert(task: Task, directory: RunDirectory, on_progress: Progress | None = None) -> Conversion:
    """Writes every shard of the task's plan into its output and journals each in the opened run directory; shards whose
    digest matches the journal of the same plan, settings and source are kept.

    `finish_output` writes side files, config and index. Raises SourceError (NaN or Inf, with the tensor's name; a
    source that changed after the run began) and EnvironmentProblem (disk full, not writable).
    """
    started, plan = time.monotonic(), task.plan
    layouts = [ShardLayout(plan, task.formats, shard) for shard in plan.shards]
    kept = _kept(task, layouts, directory)
    pending = [layout for layout in layouts if layout.shard.name not in kept]
    wanted = Need("output", task.output, sum(layout.nbytes for layout in pending) + _SPARE, len(pending))
    if problems := space_problems([wanted]):
        raise EnvironmentProblem(problems)
    workers = task.recipe.convert.workers or min((os.cpu_count() or 1) + 1, _MOST_WORKERS)
    line = _Line(task, pending, directory, workers)
    total = sum(layout.nbytes for layout in layouts)
    before = total - sum(layout.nbytes for layout in pending)
    line.run(lambda done: on_progress(before + done, total) if on_progress else None)
    facts = [fact for fact in directory.facts("shards") if fact["plan"] == plan.digest]
    latest = {name: fact for fact in facts for name in fact["shards"]}
    actions = [step.action for step in plan.steps.values()]
    done = Conversion(
        shards=len(layouts), resumed=len(kept), bytes_read=line.bytes_read, bytes_written=line.written,
        seconds=time.monotonic() - started, level=native.level(), workers=workers,
        quantized=actions.count("quantize"), cast=actions.count("cast"), copied=actions.count("copy"),
        consumed=actions.count("consume"), lossless=sum(fact["lossless"] for fact in latest.values()),
        requantized=sum(fact["requantized"] for fact in latest.values()),
        inverted=actions.count("invert"), inexact=line.work.inverted.inexact, worst=line.work.inverted.worst,
        widened=line.work.inverted.widened, one_way=line.work.inverted.one_way,
    )  # fmt: skip
    directory.record("converted", plan=plan.digest, **asdict(done) | {"one_way": len(done.one_way)})
    return done


def _kept(task: Task, layouts: list[ShardLayout], directory: RunDirectory) -> set[str]:
    """Names of the shards that an earlier call finished; starts over if that was a different run."""
    recipe, plan, output = task.recipe, task.plan, task.output
    settings = recipe.convert.model_dump(mode="json", exclude={"workers"})
    settings |= {"mxfp4": recipe.export.mxfp4, "method": recipe.method}
    source = task.source.state
    remove_unfinished(output)
    begun = directory.facts("started")
    if begun and begun[-1]["plan"] == plan.digest and begun[-1].get("settings") == settings:
        require_unchanged(changed_shards(begun[-1]["source"], source), len(source), directory.path)
    else:
        start_over(directory, output, "started", plan=plan.digest, settings=settings, source=source)
    journaled: dict[str, str] = {}
    for fact in directory.facts("shards"):
        if fact["plan"] == plan.digest:
            journaled |= fact["shards"]
    buffer = Buffer(8 * 2**20) if journaled else Buffer(PAGE)
    return {
        layout.shard.name
        for layout in layouts
        if (path := output / layout.shard.name).is_file()
        and path.stat().st_size == layout.nbytes
        and digest(path, buffer) == journaled.get(layout.shard.name)
    }


@dataclass(slots=True)
class _Done:
    job: Job
    buffer: Buffer | None
    crc: int
    totals: Totals


class _Line:
    """The workers, their buffers, and the writer."""

    def __init__(self, task: Task, layouts: list[ShardLayout], directory: RunDirectory, workers: int) -> None:
        self.task, self.directory = task, directory
        self.reader = DirectReader(task.source.directory)
        self.work = Work(task)
        self.layouts = {layout.shard.name: layout for layout in layouts}
        self.workers = workers
        # All buffers have the size of the largest job, computed now, so that memory use is known at the start.
        inputs = outputs = 0
        for job in self._jobs():
            inputs, outputs = max(inputs, job.input_bytes), max(outputs, job.output_bytes)
        self._input_bytes = inputs
        longest_header = max((len(layout.header) for layout in layouts), default=0)
        self._free = [Buffer(max(outputs + PAGE, longest_header)) for _ in range(workers + 2)] if layouts else []
        self._tickets = enumerate(self._jobs())
        self._done: dict[int, _Done] = {}
        self._ticket_lock, self._changed = threading.Lock(), threading.Condition()
        self._failure: BaseException | None = None
        self.written = self.bytes_read = 0

    def run(self, tick: Callable[[int], object]) -> None:
        """Runs to the end and calls `tick(bytes written)` in the calling thread. Raises the first failure of any
        thread."""
        if not self.layouts:
            tick(0)
            return
        threads = [
            threading.Thread(target=self._guarded, args=(self._worker,), daemon=True) for _ in range(self.workers)
        ]
        threads.append(threading.Thread(target=self._guarded, args=(self._writer,), daemon=True))
        for thread in threads:
            thread.start()
        try:
            while threads[-1].is_alive():
                threads[-1].join(_TICK)
                tick(self.written)
            tick(self.written)  # the writer may finish before the first check
        except BaseException as error:
            self._fail(error)
        for thread in threads:
            thread.join()
        self.reader.close()
        if self._failure is not None:
            raise self._failure

    def _jobs(self) -> Iterator[Job]:
        for layout in self.layouts.values():
            yield from layout.jobs()

    def _guarded(self, target: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        try:
            target()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
        self.work.stop()

    def _worker(self) -> None:
        buffer = Buffer(self._input_bytes)
        while True:
            # Ticket and output buffer are taken together: otherwise later jobs could take all buffers and wait for an
            # earlier one that has none.
            with self._ticket_lock:
                number, job = next(self._tickets, (-1, None))
                if job is None:
                    return
                target = self._take() if job.output_bytes else None
            if self._failure is not None:
                return
            extents = [extent for piece in self.work.needed(job) for extent in piece.extents.values()]
            data = self.reader.read(extents, buffer)
            begin = job.position % PAGE
            room = target.array[begin : begin + job.output_bytes] if target is not None else None
            totals = self.work.do(job, data, room)
            crc = zlib.crc32(room.data) if room is not None else 0
            with self._changed:
                self.bytes_read += sum(extent.end - extent.begin for extent in extents)
                self._done[number] = _Done(job, target, crc, totals)
                self._changed.notify_all()

    def _take(self) -> Buffer | None:
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._failure is not None)
            return self._free.pop() if self._free else None

    def _writer(self) -> None:
        number, totals = 0, Totals()
        for layout in self.layouts.values():
            writer = DirectWriter(self.task.output / layout.shard.name, layout.nbytes)
            try:
                self._append(writer, layout)
                while True:
                    done = self._next(number)
                    number += 1
                    totals = totals + done.totals
                    if done.buffer is not None:
                        writer.append(done.buffer, done.job.output_bytes, done.crc)
                        self.written += done.job.output_bytes
                        with self._changed:
                            self._free.append(done.buffer)
                            self._changed.notify_all()
                    if done.job.last:
                        break
                self._finish(writer, layout, totals)
                totals = Totals()
            except BaseException:
                writer.abandon()
                raise

    def _next(self, number: int) -> _Done:
        with self._changed:
            self._changed.wait_for(lambda: number in self._done or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            return self._done.pop(number)

    def _append(self, writer: DirectWriter, layout: ShardLayout) -> None:
        header = Buffer(len(layout.header))
        header.array[: len(layout.header)] = memoryview(layout.header)
        writer.append(header, len(layout.header), zlib.crc32(layout.header))
        self.written += len(layout.header)

    def _finish(self, writer: DirectWriter, layout: ShardLayout, totals: Totals) -> None:
        """Journals a durable shard, unless the source changed while it was written."""
        source = self.task.source
        changed = changed_shards(source.state, shard_state(source.directory, source.shards))
        if changed:
            raise SourceError(
                f"{source.directory}: changed while it was converted: {changed[0]}; pass --restart when it no longer "
                "changes"
            )
        mark = writer.finish()
        facts: dict[str, Any] = {"lossless": totals.lossless, "requantized": totals.requantized}
        self.directory.record(
            "shards", plan=self.task.plan.digest, block=layout.shard.block, shards={layout.shard.name: mark}, **facts
        )
        self.directory.event("shard", shard=layout.shard.name, block=layout.shard.block, bytes=layout.nbytes, **facts)
