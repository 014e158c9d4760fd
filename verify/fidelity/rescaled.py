"""Handles weights that AWQ or SmoothQuant rescaled before quantization: the source's, except for factors per row and
column.

The factors cancel inside a block (a norm or the previous projection has the inverse), so that the model is unchanged.
They are only accepted without a plan, in blocks whose changed norms are explained by the factors of a quantized weight; what is
not quantized and reads a norm must have the inverse factors. The block cosine proves that they cancel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from calibration.checkpoint.formats import Formats
from calibration.families.family import Family
from verify.fidelity.weights import Stored

#: A norm is explained if the median of its columns agrees with the weight's factors to this relative error: both are
#: rounded, and the factors are averages over all rows.
_TOLERANCE = 0.05
_ROUNDS = 3
#: Norm and weight are both rounded to BF16 after scaling, each by up to 2^-8 of its value.
_ROUNDED = 2.0**-6


class Rescaled(Stored):
    """The source's weight, multiplied by the row and column factors that bring it closest to the output's (alternating
    least squares). Reads both weights once, completely."""

    def __init__(self, formats: Formats, name: str, output: Stored) -> None:
        super().__init__(formats, name)
        x, y = super().rows(0, self.shape[0]), output.rows(0, self.shape[0])
        self.row_factors, self.column_factors = torch.ones(x.shape[0], 1), torch.ones(x.shape[1])
        for _ in range(_ROUNDS):
            scaled = x * self.row_factors
            self.column_factors = (y * scaled).sum(0) / scaled.square().sum(0).clamp_min(1e-37)
            scaled = x * self.column_factors
            self.row_factors = ((y * scaled).sum(1) / scaled.square().sum(1).clamp_min(1e-37)).unsqueeze(1)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """The rows as in `Stored.rows`, scaled."""
        return super().rows(begin, end).mul_(self.row_factors[begin:end]).mul_(self.column_factors)


def compensated(output: Formats, source: Formats, family: Family, differing: Iterable[str]) -> set[str]:
    """The unquantized weights `[M, K]` among the `differing` tensors whose columns have the inverse of the factors of a norm
    among them, of the same block: a router that reads what the norm makes. Exactly, if the factors are powers of two."""
    norms: dict[int | None, list[torch.Tensor]] = defaultdict(list)
    weights = []
    for name in differing:
        place, stored = family.place(name), output.of(name)
        if stored.kind != "plain" or source.of(name).kind != "plain":
            continue
        if place.part == "norm" and len(stored.shape) == 1:
            before, after = (f.checkpoint.read(name).to(torch.float32) for f in (source, output))
            norms[place.block].append(torch.where((before == 0) & (after == 0), 1.0, before / after))
        elif len(stored.shape) == 2:
            weights.append((name, place.block))
    return {
        name
        for name, block in weights
        if any(_has_columns(source, output, name, factors) for factors in norms[block] if block is not None)
    }


def _has_columns(source: Formats, output: Formats, name: str, factors: torch.Tensor) -> bool:
    """Whether a weight is the source's times `factors` per column."""
    before, after = (f.checkpoint.read(name).to(torch.float32) for f in (source, output))
    if before.shape[1:] != factors.shape or not bool(factors.isfinite().all()):
        return False
    exact = bool((factors.abs().frexp().mantissa == 0.5).all())
    wanted = before * factors
    return bool(((after - wanted).abs() <= (0.0 if exact else _ROUNDED) * wanted.abs()).all())


def rescaled_blocks(
    output: Formats, source: Formats, family: Family, quantized: Iterable[tuple[str, str, str]], differing: list[str]
) -> set[int]:
    """The blocks in which every norm among the `differing` tensors is explained; `quantized` as in `verdicts.Pairs`."""
    norms: dict[int, list[str]] = defaultdict(list)
    for name in differing:
        place = family.place(name)
        if place.part == "norm" and place.block is not None:
            norms[place.block].append(name)
    factors: dict[int, list[torch.Tensor]] = defaultdict(list)
    for module, original, name in quantized:
        block = family.place(module).block
        if block in norms:
            factors[block].append(Rescaled(source, original, Stored(output, name)).column_factors)

    def explained(name: str, columns: list[torch.Tensor]) -> bool:
        before, after = (f.checkpoint.read(name).to(torch.float32) for f in (source, output))
        # Up to a constant factor, which row and column factors can share in any way.
        ratios = [found * after / before for found in columns if found.shape == before.shape == after.shape]
        return any(float((r / r.median() - 1).abs().median()) < _TOLERANCE for r in ratios)

    return {block for block, names in norms.items() if all(explained(name, factors[block]) for name in names)}
