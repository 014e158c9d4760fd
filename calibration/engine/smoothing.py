"""Smooths a loaded block: finds one factor per channel of each site, folds it into weights, and proves that nothing changed.

Factors are powers of two. In BF16, as in the stored dtypes, multiplying by them is exact, so that a block computes the same
bits before and after, router included. This is checked on the first batch of every block: a reader that was forgotten, or
a norm that is not a plain product with its weight, shows there. What bounds or bends a value on its way (a clamp) is found by
scaling it up once per kind of block. A site that fails is left as it is if the recipe did not name it, else the run ends.

Statistics are taken before the scaling, from the first `SAMPLE` tokens; the observers of the quantized layers start after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calibration.checkpoint.nvfp4 import GROUP, RANGE
from calibration.model.source_model import SourceModel
from calibration.plan.plan import Plan, Smoothed
from calibration.plan.schemes import FP8_BLOCK
from calibration.runs.ranks import Ranks
from recipes.errors import RecipeError, WorkflowError, collapsed
from recipes.smoothing import Smoothing, SmoothQuantArguments

#: Tokens that statistics and searches see: enough that the largest of a channel is known to a power of two.
SAMPLE = 4096
#: Rows of inputs, and readers, by whose error a search judges a site: more change few choices and cost as much again.
_JUDGED_ROWS, _JUDGED_READERS = 1024, 12
#: Exponents of factors are within these bounds: a channel that is hardly ever used would get any.
_LARGEST = 6
#: The exponents by which a value is scaled up to find a clamp.
_PROBE = 10

#: Runs the block without observers. Returns its outputs for this rank's batches of the sample, or of its first batch alone.
RunBatches = Callable[[Literal["sample", "first"]], list[torch.Tensor]]


@dataclass(frozen=True)
class Factors:
    """What a module's weight (and bias) is multiplied by: float32 `[M]` for rows, `[K]` for columns, powers of two; None
    if it takes no such factors."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight `[M, K]`, a norm's weight or a bias `[M]`, multiplied; same dtype."""
        made = tensor
        if self.rows is not None:
            rows = self.rows.to(tensor.device)
            made = made * (rows.unsqueeze(1) if tensor.dim() == 2 else rows).to(tensor.dtype)
        if self.columns is not None and tensor.dim() == 2:
            made = made * self.columns.to(tensor.device).to(tensor.dtype)
        return made


