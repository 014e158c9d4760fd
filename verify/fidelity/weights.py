"""Measures how far one stored weight of the output is from the source's, in stripes of rows. Memory: a few stripes and,
per group of 16 values, three float32 sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from calibration.checkpoint import nvfp4
from calibration.checkpoint.dequantize import dequantize
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.nvfp4 import GROUP, RANGE

#: Values of a stripe, so that its float32 working set fits a core's cache.
_STRIPE = 1 << 17
#: A group's error is relative to its own norm, or to a quarter of the tensor's mean group norm if that is larger: the
#: error that a feedback such as GPTQ's adds to an almost empty group is only large for that group.
_FLOOR = 0.25
#: A code counts as not the nearest only if it loses more than intermediate BF16 arithmetic explains: a weight and a
#: quotient, each rounded once, by 2^-9 of the value each, and twice their sum between two codes.
_TIE = 2.0**-7
#: Below this value E4M3 is coarse, and a group scale says little about its group.
_COARSE = 2.0**-4
#: By packed byte: its two values, and whether each nibble is +-6.
_PAIRS = torch.tensor([[nvfp4.E2M1[b & 15], nvfp4.E2M1[b >> 4]] for b in range(256)], dtype=torch.float32)
_PAIR_WORDS = _PAIRS.view(torch.int64).flatten()


@dataclass
class Measured:
    """The figures of one weight. Errors are relative: `relative_error` is `|output - source| / |source|` (Frobenius
    norms), `sqnr_db` is -20 log10 of it. `saturated` is the share of codes at the format's largest magnitude;
    `zero_groups` the share of groups of 16 (of a row, for FP8) that are wholly zero, `lost_groups` of those that are
    not zero in the source. `gain_low` and `gain_high` are the extremes over groups of `<output, source> / |source|^2`
    (1 for unbiased rounding, 2 for a doubled group scale), `group_error` the worst group's relative error.
    `off_nearest` is the share of codes that are not the nearest to the source's value (None for FP8). `scale_ratio` is
    weight_global_scale * amax / 2688 with the source's amax (NVFP4 only); `scale_low` and `scale_high` are the extremes
    over ordinary groups of group scale * 6 / amax of the source's group, against its median; `scale_codes` counts the
    256 E4M3 codes among the group scales."""

    relative_error: float
    cosine: float
    saturated: float
    zero_groups: float
    lost_groups: float
    gain_low: float
    gain_high: float
    group_error: float
    off_nearest: float | None
    source_norm: float
    amax: float
    scale_low: float = 1.0
    scale_high: float = 1.0
    global_scale: float | None = None
    scale_codes: torch.Tensor | None = field(default=None, repr=False)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB; infinite without noise."""
        return -20 * math.log10(self.relative_error) if self.relative_error > 0 else math.inf


