"""Measures how fast this machine is at the operations of a run, in seconds, with the model's own shapes and the
source's own bytes. It leaves no file: writes go to an unnamed file (O_TMPFILE)."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch.nn import functional

from calibration.checkpoint import native, nvfp4
from calibration.checkpoint.dequantize import dequantize
from calibration.checkpoint.direct import PAGE, Buffer, DirectReader, Extent
from calibration.convert.layout import ShardLayout
from calibration.convert.work import Work
from calibration.forecast.cost import Product
from calibration.plan.schemes import SCHEMES
from calibration.plan.task import Task
from calibration.runs.disk import existing

#: Bounds of one measurement: it is repeated until `_LEAST` seconds have passed, on at most this many bytes and
#: operations.
_LEAST, _SAMPLE_BYTES, _OPERATIONS, _WRITTEN = 0.02, 32 << 20, 4e9, 16 << 20
#: Bytes written per second if the file system does not support O_TMPFILE. An assumption, and reported as one.
ASSUMED_WRITE = 500e6


@dataclass(frozen=True)
class Spent:
    """Wall-clock seconds and CPU seconds (all threads)."""

    clock: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.clock + other.clock, self.cpu + other.cpu)

    def __mul__(self, factor: float) -> Spent:
        return Spent(self.clock * factor, self.cpu * factor)


class Watch:
    """A stopwatch for wall-clock and CPU seconds."""

    def __init__(self) -> None:
        self._clock, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> Spent:
        """The time since the last lap; waits for an accelerator's work."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        clock, cpu = time.perf_counter(), time.process_time()
        spent = Spent(clock - self._clock, cpu - self._cpu)
        self._clock, self._cpu = clock, cpu
        return spent


def timed(call: Callable[[], object], seconds: Callable[[], float] = time.thread_time) -> Spent:
    """The time of one call, as the mean of the calls that fill `_LEAST` `seconds`; the first call only warms up, unless it is
    long. `seconds`: a clock, by default this thread's CPU seconds: by the wall clock a measurement would end after one call if
    another process takes the processor then, and one of 20 ms says up to 3.4 times too much under load."""
    for warm in (False, True):
        count, begun, clock, cpu = 0, seconds(), time.perf_counter(), time.process_time()
        while not count or seconds() - begun < (_LEAST if warm else 0):
            call()
            count += 1
        spent = Spent(time.perf_counter() - clock, time.process_time() - cpu) * (1 / count)
        if seconds() - begun > 10 * _LEAST:
            break
    return spent


