"""Derives the output's tensors again from the source, stripe by stripe, and compares every byte.

Memory: a few stripes per thread, and float32 `[M, K/16]` never as a whole. Methods convert and plain compute in float32 with
`kernels`; calibrate rounds weights to BF16 first, as the model holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from calibration.checkpoint import kernels, nvfp4
from calibration.checkpoint.dequantize import cast_dtype, dequantize, is_positive
from calibration.checkpoint.dialect import COMPRESSED_TENSORS, DIALECTS, inverse
from calibration.checkpoint.formats import TORCH_DTYPES, Formats
from calibration.checkpoint.header import DTYPE_BYTES, OutputTensor
from calibration.checkpoint.index import TORCH, Checkpoint
from calibration.checkpoint.kernels import Stripe
from calibration.checkpoint.nvfp4 import RANGE
from calibration.checkpoint.tiles import TILE, quantize_tiles
from calibration.checkpoint.view import as_compressed_tensors
from calibration.plan.inverted import invert_scales
from calibration.plan.plan import Step
from calibration.plan.schemes import FP8_BLOCK
from calibration.plan.task import Task
from recipes.errors import SourceError
from verify.fidelity.smoothing import SmoothedWeights
from verify.proof.basis import SMOOTHS, Basis, weight_basis

Bytes = npt.NDArray[np.uint8]
#: Source bytes of a stripe.
_STRIPE = 8 * 2**20


@dataclass(frozen=True)
class Difference:
    """Stored elements of one tensor that are not the derived ones: how many, the first one's index (of 4-bit codes in logical
    columns), and that one's stored and derived bytes or codes as hex."""

    tensor: str
    count: int
    first: tuple[int, ...]
    stored: str
    derived: str

    def __str__(self) -> str:
        return (
            f"{self.tensor}: {self.count:,} elements differ, the first at {list(self.first)}: stored {self.stored}, derived "
            f"{self.derived}"
        )


@dataclass
class Derived:
    """What became of some tensors. `proven`: tensor -> bytes compared, whether equal or not; `recorded` and `tuned`: tensor ->
    why it was not derived; `calibrated`: input scales, which come from data."""

    proven: dict[str, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    recorded: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, str] = field(default_factory=dict)
    calibrated: list[str] = field(default_factory=list)

    def add(self, other: Derived) -> None:
        """Takes over what became of other tensors."""
        self.proven |= other.proven
        self.differences += other.differences
        self.recorded |= other.recorded
        self.tuned |= other.tuned
        self.calibrated += other.calibrated