class Stored:
    """A stored weight `[M, K]`; `rows` dequantizes only the requested rows."""

    def __init__(self, formats: Formats, name: str) -> None:
        self.stored = formats.of(name)
        self.raw = formats.checkpoint.read(name)
        self.scales = {role: formats.checkpoint.read(scale) for role, scale in self.stored.scales.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.stored.shape

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows as float32 `[end - begin, K]`; `begin` must be a multiple of the tile height of FP8 tiles, and of 8 for INT4."""
        raw = self.raw[begin:end]
        if self.stored.kind == "nvfp4":
            return self._nvfp4(raw, begin, end)
        scales = dict(self.scales)
        for role in scales:
            part = self.stored.companion_rows(role, begin, end)
            scales[role] = scales[role] if part is None else scales[role][slice(*part)]
        return dequantize(self.stored, raw, scales, torch.float32)

    def _nvfp4(self, raw: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """nvfp4.dequantize with a table of bytes: the same products in a third of the time."""
        effective = self.scales["group_scale"][begin:end].to(torch.float32) / self.scales["global_scale"]
        values = _PAIR_WORDS[raw.int()].view(torch.float32).view(*effective.shape, GROUP)
        return values.mul_(effective.unsqueeze(-1)).view(raw.shape[0], -1)


def measure(source: Stored, output: Stored) -> Measured:
    """Compares two weights of equal logical shape. NaN in either weight gives NaN figures, which fail every
    threshold."""
    rows, columns = output.shape
    width = GROUP if columns % GROUP == 0 else columns
    groups = rows * columns // width
    sums, maxima = torch.empty(3, rows, columns // width), torch.empty(rows, columns // width)
    saturated = off = 0
    step = _step(source, output, columns)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        x, y = source.rows(begin, end), output.rows(begin, end)
        saturated += _saturated(output, begin, end)
        maxima[begin:end] = x.view(end - begin, -1, width).abs().amax(-1)
        if output.stored.kind == "nvfp4":
            off += _off_nearest(x, y, output, begin, end)
        for row, values in zip(sums, (x, y, x - y), strict=True):
            row[begin:end] = values.square_().view(end - begin, -1, width).sum(-1)
    xx, yy, ee = sums
    source_square, output_square, error_square = (float(s.sum(dtype=torch.float64)) for s in sums)
    floor = _FLOOR**2 * source_square / groups
    gain = ((xx + yy - ee) / 2 + floor) / (xx + floor).clamp_min(1e-37)
    if source_square == 0:  # an expert of zeros: only zeros are right
        gain = torch.where(yy == 0, 1.0, torch.inf)
    zero = yy == 0
    is_nvfp4 = output.stored.kind == "nvfp4"
    scale_low, scale_high = _scale_extremes(output, maxima) if is_nvfp4 else (1.0, 1.0)
    return Measured(
        relative_error=math.sqrt(error_square / max(source_square, 1e-300)),
        cosine=1.0
        if source_square == output_square == 0
        else (source_square + output_square - error_square) / max(2 * math.sqrt(source_square * output_square), 1e-300),
        saturated=saturated / (rows * columns),
        zero_groups=int(zero.sum()) / groups,
        lost_groups=int((zero & (xx > 0)).sum()) / groups,
        gain_low=float(gain.min()),
        gain_high=float(gain.max()),
        group_error=math.sqrt(float((ee / (xx + floor).clamp_min(1e-37)).max())),
        off_nearest=off / (rows * columns) if is_nvfp4 else None,
        source_norm=math.sqrt(source_square),
        amax=float(maxima.amax()),
        scale_low=scale_low,
        scale_high=scale_high,
        global_scale=float(output.scales["global_scale"]) if is_nvfp4 else None,
        scale_codes=torch.bincount(output.scales["group_scale"].view(torch.uint8).flatten(), minlength=256)
        if is_nvfp4
        else None,
    )


def scale_ratio(global_scale: float, amax: float) -> float:
    """The ratio of a global scale to the one that the source's largest magnitude implies, 2688 / amax; 1 if they
    agree."""
    return global_scale * amax / RANGE


def _step(source: Stored, output: Stored, columns: int) -> int:
    heights = [stored.stored.tile[0] for stored in (source, output) if stored.stored.tile is not None]
    unit = math.lcm(*heights, *(8 for stored in (source, output) if stored.stored.kind == "int4"))
    return max(_STRIPE // columns // unit, 1) * unit


def _scale_extremes(output: Stored, maxima: torch.Tensor) -> tuple[float, float]:
    codes = output.scales["group_scale"].to(torch.float32)
    ratios = codes / maxima
    ratios = ratios[(codes >= _COARSE) & (maxima > 0)]
    if not ratios.numel():
        return 1.0, 1.0
    ratios /= ratios.median()
    return float(ratios.min()), float(ratios.max())


def _saturated(output: Stored, begin: int, end: int) -> int:
    raw = output.raw[begin:end]
    if output.stored.kind == "nvfp4":
        return int((raw & 0x07).eq_(0x07).sum()) + int((raw & 0x70).eq_(0x70).sum())
    if output.stored.kind == "fp8_tiles":
        return int((raw.view(torch.uint8) & 0x7F).eq_(0x7E).sum())
    return 0


def _off_nearest(x: torch.Tensor, y: torch.Tensor, output: Stored, begin: int, end: int) -> int:
    """The number of codes that are not the nearest to `x` under the stored scales."""
    scale = output.scales["group_scale"][begin:end]
    nearest, _ = nvfp4.pack(x, scale, output.scales["global_scale"])
    differs = nearest != output.raw[begin:end]
    count = int(differs.sum())
    if count == 0:
        return 0
    effective = scale.to(torch.float32) / output.scales["global_scale"]
    per_byte = effective.repeat_interleave(GROUP // 2, 1)[differs].unsqueeze(-1)
    best = _PAIRS[nearest[differs].int()] * per_byte
    wanted, stored = (t.view(*differs.shape, 2)[differs] for t in (x, y))
    lost = (stored - wanted).abs() - (best - wanted).abs()
    return int((lost > _TIE * wanted.abs()).sum())