class Machine:
    """The measurements for one plan, each made when first requested. `device` is where the blocks compute."""

    def __init__(self, task: Task, device: torch.device | None = None) -> None:
        self.task = task
        self.device = native.computing_device(device)
        self.product = cache(self._product)
        self.attention = cache(self._attention)
        self.norm = cache(self._norm)
        self.expert, self.observe = cache(self._expert), cache(self._observe)
        self.load = cache(self._load)
        self.rounding, self.predictions = cache(self._rounding), cache(self._predictions)

    def _time(self, call: Callable[[], object]) -> Spent:
        def synchronised() -> None:
            call()
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)

        with torch.no_grad():
            # An accelerator's work takes little of this thread's.
            return timed(synchronised, time.thread_time if self.device.type == "cpu" else time.perf_counter)

    def _product(self, product: Product, tokens: int) -> Spent:
        """The time of one product on a batch of `tokens`; of a routed expert's product, on its share of them."""
        rows = max(round(tokens * product.share), 1)
        tried = min(rows, max(64, int(_OPERATIONS / (2 * product.rows * product.columns))))
        left = torch.randn(tried, product.columns, dtype=torch.bfloat16, device=self.device)
        right = torch.randn(product.rows, product.columns, dtype=torch.bfloat16, device=self.device)
        return self._time(lambda: functional.linear(left, right)) * (rows / tried)

    def _attention(self, heads: int, dim: int, length: int) -> Spent:
        """The time of eager attention of one sample: scores, mask, softmax in float32, values."""
        tried = max(1, min(heads, int(_OPERATIONS / (4 * dim * length**2 + 1))))
        query, key, value = torch.randn(3, tried, length, dim, dtype=torch.bfloat16, device=self.device)
        mask = torch.zeros(1, length, length, dtype=torch.bfloat16, device=self.device)

        def attend() -> torch.Tensor:
            scores = torch.matmul(query, key.transpose(1, 2)) * dim**-0.5 + mask
            return torch.matmul(functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)

        return self._time(attend) * (heads / tried)

    def _norm(self, tokens: int, width: int) -> Spent:
        """The time of one normalization of `[tokens, width]` in float32."""
        tried = max(1, min(tokens, (1 << 24) // max(width, 1)))
        hidden = torch.randn(tried, width, dtype=torch.bfloat16, device=self.device)
        weight = torch.ones(width, device=self.device)
        return self._time(lambda: functional.rms_norm(hidden.float(), (width,), weight).to(hidden.dtype)) * (
            tokens / tried
        )

    def _expert(self, down: Product, tokens: int) -> Spent:
        """The time of an expert on a batch of `tokens` besides its products: activation of all tokens that it sees, and
        gathering, weighting and adding up the rows that are routed to it."""
        seen = max(round(tokens * down.observed), 1)
        gate = torch.randn(seen, down.columns, dtype=torch.bfloat16, device=self.device)
        output = torch.zeros(tokens, down.rows, dtype=torch.bfloat16, device=self.device)
        routed = torch.arange(max(round(tokens * down.share), 1), device=self.device)
        weights = torch.ones(len(routed), 1, dtype=torch.bfloat16, device=self.device)

        def work() -> None:
            first, second = torch.cat([gate, gate], dim=-1).chunk(2, dim=-1)
            (functional.silu(first) * second)[routed]
            output.index_add_(0, routed, output[routed] * weights)

        return self._time(work)

    def _observe(self, tokens: int, width: int) -> Spent:
        """The time in which an activation observer finds the extremes of `[tokens, width]`."""
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=self.device)
        return self._time(lambda: torch.aminmax(hidden))

    def _load(self, kind: str) -> Spent:
        """The time per source byte of reading and dequantizing weights of this stored format, from the block with most
        of it, after dropping them from the page cache."""
        found = [name for name in self.task.formats.checkpoint.tensors if self._kind(name) == kind]
        names = sorted(found, key=lambda name: -self.task.formats.checkpoint.tensors[name].nbytes)
        total, chosen = 0, list[str]()
        for name in names:
            size = self.task.formats.checkpoint.tensors[name].nbytes
            if chosen and total + size > _SAMPLE_BYTES:
                break
            chosen.append(name)
            total += size
        if not chosen:
            return Spent()
        self._forget(chosen)
        watch = Watch()
        with torch.no_grad():
            for name in chosen:
                self._onload(name)
        return watch.lap() * (1 / total)

    def _kind(self, name: str) -> str:
        return "scale" if name in self.task.formats.companions else self.task.formats.of(name).kind

    def _onload(self, name: str) -> torch.Tensor:
        if self.device.type == "cpu":
            return self.task.formats.read(name)
        checkpoint, stored = self.task.formats.checkpoint, self.task.formats.of(name)
        scales = {role: checkpoint.read(scale).to(self.device) for role, scale in stored.scales.items()}
        return dequantize(stored, checkpoint.read(name).to(self.device), scales, torch.bfloat16)

    def _forget(self, names: list[str]) -> None:
        checkpoint = self.task.formats.checkpoint
        for shard in {checkpoint.tensors[name].shard for name in names}:
            with (checkpoint.directory / shard).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @cached_property
    def read(self) -> Spent:
        """The time per source byte of reading past the page cache, from the largest shard."""
        directory = self.task.formats.checkpoint.directory
        shard = max(self.task.formats.checkpoint.shards, key=lambda name: (directory / name).stat().st_size)
        size = min((directory / shard).stat().st_size, _SAMPLE_BYTES)
        reader = DirectReader(directory)
        buffer = Buffer(size + 8192)
        try:
            watch = Watch()
            reader.read([Extent(shard, 0, size)], buffer)
            return watch.lap() * (1 / size)
        finally:
            reader.close()

    @cached_property
    def pack(self) -> Spent:
        """The time per value of group maxima, scales and packing of a quantized weight of common size."""
        if not self.task.plan.quantized:
            return Spent()
        rows, columns = self._common_shape()
        weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=self.device)

        def work() -> None:
            low, high = torch.aminmax(weight.reshape(rows, -1, nvfp4.GROUP), dim=-1)
            largest = torch.maximum(-low, high).float()
            glob = nvfp4.RANGE / largest.max()
            scale = (glob * largest / 6).to(torch.float8_e4m3fn)
            nvfp4.pack(weight, scale, glob.reshape(1))

        return self._time(work) * (1 / (rows * columns))

    def _common_shape(self) -> tuple[int, int]:
        """The median shape `[M, K]` of the quantized weights, of at most 16 M values."""
        shapes = [self.task.formats.of(step.source).shape for step in self.task.plan.quantized.values()]
        rows, columns = sorted(shapes, key=lambda shape: shape[0] * shape[1])[len(shapes) // 2]
        return max(1, min(rows, (1 << 24) // columns)), columns

    def _rounding(self, scheme: str) -> Spent:
        """The time per value in which a weight of common size is rounded to a scheme and back, as a size budget tries it."""
        from calibration.engine.sensitivity import rounded_weight  # imported late: needs transformers

        rows, columns = self._common_shape()
        weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=self.device)
        return self._time(lambda: rounded_weight(weight, SCHEMES[scheme])) * (1 / (rows * columns))

    def _predictions(self, vocabulary: int, width: int, tokens: int) -> Spent:
        """The time of the head on `tokens` and of the divergence of its predictions from others."""
        tried = max(1, min(vocabulary, (1 << 23) // max(width, 1)))
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=self.device)
        head = torch.randn(tried, width, dtype=torch.bfloat16, device=self.device)
        exact = torch.randn(tokens, tried, device=self.device).log_softmax(-1)

        def compare() -> torch.Tensor:
            made = functional.linear(hidden, head).float().log_softmax(-1)
            return functional.kl_div(made, exact, reduction="sum", log_target=True)

        return self._time(compare) * (vocabulary / tried)

    @cached_property
    def digest(self) -> Spent:
        """The time per byte of sha256."""
        data = bytes(1 << 22)
        return timed(lambda: hashlib.sha256(data).digest()) * (1 / len(data))

    @cached_property
    def write(self) -> Spent | None:
        """The time per byte of writing and fsyncing on the output's file system, in an unnamed file; None if it does
        not support O_TMPFILE."""
        data = os.urandom(_WRITTEN)
        try:
            file = os.open(existing(Path(self.task.recipe.output)), os.O_TMPFILE | os.O_WRONLY, 0o600)
        except (OSError, AttributeError):
            return None
        try:
            watch = Watch()
            os.write(file, data)
            os.fsync(file)
            return watch.lap() * (1 / len(data))
        except OSError:
            return None
        finally:
            os.close(file)

    @cached_property
    def conversion(self) -> Spent:
        """The time per output byte of the methods without calibration: the real jobs of a shard with quantization, in
        memory, on one thread, without reading."""
        shards = [
            s
            for s in self.task.plan.shards
            if any(self.task.plan.steps[x].action in ("quantize", "cast") for x in s.sources)
        ]
        shard = (shards or list(self.task.plan.shards))[0]
        work, reader = Work(self.task), DirectReader(self.task.formats.checkpoint.directory)
        spent, done = Spent(), 0
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for job in ShardLayout(self.task.plan, self.task.formats, shard).jobs():
                buffer, room = Buffer(job.input_bytes), Buffer(job.output_bytes + PAGE)
                extents = [extent for piece in work.needed(job) for extent in piece.extents.values()]
                data = reader.read(extents, buffer)
                watch = Watch()
                work.do(job, data, room.array[: job.output_bytes])
                spent += watch.lap()
                done += job.output_bytes
                if done > _SAMPLE_BYTES:
                    break
        finally:
            reader.close()
            torch.set_num_threads(threads)
        return spent * (1 / max(done, 1))