@dataclass
class _Site:
    """A site of the loaded block. `channels` maps each column of a reader to the channel of `smooth` that it reads."""

    planned: Smoothed
    smooth: nn.Module
    readers: list[nn.Module]
    channels: torch.Tensor
    #: Readers that are quantized -> whether their inputs are too.
    quantized: dict[nn.Module, bool]
    #: The largest magnitude of each column of the readers' input, float32 `[K]`, and the sum of magnitudes, float64.
    largest: torch.Tensor
    magnitudes: torch.Tensor
    #: Rows of the readers' input, if a search is to judge by them.
    rows: list[torch.Tensor] | None = None

    def per_channel(self, columns: torch.Tensor) -> torch.Tensor:
        """The largest of the columns that read each channel: `[K]` -> `[M]`."""
        made = torch.zeros(len(_weight(self.smooth)), device=columns.device)
        return made.scatter_reduce(0, self.channels, columns, "amax")

    @property
    def is_norm(self) -> bool:
        return _weight(self.smooth).dim() == 1

    def observe(self, value: torch.Tensor) -> None:
        """Takes the input of the readers `[..., K]` into the statistics."""
        flat = value.detach().reshape(-1, value.shape[-1])
        if len(flat):
            torch.maximum(self.largest, flat.abs().amax(0).float(), out=self.largest)
        if self.rows is not None:
            self.magnitudes += flat.abs().sum(0, dtype=torch.float64)
            left = _JUDGED_ROWS - sum(map(len, self.rows))
            self.rows += [flat[:: max(1, len(flat) // left)][:left].clone()] if left and len(flat) else []

    def watch(self, see: Callable[[torch.Tensor], torch.Tensor | None]) -> list[RemovableHandle]:
        """Hands the input of the readers to `see`, which may return another one."""
        if self.is_norm:
            return [self.smooth.register_forward_hook(lambda module, args, output: see(output))]
        handles = []
        for reader in self.readers:
            handles.append(reader.register_forward_pre_hook(lambda module, args: see(args[0])))
            # A forward hook keeps stacked experts from computing the layer without calling it.
            handles.append(reader.register_forward_hook(lambda module, args, output: None))
        return handles

    def error(self, exponents: torch.Tensor) -> float:
        """The squared error of the quantized readers' outputs on the kept rows, with these exponents."""
        assert self.rows is not None
        factors = torch.exp2(exponents)[self.channels]
        inputs = torch.cat(self.rows).float()
        rounded = round_to_nvfp4(inputs / factors, float((self.largest / factors).amax()))
        judged = [(_weight(reader).float(), is_wide) for reader, is_wide in self.quantized.items()]
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for weight, rounds_inputs in judged[:: -(-len(judged) // _JUDGED_READERS)]:
            stored = round_to_nvfp4(weight * factors, float((weight * factors).abs().amax()))
            given = rounded if rounds_inputs else inputs / factors
            total += (given @ stored.T - inputs @ weight.T).square().sum(dtype=torch.float64)
        return float(total)

    def fold(self, exponents: torch.Tensor, sign: int = 1) -> None:
        """Divides the outputs of `smooth` by 2^exponents and multiplies the readers' columns; `sign` -1 undoes it."""
        factors = torch.exp2((exponents * sign).float())
        with torch.no_grad():
            for leaf in ("weight", "bias"):
                tensor = getattr(self.smooth, leaf, None)
                if tensor is not None:
                    tensor.copy_(Factors(rows=1 / factors).apply(tensor))
            for reader in self.readers:
                _weight(reader).copy_(Factors(columns=factors[self.channels]).apply(_weight(reader)))


class Smoother:
    """Smooths the blocks of one run, one after another."""

    def __init__(self, plan: Plan, arguments: Smoothing, source: SourceModel, ranks: Ranks) -> None:
        self._plan, self._arguments, self._source, self._ranks = plan, arguments, source, ranks
        self._names = source.model_modules()
        self._sites: dict[int | None, list[Smoothed]] = defaultdict(list)
        for site in plan.smoothed:
            self._sites[plan.family.place(site.smooth).block].append(site)
        #: Every module that may be changed, by its source name.
        self.modules = {module for site in plan.smoothed for module in (site.smooth, *site.readers)}
        #: Whether readers' inputs follow their v or up projection up to any size, by the classes of the modules.
        self._follow: dict[tuple[str, ...], bool] = {}

    def smooth(self, number: int | None, run: RunBatches, tell: Callable[..., None]) -> dict[str, Factors]:
        """Smooths block `number`, whose weights are loaded. Returns the factors by source module; those of a site that
        cannot be proven are left out. Raises RecipeError if the recipe names such a site."""
        sites = [self._site(planned) for planned in self._sites[number]]
        if not sites:
            return {}
        before = self._observe(sites, run)
        bent = self._bent(sites, run)
        chosen = [(site, self._exponents(site)) for site in sites if site not in bent]
        for site, exponents in chosen:
            site.fold(exponents)
        changed: list[_Site] = []
        if self._changes(before, run):
            for site, exponents in chosen:
                site.fold(exponents, -1)
            changed = [site for site, exponents in chosen if self._changes(before, run, site, exponents)]
            chosen = [(site, exponents) for site, exponents in chosen if site not in changed]
            for site, exponents in chosen:
                site.fold(exponents)
            if self._changes(before, run):
                raise WorkflowError(f"block {number}: smoothing changes what the block computes: a defect here")
        self._judge(number, {"is bounded or bent before it is read": bent, "is read by more than these": changed})
        tell("smooth", block=number, sites=len(chosen), left_out=[site.planned.smooth for site in (*bent, *changed)])
        return _factors(chosen)

    def _site(self, planned: Smoothed) -> _Site:
        model = self._source.model
        smooth, *readers = (model.get_submodule(self._names[name]) for name in (planned.smooth, *planned.readers))
        width, device = _weight(readers[0]).shape[1], _weight(readers[0]).device
        columns = torch.tensor(planned.channels(width, len(_weight(smooth))), device=device)
        groups = {name: self._plan.quantized[name].group for name in planned.readers if name in self._plan.quantized}
        quantized = {
            reader: self._plan.groups[str(groups[name])].input_scale
            for name, reader in zip(planned.readers, readers, strict=True)
            if name in groups and self._plan.groups[str(groups[name])] is not FP8_BLOCK
        }
        largest, magnitudes = (
            torch.zeros(width, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64)
        )
        rows: list[torch.Tensor] | None = None if isinstance(self._arguments, SmoothQuantArguments) else []
        return _Site(planned, smooth, readers, columns, quantized, largest, magnitudes, rows)

    def _observe(self, sites: Sequence[_Site], run: RunBatches) -> torch.Tensor:
        """Takes the statistics of the sample, over all ranks. Returns the block's output for the rank's first batch."""
        with ExitStack() as stack:
            for site in sites:
                for handle in site.watch(site.observe):
                    stack.callback(handle.remove)
            made = run("sample")
        largest = -torch.cat([site.largest for site in sites])
        self._ranks.all_reduce_min(largest)
        for site, found in zip(sites, torch.split(-largest, [len(site.largest) for site in sites]), strict=True):
            site.largest = found
        # Without hooks an accelerator computes all experts at once, and rounds otherwise.
        return made[0] if made and made[0].device.type == "cpu" else run("first")[0]

    def _exponents(self, site: _Site) -> torch.Tensor:
        """SmoothQuant's formula (2211.10438), |x|^strength / |w|^(1 - strength) per channel, as a power of two; for AWQ
        (2306.00978) the strength, and whether weights count, with the smallest error of the readers' outputs."""
        weights = torch.stack([_weight(reader).abs().amax(0).float() for reader in site.readers]).amax(0)
        weights = site.per_channel(weights)
        if isinstance(self._arguments, SmoothQuantArguments):
            return exponents(site.per_channel(site.largest), weights, self._arguments.smoothing_strength)
        means, duo, steps = (
            site.per_channel(site.magnitudes.float()),
            self._arguments.duo_scaling,
            self._arguments.n_grid - 1,
        )
        candidates: dict[bytes, torch.Tensor] = {}
        for strength in (step / steps for step in range(steps + 1)):
            for by in [weights] * bool(duo) + [torch.ones_like(weights)] * (duo is not True):
                found = exponents(means, by, strength)
                candidates.setdefault(bytes(found.to(torch.int8).cpu().numpy()), found)
        nothing = torch.zeros_like(weights)
        rest = [found for found in candidates.values() if bool(found.any())]
        return min([nothing, *rest], key=site.error) if rest and site.rows else nothing

    def _bent(self, sites: Sequence[_Site], run: RunBatches) -> list[_Site]:
        """The sites whose readers' input does not grow with the smooth layer's output: a clamp is between them."""
        kinds = {id(site): self._kind(site) for site in sites if not site.is_norm}
        asked = [site for site in sites if id(site) in kinds and kinds[id(site)] not in self._follow]
        if asked:
            given: dict[int, torch.Tensor] = {}
            wrong: set[int] = set()
            with ExitStack() as stack:
                for site in asked:
                    for handle in site.watch(partial(_keep, given, site)):
                        stack.callback(handle.remove)
                run("first")
            with ExitStack() as stack:
                for site in asked:
                    stack.callback(
                        site.smooth.register_forward_hook(lambda m, a, output: output * _scale(output)).remove
                    )
                    for handle in site.watch(partial(_compare, given, wrong, site)):
                        stack.callback(handle.remove)
                run("first")
            found = self._ranks.all_gather("clamps", [id(site) in wrong for site in asked])
            for number, site in enumerate(asked):
                kind = kinds[id(site)]
                self._follow[kind] = self._follow.get(kind, True) and not any(flags[number] for flags in found)
        return [site for site in sites if not site.is_norm and not self._follow[kinds[id(site)]]]

    def _kind(self, site: _Site) -> tuple[str, ...]:
        """The classes of the modules around a site."""
        name = self._source.module_name(site.smooth)
        names = [name, *(name.rsplit(".", depth)[0] for depth in (1, 2)), self._source.module_name(site.readers[0])]
        return tuple(type(self._source.model.get_submodule(name)).__qualname__ for name in names)

    def _changes(
        self, before: torch.Tensor, run: RunBatches, site: _Site | None = None, found: torch.Tensor | None = None
    ) -> bool:
        """Whether the first batch's output is no longer `before`, on any rank; with one site folded for the moment."""
        if site is not None and found is not None:
            site.fold(found)
        different = not torch.equal(before, run("first")[0])
        if site is not None and found is not None:
            site.fold(found, -1)
        return self._ranks.any("smoothing", different)

    def _judge(self, number: int | None, left: Mapping[str, Sequence[_Site]]) -> None:
        """Raises RecipeError if the recipe names a site that must be left out."""
        problems = [
            f"modifiers: block {number}: {site.planned.smooth} cannot be smoothed: it {why}; leave it out of mappings"
            for why, sites in left.items()
            for site in sites
        ]
        if problems and self._arguments.mappings is not None:
            raise RecipeError(collapsed(problems))


def exponents(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """The powers of two by which channels are divided, around a median of 0: float32 `[M]`. `inputs` and `weights` are the
    largest magnitudes of each channel `[M]`; a channel that is never used gets 0."""
    used = (inputs > 0) & (weights > 0)
    if not bool(used.any()):
        return torch.zeros_like(inputs)
    logarithms = torch.where(used, inputs, 1).log2() * strength - torch.where(used, weights, 1).log2() * (1 - strength)
    centered = logarithms - logarithms[used].median()
    return torch.where(used, centered, 0).round().clamp(-_LARGEST, _LARGEST)


def round_to_nvfp4(values: torch.Tensor, largest: float) -> torch.Tensor:
    """float32 `[M, K]`, rounded to nearest under the global scale that admits `largest` in magnitude. It judges a search and is
    not written: where a group scale lies between two of E4M3, it may choose the other one than `nvfp4.quantize_dequantize`."""
    if not largest > 0:
        return values
    global_scale = RANGE / largest
    groups = values.reshape(*values.shape[:-1], -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) * (global_scale / 6)).clamp(max=448).to(torch.float8_e4m3fn).float()
    scales = torch.where(scales == 0, 1.0, scales / global_scale)
    codes = (groups / scales).clamp(-6, 6)
    step = torch.where(codes.abs() < 2, 0.5, torch.where(codes.abs() < 4, 1.0, 2.0))
    return codes.div_(step).round_().mul_(step).mul_(scales).reshape(values.shape)


def _factors(chosen: Sequence[tuple[_Site, torch.Tensor]]) -> dict[str, Factors]:
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    for site, found in chosen:
        rows[site.planned.smooth] = torch.exp2(-found)
        for reader in site.planned.readers:
            columns[reader] = torch.exp2(found)[site.channels]
    return {name: Factors(rows.get(name), columns.get(name)) for name in {**rows, **columns}}


def _weight(module: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight


def _scale(output: torch.Tensor) -> torch.Tensor:
    """Another power of two for each of eight neighboring channels."""
    return torch.exp2(_PROBE + torch.arange(output.shape[-1], device=output.device) % 8).to(output.dtype)


def _keep(given: dict[int, torch.Tensor], site: _Site, value: torch.Tensor) -> None:
    given[id(site)] = value.clone()


def _compare(given: Mapping[int, torch.Tensor], wrong: set[int], site: _Site, value: torch.Tensor) -> torch.Tensor:
    """Compares the readers' input with what it should have become, and puts back what it was."""
    before = given[id(site)]
    scale = _scale(torch.empty(len(_weight(site.smooth)), dtype=value.dtype, device=value.device))[site.channels]
    if before.shape != value.shape or not torch.equal(before * scale, value):
        wrong.add(id(site))
    return before
