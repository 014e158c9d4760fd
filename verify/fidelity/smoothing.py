"""The factors of a smoothed checkpoint, and whether every one that a layer takes out is taken in by all that read it.

Factors are powers of two, so that the tensors that are not quantized tell them exactly, and quantized ones after rounding.
Those of a norm are its quotient with the source's; those of v and up are the lengths of their rows against the source's. What
reads them must have the inverse: kept tensors exactly, quantized ones column by column.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import nn

from calibration.checkpoint.formats import Formats, logical_name, module_of
from calibration.checkpoint.nvfp4 import GROUP
from calibration.plan.plan import Smoothed
from verify.checks import Check
from verify.fidelity.weights import Stored

#: A row or column of a quantized weight is this close to its factor, as a part of it: rounding moves it by a few percent,
#: a wrong factor doubles it.
_CLOSE = 0.3
#: Columns below this part of the longest of their group may be rounded to zero, and say nothing.
_LONG = 0.25


class Scaled(Stored):
    """The source's weight, multiplied by given factors per row `[M]` and column `[K]`."""

    def __init__(self, formats: Formats, name: str, rows: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__(formats, name)
        self.row_factors, self.column_factors = rows.unsqueeze(1), columns

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """The rows as in `Stored.rows`, scaled."""
        return super().rows(begin, end).mul_(self.row_factors[begin:end]).mul_(self.column_factors)


class SmoothedWeights:
    """The factors of smoothed `sites`, those of a plan or all that the structure allows, found in an output."""

    def __init__(self, sites: Sequence[Smoothed], output: Formats, source: Formats) -> None:
        self._output, self._source = output, source
        self._smooth = {site.smooth: site for site in sites}
        self._read = {reader: site for site in sites for reader in site.readers}
        self._found: dict[str, torch.Tensor] = {}
        self._zero: set[str] = set()
        self._sources = _by_module(source)
        self._outputs = _by_module(output)
        #: What is wrong, by site.
        self.problems: dict[str, str] = {}
        self._lock = threading.Lock()

    def __contains__(self, module: str) -> bool:
        return module in self._smooth or module in self._read

    def changes_norms(self) -> bool:
        """Whether a norm's channels have other factors than one. Reads norms alone."""
        norms = (name for name in self._smooth if len(self._source.of(self._sources[name]).shape) == 1)
        return any(bool((self._rows(name) != 1).any()) for name in norms)

    def takes_out(self, module: str) -> bool:
        """Whether a module is one whose output channels lose factors."""
        return module in self._smooth

    def told(self, module: str) -> bool:
        """Whether the output tells all factors of a module: a channel that is zero in the source has none."""
        smooth = [site.smooth for site in (self._smooth.get(module), self._read.get(module)) if site is not None]
        for name in smooth:
            self._rows(name)
        return self._zero.isdisjoint(smooth)

    def scaled(self, module: str, values: torch.Tensor, begin: int = 0) -> torch.Tensor:
        """The source's `values`, rows `begin` on, with the factors that the output's have to have."""
        if module in self._smooth:
            rows = self._rows(module)[begin : begin + values.shape[0]].to(values.dtype)
            values = values * (rows if values.dim() == 1 else rows.unsqueeze(1))
        return values if values.dim() == 1 else values * self._columns(module, values.shape[1]).to(values.dtype)

    def expected(self, module: str) -> Scaled:
        """The source's weight with the factors that the output's has to have."""
        rows, columns = self._factors(module)
        return Scaled(self._source, self._sources[module], rows, columns)

    def _factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self._source.of(self._sources[module]).shape
        rows = self._rows(module) if module in self._smooth else torch.ones(shape[0])
        return rows, self._columns(module, shape[1])

    def _columns(self, module: str, count: int) -> torch.Tensor:
        site = self._read.get(module)
        return (
            torch.ones(count)
            if site is None
            else 1 / self._rows(site.smooth)[torch.tensor(site.channels(count, self._width(site)))]
        )

    def _width(self, site: Smoothed) -> int:
        return self._source.of(self._sources[site.smooth]).shape[0]

    def _rows(self, module: str) -> torch.Tensor:
        """Factors of a smooth layer's output channels `[M]`, from the output's tensor."""
        if module not in self._found:
            source, stored = Stored(self._source, self._sources[module]), self._outputs.get(module)
            known = stored is not None and self._output.of(stored).shape == source.shape
            if stored is None or not known or (len(source.shape) == 1 and self._output.of(stored).kind != "plain"):
                self._add(module, "is not in the output as the source has it, so that its factors are not known")
                self._found[module] = torch.ones(source.shape[0])
                return self._found[module]
            output = Stored(self._output, stored)
            if len(source.shape) == 1:
                before, after = (stored.raw.to(torch.float32) for stored in (source, output))
                zero = before == 0
                quotient = torch.where(zero, 1.0, after / before)
            else:
                before, after = (stored.rows(0, source.shape[0]) for stored in (source, output))
                before *= self._columns(module, source.shape[1])
                squares = before.square().sum(1)
                zero = squares == 0
                quotient = torch.where(zero, 1.0, (after * before).sum(1) / squares)
            if bool(zero.any()):
                self._zero.add(module)
            found = quotient.clamp_min(2.0**-30).log2().round().exp2()
            off = (quotient / found - 1).abs()
            limit = _CLOSE if len(source.shape) == 2 and output.stored.kind != "plain" else 0.0
            if not bool((off <= limit).all()):
                worst = int(off.nan_to_num(torch.inf).argmax())
                self._add(
                    module, f"channel {worst} is {float(quotient[worst]):.4g} times the source's, no power of two"
                )
            self._found[module] = torch.where(found.isfinite(), found, 1.0)
        return self._found[module]

    def fold(self, module: nn.Module, name: str) -> None:
        """Scales the weights of a module that holds the source's, and that the source calls `name`: it computes what it did, on
        inputs that are scaled as the output's are."""
        with torch.no_grad():
            for leaf, tensor in module.named_parameters(recurse=False) if name in self else ():
                if name in self._smooth:
                    rows = self._rows(name).to(tensor)
                    tensor.mul_(rows if tensor.dim() == 1 else rows.unsqueeze(1))
                if name in self._read and leaf == "weight":
                    tensor.mul_(self._columns(name, tensor.shape[1]).to(tensor))

    def compare_columns(self, module: str, output: Stored) -> None:
        """Adds a problem if a quantized reader's columns have not the factors that its site's smooth layer has lost."""
        site = self._read.get(module)
        if site is None:
            return
        expected = self.expected(module)
        x, y = expected.rows(0, expected.shape[0]), output.rows(0, expected.shape[0])
        squares = x.square().sum(0)
        quotient = (x * y).sum(0) / squares.clamp_min(1e-37)
        lengths = squares.view(-1, GROUP if len(squares) % GROUP == 0 else len(squares))
        long = (lengths >= _LONG**2 * lengths.amax(1, keepdim=True)).flatten() & (squares > 0)
        off = torch.where(long, (quotient - 1).abs(), 0)
        if not bool((off <= _CLOSE).all()):
            column = int(off.nan_to_num(torch.inf).argmax())
            self._add(
                site.smooth,
                f"{module}: column {column} is {float(quotient[column]):.3g} times what its input's factor asks",
            )

    def same(self, original: str, name: str) -> bool:
        """Whether a tensor that the plan rescales, and did not quantize, has its factors exactly."""
        module, before = module_of(original), self._source.of(original)
        after = self._output.checkpoint.read(name)
        rows = self._rows(module) if module in self._smooth else None
        if not before.shape or len(before.shape) == 1:
            value = (
                self._source.read(original, after.dtype)
                if before.kind != "plain"
                else self._source.checkpoint.read(original)
            )
            return torch.equal(value if rows is None else value * rows.to(value.dtype), after)
        rows, columns = self._factors(module)
        value = self._source.read(original, after.dtype)
        return torch.equal(value * rows.unsqueeze(1).to(value.dtype) * columns.to(value.dtype), after)

    def check(self) -> Check:
        """All factors that are taken out are taken in by every reader."""
        problems = list(self.problems.values())
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        return Check(
            "fidelity.smoothing", "FAIL" if problems else "PASS",
            "what smoothing takes out of a norm, v_proj or up_proj, each layer that reads it takes in",
            "; ".join(problems[:3]) + more if problems else f"{len(self._smooth)} layers and their readers",
            "powers of two; readers have the inverse", "output and source compared, channel by channel",
        )  # fmt: skip

    def _add(self, site: str, problem: str) -> None:
        with self._lock:
            self.problems.setdefault(site, f"{site}: {problem}" if not problem.startswith(site) else problem)


def _by_module(formats: Formats) -> dict[str, str]:
    return {
        module_of(name): name
        for name in formats.checkpoint.tensors
        if name not in formats.companions and logical_name(name).endswith(".weight")
    }
