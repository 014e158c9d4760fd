"""Lays out an output shard and divides the work into jobs that fill it front to back.

A shard consists of the header (known before any byte is read, padded to a page), the tensors whose size keeps 8-byte
alignment, in the order of the work (with the projections of a fused group adjacent), and the tensors of other sizes, so
that every tensor is aligned for its dtype. Global scales take 4 bytes each and therefore come last, when they are
known.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from calibration.checkpoint.direct import PAGE, Extent, capacity
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.header import OutputTensor, TensorHeader
from calibration.plan.plan import Plan, PlannedShard, Step
from calibration.plan.schemes import FP8_BLOCK

#: Source bytes (or output bytes, if there are more) of an ordinary job, and of a fused group that becomes one job so
#: that it is read only once; a larger group is read twice, first for its maxima.
JOB, FUSED = 16 * 2**20, 64 * 2**20
_ALIGNMENT = 8


@dataclass(slots=True)
class Piece:
    """Rows [begin, end) of a weight; for a copy, its bytes [begin, end).

    `kind`: copy, cast, quantize; statistics (only maxima, no output); scales (group scales that `quantize` pieces of
    the same step have kept for later); constant (a global scale). `inline`: group scales directly follow the packed
    rows. `measures`: the worker computes the maxima of this piece itself; otherwise earlier statistics pieces do."""

    kind: str
    step: Step
    begin: int
    end: int
    output_bytes: int
    extents: dict[str, Extent] = field(default_factory=dict)
    inline: bool = False
    measures: bool = False
    output: OutputTensor | None = None


@dataclass(slots=True)
class Job:
    """Pieces that one worker processes together; their outputs are contiguous. `last` marks the last job of a shard."""

    shard: PlannedShard
    pieces: list[Piece]
    position: int
    last: bool = False

    @property
    def output_bytes(self) -> int:
        return sum(piece.output_bytes for piece in self.pieces)

    @property
    def input_bytes(self) -> int:
        return capacity(extent for piece in self.pieces for extent in piece.extents.values())


class ShardLayout:
    """Header, size and jobs of one output shard."""

    def __init__(self, plan: Plan, formats: Formats, shard: PlannedShard) -> None:
        self.plan, self.formats, self.shard = plan, formats, shard
        self._fused = {module: group for group in plan.fused for module in group}
        self.units = self._units()
        self.front: list[tuple[Step, OutputTensor]] = []
        back: list[tuple[Step, OutputTensor]] = []
        for step in itertools.chain.from_iterable(self.units):
            for output in step.outputs:
                (back if output.nbytes % _ALIGNMENT else self.front).append((step, output))
        self.back = sorted(back, key=lambda entry: -(entry[1].nbytes & -entry[1].nbytes))
        self._in_front = {output.name for _, output in self.front}
        self.header = self._header()
        self.nbytes = len(self.header) + sum(output.nbytes for _, output in (*self.front, *self.back))

    def jobs(self) -> Iterator[Job]:
        """Yields the jobs in the order of the file. The first one's output begins after the header."""
        position, pieces = len(self.header), list(self._pieces())
        batch: list[Piece] = []
        size = 0
        for unit in pieces:
            weight = sum(max(piece.output_bytes, _input_bytes(piece)) for piece in unit)
            if batch and size + weight > JOB:
                yield Job(self.shard, batch, position)
                position += sum(piece.output_bytes for piece in batch)
                batch, size = [], 0
            batch = batch + unit
            size += weight
        yield Job(self.shard, batch, position, last=True)

    def _units(self) -> list[list[Step]]:
        """The shard's steps; those of a fused group in this shard are together, at the place of the first."""
        steps = [self.plan.steps[source] for source in self.shard.sources if self.plan.steps[source].outputs]
        quantized = {step.module: step for step in steps if step.action == "quantize"}
        units: list[list[Step]] = []
        done: set[str] = set()
        for step in steps:
            if step.source in done:
                continue
            unit = [step]
            if step.action == "quantize":
                unit = [quantized[module] for module in self._fused.get(step.module, ()) if module in quantized] or unit
            done.update(member.source for member in unit)
            units.append(unit)
        return units

    def _pieces(self) -> Iterator[list[Piece]]:
        """Yields lists of pieces that must be in one job."""
        measured: set[str] = set()
        for unit in self.units:
            if unit[0].action != "quantize":
                for step in unit:
                    yield from self._plain_pieces(step)
                continue
            members = [m for m in self._fused.get(unit[0].module, (unit[0].module,)) if m in self.plan.quantized]
            whole = [piece for step in unit for piece in self._rows(step, "quantize", 0, None, whole=True)]
            tiles = self.plan.groups[str(unit[0].group)] is FP8_BLOCK
            fits = not tiles and sum(_input_bytes(piece) for piece in whole) <= FUSED
            here = {step.module for step in unit} if fits else set()
            for module in () if tiles else members:
                if module not in here and module not in measured:
                    measured.add(module)
                    yield from ([piece] for piece in self._striped(self.plan.quantized[module], "statistics"))
            if fits:
                for piece in whole:
                    piece.measures = True
                yield whole
                continue
            for step in unit:
                yield from ([piece] for piece in self._striped(step, "quantize"))
                if self._scales(step).name in self._in_front:
                    yield [self._kept_back(step)]
        for step, output in self.back:
            if step.action == "copy":
                yield from self._copies(step)
            elif step.action == "cast":
                yield [self._whole(step, output)]
            elif step.action == "invert" or output.shape in ((1,), ()):  # a global scale of either dialect
                yield [Piece("constant", step, 0, 1, output.nbytes, output=output)]
            else:
                yield [self._kept_back(step)]

    def _plain_pieces(self, step: Step) -> Iterator[list[Piece]]:
        for output in step.outputs:
            if output.name not in self._in_front:
                continue
            if step.action == "cast" and (len(output.shape) == 2 or step.source in self.formats.checkpoint.whole):
                yield from ([piece] for piece in self._striped(step, "cast"))
            elif step.action == "cast":
                yield [self._whole(step, output)]
            else:
                yield from self._copies(step)

    def _copies(self, step: Step) -> Iterator[list[Piece]]:
        header = self.formats.checkpoint.header(step.source)
        if header.layout is not None:  # its bytes lie apart
            whole = Extent(header.shard, header.begin, header.end)
            yield [Piece("copy", step, 0, header.nbytes, header.nbytes, {"weight": whole})]
            return
        for begin in range(0, header.nbytes, JOB):
            end = min(begin + JOB, header.nbytes)
            extent = Extent(header.shard, header.begin + begin, header.begin + end)
            yield [Piece("copy", step, begin, end, end - begin, {"weight": extent})]

    def _whole(self, step: Step, output: OutputTensor) -> Piece:
        """One piece that casts a tensor of any shape."""
        header = self.formats.checkpoint.header(step.source)
        if len(output.shape) == 2:
            return next(self._rows(step, "cast", 0, None))
        return Piece("cast", step, 0, 1, output.nbytes, {"weight": Extent(header.shard, header.begin, header.end)})

    def _scales(self, step: Step) -> OutputTensor:
        return next(output for output in step.outputs if output.name.endswith(".weight_scale"))

    def _kept_back(self, step: Step) -> Piece:
        return Piece("scales", step, 0, 1, self._scales(step).nbytes)

    def _striped(self, step: Step, kind: str) -> Iterator[Piece]:
        """Yields pieces of about JOB bytes, in whole tiles."""
        stored = self.formats.of(step.source)
        rows = stored.shape[0]
        header = self.formats.checkpoint.header(step.source)
        if header.layout is not None:  # each stripe would read the whole matrix that contains it
            yield from self._rows(step, kind, 0, None)
            return
        # FP8_BLOCK is written in tiles of 128 rows; the rows of a stack are its experts.
        tile = 1 if len(stored.shape) > 2 else math.lcm(stored.tile[0] if stored.tile else 1, 128)
        row = max(header.nbytes, step.outputs[0].nbytes) / max(rows, 1)
        stride = max(int(JOB / max(row, 1)) // tile, 1) * tile
        for begin in range(0, max(rows, 1), stride):
            yield from self._rows(step, kind, begin, min(begin + stride, rows))

    def _rows(self, step: Step, kind: str, begin: int, end: int | None, whole: bool = False) -> Iterator[Piece]:
        stored, header = self.formats.of(step.source), self.formats.checkpoint.header
        rows = stored.shape[0]
        end = rows if end is None else end
        extents = {"weight": _part(header(step.source), begin, end)}
        for role, name in stored.scales.items():
            rows_of = stored.companion_rows(role, begin, end)
            extents[role] = _part(header(name), *(rows_of or (0, None)))
        if kind != "quantize":
            out = step.outputs[0].nbytes * (end - begin) // max(rows, 1) if kind == "cast" else 0
            yield Piece(kind, step, begin, end, out, extents)
            return
        scales = self._scales(step)
        inline = whole and scales.name in self._in_front
        out = step.outputs[0].nbytes * (end - begin) // max(rows, 1) + (scales.nbytes if inline else 0)
        yield Piece(kind, step, begin, end, out, extents, inline)

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for _, output in (*self.front, *self.back):
            entries[output.name] = {
                "dtype": output.dtype,
                "shape": list(output.shape),
                "data_offsets": [at, at + output.nbytes],
            }
            at += output.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % PAGE)
        return struct.pack("<Q", len(text)) + text


def _part(header: TensorHeader, begin: int, end: int | None) -> Extent:
    """The bytes of rows [begin, end); if `end` is None, of all rows; those of the whole matrix that contains the tensor if
    its rows are not adjacent."""
    if end is None or header.layout is not None:
        return Extent(header.shard, header.begin, header.end)
    row = header.nbytes // header.shape[0]
    return Extent(header.shard, header.begin + begin * row, header.begin + end * row)


def _input_bytes(piece: Piece) -> int:
    return sum(extent.end - extent.begin for extent in piece.extents.values())
