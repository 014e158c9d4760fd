"""Computes one job of a conversion: statistics, then the output bytes. Does no input or output."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from calibration.checkpoint import kernels, native
from calibration.checkpoint.dequantize import cast_dtype, dequantize, is_finite
from calibration.checkpoint.dialect import COMPRESSED_TENSORS, DIALECTS, inverse
from calibration.checkpoint.direct import Bytes, Extent
from calibration.checkpoint.formats import TORCH_DTYPES
from calibration.checkpoint.header import DTYPE_BYTES, TensorHeader
from calibration.checkpoint.index import TORCH
from calibration.checkpoint.kernels import Stripe
from calibration.checkpoint.nvfp4 import RANGE
from calibration.checkpoint.tiles import TILE, quantize_tiles
from calibration.convert.layout import Job, Piece
from calibration.plan.inverted import invert_scales
from calibration.plan.plan import Step
from calibration.plan.schemes import FP8_BLOCK
from calibration.plan.task import Task
from recipes.errors import Interrupted, SourceError


@dataclass
class Totals:
    """Counts of MXFP4 modules by result."""

    lossless: int = 0
    requantized: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.lossless + other.lossless, self.requantized + other.requantized)


@dataclass
class _Statistic:
    """Statistics of one weight: largest magnitude, exponents of its MXFP4 scales, and the row ranges seen so far."""

    rows: int
    amax: float = 0.0
    exponents: tuple[int, int] | None = None
    seen: set[tuple[int, int]] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return (0, self.rows) in self.seen or sum(end - begin for begin, end in self.seen) >= self.rows


@dataclass(frozen=True)
class _Decision:
    """The weight global scale of a fused group, and whether its MXFP4 codes are kept."""

    scale: np.float32
    lossless: bool


class Work:
    """Executes jobs of one plan, from any number of threads. Keeps a few numbers per weight, and the group scales of
    striped weights until they are written."""

    def __init__(self, task: Task) -> None:
        recipe, plan, formats = task.recipe, task.plan, task.formats
        self.plan, self.formats = plan, formats
        self.settings, self.dtype = recipe.convert, TORCH_DTYPES[recipe.export.plain_dtype]
        self.inverted = invert_scales(plan, formats)
        self._dialect = DIALECTS[plan.dialect]
        self._lossless = recipe.export.mxfp4 == "lossless"
        self._fused = {module: group for group in plan.fused for module in group}
        self._statistics: dict[str, _Statistic] = {}
        self._kept_back: dict[str, Bytes] = {}
        self._rows_done: dict[str, int] = defaultdict(int)
        self._changed = threading.Condition()
        self._stopped = False
        self._input_scale = np.float32(RANGE) / np.float32(self.settings.input_amax)

    def stop(self) -> None:
        """Wakes every thread that waits in `do`, which then raises Interrupted."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def needed(self, job: Job) -> list[Piece]:
        """The pieces of `job` whose bytes must be read: statistics that are already known need none."""
        with self._changed:
            return [p for p in job.pieces if p.kind != "statistics" or not self._statistic(p.step).complete]

    def do(self, job: Job, data: dict[Extent, Bytes], output: Bytes | None) -> Totals:
        """Fills `output`, uint8 `[job.output_bytes]`. Raises SourceError that names the tensor for NaN and Inf."""
        stripes = {}
        for number, piece in enumerate(job.pieces):
            if piece.kind in ("quantize", "statistics") and piece.extents["weight"] in data:
                try:
                    stripes[number] = self._stripe(piece, data)
                    if piece.kind == "statistics" or piece.measures:
                        self._measure(piece, stripes[number])
                except kernels.NotFinite as problem:
                    raise self._named(piece, problem) from None
        totals, at = Totals(), 0
        for number, piece in enumerate(job.pieces):
            if not piece.output_bytes:
                continue
            assert output is not None
            target = output[at : at + piece.output_bytes]
            at += piece.output_bytes
            try:
                if piece.kind == "quantize":
                    totals = totals + self._quantize(piece, stripes.pop(number), target)
                else:
                    self._other(piece, data, target)
            except kernels.NotFinite as problem:
                raise self._named(piece, problem) from None
        return totals

    def _other(self, piece: Piece, data: dict[Extent, Bytes], target: Bytes) -> None:
        if piece.kind == "copy":
            given = self._stored(piece, "weight", data)
            if not kernels.finite(self.formats.checkpoint.header(piece.step.source).dtype, given):
                raise kernels.NotFinite("holds NaN or Inf")
            target[:] = given
        elif piece.kind == "cast":
            target[:] = self._cast(piece, data)
        elif piece.kind == "scales":
            target[:] = self._await_scales(piece)
        else:
            assert piece.output is not None
            if piece.step.action == "invert":
                scale = self.inverted.values[piece.step.source]
            else:
                of_inputs = piece.output.name.endswith(f".{self._dialect.input_scale}")
                scale = self._input_scale if of_inputs else self._decision(piece.step).scale
                scale = scale if self._dialect is COMPRESSED_TENSORS else inverse(scale)
            target[:] = np.array([scale], np.float32).view(np.uint8)

    def _stripe(self, piece: Piece, data: dict[Extent, Bytes]) -> Stripe:
        stored = self.formats.of(piece.step.source)
        dtype = self.formats.checkpoint.header(piece.step.source).dtype
        codes = self._stored(piece, "weight", data).reshape(piece.end - piece.begin, -1)
        companions = {role: self._companion(piece, role, data) for role in piece.extents if role != "weight"}
        return Stripe.of(stored, dtype, codes, companions)

    def _header(self, piece: Piece, role: str) -> TensorHeader:
        source = piece.step.source
        name = source if role == "weight" else self.formats.of(source).companions[role]
        return self.formats.checkpoint.header(name)

    def _stored(self, piece: Piece, role: str, data: dict[Extent, Bytes]) -> Bytes:
        """The piece's bytes of a weight or of one of its companions; a piece of a tensor whose bytes lie apart is the whole
        tensor."""
        header, given = self._header(piece, role), data[piece.extents[role]]
        return given if header.layout is None else header.layout.take(given, DTYPE_BYTES[header.dtype]).reshape(-1)

    def _companion(self, piece: Piece, role: str, data: dict[Extent, Bytes]) -> torch.Tensor:
        """A scale companion's rows as stored; scalars have shape `[1]`."""
        header = self._header(piece, role)
        tensor = torch.from_numpy(self._stored(piece, role, data).copy()).view(TORCH[header.dtype])
        return tensor.reshape(-1, *header.shape[1:]) if len(header.shape) > 1 else tensor

    def _measure(self, piece: Piece, stripe: Stripe) -> None:
        largest = kernels.amax(stripe)
        found = kernels.exponents(stripe) if stripe.stored.kind == "mxfp4" else None
        with self._changed:
            statistic = self._statistic(piece.step)
            statistic.amax = max(statistic.amax, largest)
            if found is not None:
                low, high = statistic.exponents or found
                statistic.exponents = (min(low, found[0]), max(high, found[1]))
            statistic.seen.add((piece.begin, piece.end))
            self._changed.notify_all()

    def _statistic(self, step: Step) -> _Statistic:
        rows = self.formats.of(step.source).shape[0]
        return self._statistics.setdefault(step.module, _Statistic(rows))

    def _decision(self, step: Step) -> _Decision:
        """Waits until the statistics of every member of the fused group are complete."""
        members = [m for m in self._fused.get(step.module, (step.module,)) if m in self.plan.quantized]
        with self._changed:
            statistics = [self._statistic(self.plan.quantized[module]) for module in members]
            self._wait(lambda: all(statistic.complete for statistic in statistics))
        kinds = {self.formats.of(self.plan.quantized[module].source).kind for module in members}
        if self._lossless and kinds == {"mxfp4"}:
            scale = kernels.common_lossless_scale(statistic.exponents for statistic in statistics)
            if scale is not None:
                return _Decision(scale, True)
        return _Decision(kernels.global_scale(max(statistic.amax for statistic in statistics)), False)

    def _wait(self, ready: object) -> None:
        assert callable(ready)
        self._changed.wait_for(lambda: self._stopped or ready())
        if self._stopped:
            raise Interrupted(
                "the conversion was stopped; run the same command to resume after the last finished shard"
            )

    def _quantize(self, piece: Piece, stripe: Stripe, target: Bytes) -> Totals:
        step, rows = piece.step, piece.end - piece.begin
        weight, scales = step.outputs[0], step.outputs[1]
        row, scale_row = weight.nbytes // weight.shape[0], scales.nbytes // scales.shape[0]
        packed = target[: rows * row].reshape(rows, row)
        if self.plan.groups[str(step.group)] is FP8_BLOCK:
            first, last = piece.begin // TILE, -(-piece.end // TILE)
        else:
            first, last = piece.begin, piece.end
        if piece.inline:
            output = target[rows * row :].reshape(last - first, scale_row)
        else:
            with self._changed:
                whole = self._kept_back.setdefault(step.module, np.empty((scales.shape[0], scale_row), np.uint8))
            output = whole[first:last]
        totals = Totals()
        if self.plan.groups[str(step.group)] is FP8_BLOCK:
            _quantize_tiles(stripe, packed, output)
        else:
            decision = self._decision(step)
            (kernels.respell if decision.lossless else kernels.quantize)(stripe, decision.scale, packed, output)
            if stripe.stored.kind == "mxfp4" and piece.begin == 0:
                totals = Totals(int(decision.lossless), int(not decision.lossless))
        if not piece.inline:
            with self._changed:
                self._rows_done[step.module] += rows
                self._changed.notify_all()
        return totals

    def _await_scales(self, piece: Piece) -> Bytes:
        module, rows = piece.step.module, piece.step.outputs[0].shape[0]
        with self._changed:
            self._wait(lambda: self._rows_done[module] == rows)
            return self._kept_back.pop(module).reshape(-1)

    def _cast(self, piece: Piece, data: dict[Extent, Bytes]) -> Bytes:
        step = piece.step
        stored, header = self.formats.of(step.source), self.formats.checkpoint.header(step.source)
        codes = torch.from_numpy(self._stored(piece, "weight", data).copy()).view(TORCH[header.dtype])
        if stored.kind != "plain":
            codes = codes.reshape(piece.end - piece.begin, *header.shape[1:])
        scales = {role: self._companion(piece, role, data) for role in piece.extents if role != "weight"}
        dtype = cast_dtype(step.outputs[0].dtype, self.dtype)
        moved = {role: scale.to(native.device()) for role, scale in scales.items()}
        value = dequantize(stored, codes.to(native.device()), moved, dtype).contiguous()
        if not is_finite(value):
            raise kernels.NotFinite(f"holds NaN or Inf, or its values overflow {dtype}")
        made: Bytes = value.view(torch.uint8).cpu().numpy().reshape(-1)
        return made

    def _named(self, piece: Piece, problem: kernels.NotFinite) -> SourceError:
        name = piece.step.source
        return SourceError(
            f"{self.formats.checkpoint.path(name)}: {name}: {problem}; the source is damaged or its values overflowed "
            "when it was made: get a whole copy"
        )


def _quantize_tiles(stripe: Stripe, codes: Bytes, scales: Bytes) -> None:
    """FP8_BLOCK: E4M3 codes and a float32 scale per 128x128 tile."""
    kernels.check_scales(stripe)
    for begin, values in kernels.parts(stripe):
        if not is_finite(values):
            raise kernels.NotFinite("holds NaN or Inf, or its values overflow float32")
        quantized, grid = quantize_tiles(values)
        codes[begin : begin + len(values)] = quantized.view(torch.uint8).cpu().numpy()
        first = begin // TILE
        scales[first : first + len(grid)] = grid.contiguous().view(torch.uint8).cpu().numpy().reshape(len(grid), -1)