class Rederiver:
    """Derives the tensors of `task` again and compares them with those of `output`, whose headers must be the plan's. `derive`
    may be called from any number of threads."""

    def __init__(self, task: Task, output: Checkpoint) -> None:
        self.task, self.plan, self.formats, self.output = task, task.plan, task.formats, output
        self._inverted = invert_scales(task.plan, task.formats).values
        self._dialect = DIALECTS[task.plan.dialect]
        self._calibrates = task.recipe.method == "calibrate"
        self._lossless = task.recipe.export.mxfp4 == "lossless"
        self._plain = TORCH_DTYPES[task.recipe.export.plain_dtype]
        why = next((entry.name for entry in task.recipe.modifiers if entry.name in SMOOTHS), "")
        self._factors = f"{why}: factors that the output tells, and all that read them have"
        self._smoothed = SmoothedWeights(task.plan.smoothed, Formats(as_compressed_tensors(output)), task.formats)
        self._fused = {module: group for group in task.plan.fused for module in group}

    def units(self) -> Iterator[list[Step]]:
        """Yields the steps with outputs; those of weights that share a global scale together."""
        done: set[str] = set()
        for step in self.plan.steps.values():
            if not step.outputs or step.source in done:
                continue
            unit = [step]
            if step.action == "quantize":
                group = self._fused.get(step.module, (step.module,))
                unit = [self.plan.quantized[module] for module in group if module in self.plan.quantized]
            done.update(member.source for member in unit)
            yield unit

    def derive(self, unit: list[Step]) -> Derived:
        """Derives and compares the tensors of one unit. Raises SourceError if a file cannot be read or the source is damaged."""
        action, found = unit[0].action, Derived()
        smoothed = [step for step in unit if step.module in self._smoothed]
        if untold := [step.module for step in smoothed if not self._smoothed.told(step.module)]:
            why = f"smoothing factors of channels that are zero in {untold[0]} or in what it reads"
            found.tuned |= {output.name: why for step in unit for output in step.outputs}
            return found
        try:
            if action == "quantize":
                self._quantized(unit, found)
            elif action == "copy":
                self._copied(unit[0], found)
            elif action == "cast":
                self._cast(unit[0], found)
            elif action == "rescale":
                self._rescaled(unit[0], found)
            elif action == "invert":
                self._same_scalar(unit[0].outputs[0], self._inverted[unit[0].source], found)
            else:
                found.tuned |= {output.name: action for output in unit[0].outputs}
        except kernels.NotFinite as problem:
            path = self.formats.checkpoint.path(unit[0].source)
            raise SourceError(f"{path}: {unit[0].source} {problem}; get a whole copy") from None
        for step in smoothed:
            name = step.outputs[1 if action == "quantize" else 0].name
            if self._smoothed.takes_out(step.module) and name not in found.tuned:
                found.recorded |= {name: self._factors}
                found.proven.pop(name, None)
        return found

    def _rescaled(self, step: Step, found: Derived) -> None:
        """A tensor that is not quantized, with the factors of its rows and columns."""
        compare, output = _Comparison(self.output, step.outputs[0]), step.outputs[0]
        value = self.formats.read(step.source, TORCH[output.dtype])
        compare(0, _bytes(self._smoothed.scaled(step.module, value)))
        compare.finish(found)

    def _copied(self, step: Step, found: Derived) -> None:
        output, compare = step.outputs[0], _Comparison(self.output, step.outputs[0])
        for begin in range(0, output.nbytes, _STRIPE):
            compare(begin, self.formats.checkpoint.read_span(step.source, begin, min(begin + _STRIPE, output.nbytes)))
        compare.finish(found)

    def _cast(self, step: Step, found: Derived) -> None:
        output, stored, dtype = step.outputs[0], self.formats.of(step.source), self._plain
        dtype = cast_dtype(output.dtype, dtype)
        compare, row = _Comparison(self.output, output), output.nbytes // max(output.shape[0] if output.shape else 1, 1)
        if len(stored.shape) != 2:
            compare(0, _bytes(self.formats.read(step.source, dtype)))
        else:
            for begin, end in self._stripes(step):
                raw, scales = self._rows(step, begin, end)
                compare(begin * row, _bytes(dequantize(stored, raw, scales, dtype)))
        compare.finish(found)

    def _quantized(self, unit: list[Step], found: Derived) -> None:
        basis = weight_basis(self.task.recipe, str(unit[0].group))
        for step in unit:
            if self.plan.groups[str(step.group)].input_scale:
                self._input_scale(step, found)
        if basis.kind == "tuned":
            for step in unit:
                found.tuned |= {output.name: basis.why for output in step.outputs[:3]}
        elif self.plan.groups[str(unit[0].group)] is FP8_BLOCK:
            for step in unit:
                self._tiles(step, basis, found)
        elif basis.kind == "recorded":
            self._codes_alone(unit, basis, found)
        else:
            self._whole(unit, found)

    def _input_scale(self, step: Step, found: Derived) -> None:
        output = step.outputs[3]
        if self._calibrates:
            found.calibrated.append(output.name)
            return
        scale = np.float32(RANGE) / np.float32(self.task.recipe.convert.input_amax)
        self._same_scalar(output, self._spelled(scale), found)

    def _whole(self, unit: list[Step], found: Derived) -> None:
        """Derives codes, group scales and the global scale of weights that share the latter."""
        lossless = self._lossless_scale(unit)
        if lossless is not None:
            scale, fill = lossless, kernels.respell  # type: tuple[np.float32, Callable[..., None] | None]
        elif self._calibrates:
            amax = torch.stack([v.abs().amax() for step in unit for _, v in self._values(step)]).amax().reshape(1)
            scale, fill = np.float32(nvfp4.observed_global_scale(amax).item()), None
        else:
            largest = max(kernels.amax(stripe) for step in unit for _, stripe in self._as_stored(step))
            scale, fill = kernels.global_scale(largest), kernels.quantize
        for step in unit:
            codes, scales = (
                _Comparison(self.output, output, nibbles=not i) for i, output in enumerate(step.outputs[:2])
            )
            rows = step.outputs[0].shape[0]
            width, groups = (output.nbytes // max(rows, 1) for output in step.outputs[:2])
            for begin, packed, group in self._packed(step, scale, fill):
                codes(begin * width, packed)
                scales(begin * groups, group)
            codes.finish(found)
            scales.finish(found)
            self._same_scalar(step.outputs[2], self._spelled(scale), found)

    def _packed(
        self, step: Step, scale: np.float32, fill: Callable[..., None] | None
    ) -> Iterator[tuple[int, Bytes, Bytes]]:
        """Yields (first row, packed codes, group scales) of a weight, both uint8 and flat."""
        if fill is None:
            glob = torch.tensor([scale])
            for begin, values in self._values(step):
                group = nvfp4.observed_group_scales(values, glob)
                yield begin, _bytes(nvfp4.pack(values, group, glob)[0]), _bytes(group)
            return
        for begin, stripe in self._as_stored(step):
            packed = np.empty((stripe.rows, stripe.columns // 2), np.uint8)
            group_scales = np.empty((stripe.rows, stripe.columns // nvfp4.GROUP), np.uint8)
            fill(stripe, scale, packed, group_scales)
            yield begin, packed.reshape(-1), group_scales.reshape(-1)

    def _lossless_scale(self, unit: list[Step]) -> np.float32 | None:
        if not self._lossless or any(self.formats.of(step.source).kind != "mxfp4" for step in unit):
            return None
        spans = [kernels.exponents(stripe) for step in unit for _, stripe in self._as_stored(step)]
        return kernels.common_lossless_scale(spans)

    def _codes_alone(self, unit: list[Step], basis: Basis, found: Derived) -> None:
        """Derives the codes from the scales as they are stored."""
        lossless = self._lossless_scale(unit)
        if lossless is not None:
            return self._whole(unit, found)
        for step in unit:
            packed, group, single, *_ = step.outputs
            if self._dialect is not COMPRESSED_TENSORS:
                found.tuned |= {
                    output.name: f"{basis.why}, and NVIDIA's dialect stores the global scale rounded"
                    for output in (packed, group, single)
                }
                continue
            found.recorded |= {group.name: basis.why, single.name: basis.why}
            glob = self.output.read(single.name).reshape(1)
            codes, rows = _Comparison(self.output, packed, nibbles=True), group.shape[0]
            for begin, values in self._values(step):
                end = begin + values.shape[0]
                width = group.nbytes // max(rows, 1)
                raw = self.output.read_span(group.name, begin * width, end * width)
                scales = torch.from_numpy(raw).view(torch.float8_e4m3fn).reshape(end - begin, -1)
                if not (is_positive(scales) and is_positive(glob)):
                    found.tuned[packed.name] = "its stored scales are not finite and positive"
                    break
                codes(begin * packed.shape[1], _bytes(nvfp4.pack(values, scales, glob)[0]))
            else:
                codes.finish(found)

    def _tiles(self, step: Step, basis: Basis, found: Derived) -> None:
        if basis.kind != "derived":
            found.tuned |= {output.name: basis.why for output in step.outputs}
            return
        codes, scales = (_Comparison(self.output, output) for output in step.outputs)
        width = step.outputs[1].nbytes // max(step.outputs[1].shape[0], 1)
        for begin, values in self._values(step, torch.bfloat16 if self._calibrates else torch.float32):
            quantized, grid = quantize_tiles(values)
            codes(begin * values.shape[1], _bytes(quantized))
            scales(begin // TILE * width, _bytes(grid))
        codes.finish(found)
        scales.finish(found)

    def _values(self, step: Step, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (first row, values) of the weight, dequantized."""
        stored = self.formats.of(step.source)
        for begin, end in self._stripes(step):
            raw, scales = self._rows(step, begin, end)
            values = dequantize(stored, raw, scales, dtype)
            if step.module in self._smoothed:
                values = self._smoothed.scaled(step.module, values, begin)
            yield begin, values

    def _as_stored(self, step: Step) -> Iterator[tuple[int, Stripe]]:
        """Yields (first row, stripe) of the weight as it is stored."""
        stored, dtype = self.formats.of(step.source), self.formats.checkpoint.header(step.source).dtype
        for begin, end in self._stripes(step):
            raw, scales = self._rows(step, begin, end)
            stripe = Stripe.of(stored, dtype, raw.view(torch.uint8).reshape(end - begin, -1).numpy(), scales)
            kernels.check_scales(stripe)
            yield begin, stripe

    def _stripes(self, step: Step) -> Iterator[tuple[int, int]]:
        """Yields rows [begin, end) in whole tiles."""
        stored, header = self.formats.of(step.source), self.formats.checkpoint.header(step.source)
        rows = stored.shape[0]
        if header.layout is not None:  # an expert in a transposed stack: its bytes are read together
            yield 0, rows
            return
        tile = math.lcm(stored.tile[0] if stored.tile else 1, TILE)
        stride = max(_STRIPE * rows // max(header.nbytes, 1) // tile, 1) * tile
        yield from ((begin, min(begin + stride, rows)) for begin in range(0, rows, stride))

    def _rows(self, step: Step, begin: int, end: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rows [begin, end) of a stored weight and of its scales."""
        stored = self.formats.of(step.source)
        parts = {role: stored.companion_rows(role, begin, end) for role in stored.scales}
        raw = self._part(step.source, (begin, end))
        return raw, {role: self._part(stored.scales[role], rows) for role, rows in parts.items()}

    def _part(self, name: str, rows: tuple[int, int] | None) -> torch.Tensor:
        """Rows of a source tensor as stored; the whole tensor if `rows` is None."""
        if rows is None:
            return self.formats.checkpoint.read(name)
        header = self.formats.checkpoint.header(name)
        width = header.nbytes // header.shape[0]
        raw = self.formats.checkpoint.read_span(name, rows[0] * width, rows[1] * width)
        return torch.from_numpy(raw).view(TORCH[header.dtype]).reshape(-1, *header.shape[1:])

    def _spelled(self, scale: np.float32) -> np.float32:
        return scale if self._dialect is COMPRESSED_TENSORS else inverse(scale)

    def _same_scalar(self, output: OutputTensor, value: np.float32, found: Derived) -> None:
        compare = _Comparison(self.output, output)
        compare(0, np.array([value], np.float32).view(np.uint8))
        compare.finish(found)


class _Comparison:
    """Compares one stored tensor with derived bytes, which come in pieces. `nibbles`: the elements are 4-bit codes, two in a
    byte, the first in the low half."""

    def __init__(self, output: Checkpoint, tensor: OutputTensor, nibbles: bool = False) -> None:
        self._output, self._tensor, self._nibbles = output, tensor, nibbles
        self._compared = self._count = 0
        self._first: tuple[int, str, str] | None = None

    def __call__(self, begin: int, derived: Bytes) -> None:
        """Compares the stored bytes from `begin` on with `derived`, flat."""
        stored = self._output.read_span(self._tensor.name, begin, begin + derived.size)
        self._compared += derived.size
        if stored.data == derived.data:
            return
        size = DTYPE_BYTES[self._tensor.dtype]
        if self._nibbles:
            stored, derived = (np.stack((side & 15, side >> 4), -1).reshape(-1) for side in (stored, derived))
        ours, theirs = stored.reshape(-1, size), derived.reshape(-1, size)
        at = np.flatnonzero((ours != theirs).any(1))
        if self._first is None:
            before = begin * 2 if self._nibbles else begin // size
            self._first = (before + int(at[0]), _hex(ours[at[0]], self._nibbles), _hex(theirs[at[0]], self._nibbles))
        self._count += len(at)

    def finish(self, found: Derived) -> None:
        """Adds the result. A tensor whose bytes were not all compared is a defect here."""
        name, shape = self._tensor.name, list(self._tensor.shape)
        assert self._compared == self._tensor.nbytes, f"{name}: {self._compared} of {self._tensor.nbytes} bytes"
        found.proven[name] = self._compared
        if self._first is not None:
            at, stored, derived = self._first
            if self._nibbles:
                shape[-1] *= 2
            index = np.unravel_index(at, shape) if shape else ()
            found.differences.append(Difference(name, self._count, tuple(map(int, index)), stored, derived))


def _bytes(tensor: torch.Tensor) -> Bytes:
    flat: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _hex(element: Sequence[int] | Bytes, nibble: bool) -> str:
    """An element's bytes as a hexadecimal number, little-endian as they are stored."""
    return f"0x{int(element[0]):x}" if nibble else f"0x{bytes(element)[::-1].hex()}"
