"""`quantized_inputs: true`: llm-compressor's GPTQModifier, made fit for mixtures of experts and for quantized activations.

Four things differ. Layers that share an input (q, k, v; gate and up of all experts of a block) share one Hessian and one
factorization. The Hessian is that of the inputs as they are served: quantized to NVFP4 and back. A Hessian that has no Cholesky
factor is damped ten times as much, and again. An input channel that was always zero keeps its weights, rounded to nearest; the
original sets them to zero. A block's Hessians take 4 K^2 bytes for every distinct input, and each is freed as soon as its
weights are quantized.

Of several ranks, one keeps each Hessian. After every batch the other ranks send it what the layers were given, and it adds the
products in the order of the batches in the run: the same additions as a single rank's, so the number of ranks changes no bit.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers.gptq import gptq_quantize
from llmcompressor.modifiers.gptq.base import GPTQModifier
from llmcompressor.modifiers.gptq.helpers import update_batch_qparams
from loguru import logger
from pydantic import PrivateAttr
from torch import nn

from calibration.checkpoint.nvfp4 import observed_global_scale, quantize_dequantize
from calibration.runs.ranks import Ranks
from recipes.errors import WorkflowError

#: Factors on the damping, in order; then the weight is rounded to nearest.
RETRIES = (1.0, 10.0, 100.0, 1000.0)
#: Bytes of float32 weights that are quantized together; more rows make products larger, not better.
_CHUNK = 2**30
#: What quantizing a layer writes.
_WRITTEN = ("weight", "weight_scale", "weight_zero_point", "weight_global_scale")


@dataclass
class _Factor:
    """The upper Cholesky factor of an inverse Hessian `[1, K, K]`, its columns ordered as the weights'; `failed` if there was
    none and it is the identity."""

    upper: torch.Tensor
    failed: bool


class StreamingGPTQModifier(GPTQModifier):  # type: ignore[misc]
    """GPTQ with one Hessian for every input of a block."""

    #: Layer -> the layer that collects the Hessian of the input they share.
    _leaders: dict[nn.Module, nn.Module] = PrivateAttr(default_factory=dict)
    #: Inputs that are still alive: id -> (weak reference, version, leader).
    _inputs: dict[int, tuple[weakref.ref[torch.Tensor], int, nn.Module]] = PrivateAttr(default_factory=dict)
    _ranks: Ranks = PrivateAttr(default_factory=Ranks)
    #: Layer -> the rank that keeps its Hessian.
    _owners: Mapping[nn.Module, int] = PrivateAttr(default_factory=dict)
    #: With several ranks: leader -> what it was given, as served, since the last `add_inputs`.
    _given: dict[nn.Module, list[torch.Tensor]] = PrivateAttr(default_factory=dict)

    def divide(self, ranks: Ranks, owners: Mapping[nn.Module, int]) -> None:
        """Divides the Hessians among `ranks`; `owners` says which rank has which layer."""
        self._ranks, self._owners = ranks, owners

    def calibrate_module(self, module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        """The hook: adds the inputs `args[0]` (`[..., K]`) to the Hessian that the module uses, unless another layer did."""
        given = args[0]
        leader = self._leader_of(given) or module
        if self._leaders.setdefault(module, leader) is not leader:
            raise WorkflowError(
                f"{self._module_names.get(module)}: shares its input in some batches only; a defect here"
            )
        if leader is module and given.numel():
            self._inputs[id(given)] = weakref.ref(given), given._version, module
            served = _as_served(module, given)
            if self._ranks.size == 1:
                super().calibrate_module(module, (served,), _output)
            else:
                # What is not rounded is the layer's own input, which the block may write to before the batch ends.
                self._given.setdefault(module, []).append(served.clone() if served is given else served)

    def add_inputs(self, where: str) -> None:
        """Adds what the layers were given in one batch of each rank to the Hessians of their owners, in the order of the ranks,
        which is that of the batches. All ranks call it, one that has no batch left too."""
        if self._ranks.size == 1:
            return
        modules, numbers = self._numbered()
        mine = {
            numbers[module]: [(tuple(tensor.shape), tensor.dtype) for tensor in given]
            for module, given in self._given.items()
        }
        every = self._ranks.all_gather(f"inputs of {where}", mine)
        for which in dict.fromkeys(which for found in every for which in found):
            module, owner = modules[which], self._owners[modules[which]]
            for rank, found in enumerate(every):
                for number, (shape, dtype) in enumerate(found.get(which, ())):
                    given = self._given[module][number] if rank == self._ranks.rank else None
                    if given is None and owner == self._ranks.rank:
                        given = self._ranks.receive(rank, shape, dtype)
                    if owner == self._ranks.rank:
                        super().calibrate_module(module, (given,), given)
                    elif given is not None:
                        self._ranks.send(given, owner)
        self._given.clear()

    def compress_modules(self) -> None:
        """Quantizes all layers that saw tokens, those of one Hessian together."""
        ranks, work = self._ranks, list[tuple[int, nn.Module, list[Any]]]()
        for leader, modules in self._groups().items():
            owner, parts = self._owners.get(leader, 0), list(_parts(modules))
            work += [((owner + number) % ranks.size, leader, part) for number, part in enumerate(parts)]
            if len(parts) > 1:
                self._copy_to_all_ranks(leader, owner)
        last = {leader: number for number, (rank, leader, _) in enumerate(work) if rank == ranks.rank}
        factors: dict[nn.Module, list[_Factor]] = defaultdict(list)
        for number, (rank, leader, part) in enumerate(work):
            if rank == ranks.rank:
                self._compress_rows(part, self._hessians[leader], factors[leader])
                if last[leader] == number:
                    del self._hessians[leader], factors[leader]
        self._hessians.clear()
        self._num_samples.clear()
        self._leaders.clear()
        self._inputs.clear()
        if ranks.size > 1:
            ranks.all_gather("quantized weights", None)
            for rank, _, part in work:
                for value in (getattr(module, name, None) for module in part for name in _WRITTEN):
                    if isinstance(value, torch.Tensor):
                        ranks.broadcast(value.data, rank)

    def _groups(self) -> dict[nn.Module, list[nn.Module]]:
        """The layers of every Hessian, by its leader, on all ranks; this rank's Hessians become means."""
        for leader, hessian in self._hessians.items():
            hessian.div_(self._num_samples[leader])
        modules, numbers = self._numbered()
        mine = {numbers[module]: numbers[leader] for module, leader in self._leaders.items()}
        every = self._ranks.all_gather(
            "layers that share an input", (mine, [numbers[leader] for leader in self._hessians])
        )
        seen = {leader for _, leaders in every for leader in leaders}
        groups: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        known: dict[int, int] = {}
        for module, leader in (pair for found, _ in every for pair in found.items()):
            if module not in known and leader in seen:
                groups[modules[leader]].append(modules[module])
            if known.setdefault(module, leader) != leader:
                name = self._module_names[modules[module]]
                raise WorkflowError(f"{name}: shares its input on some ranks only; a defect here")
        return groups

    def _numbered(self) -> tuple[list[nn.Module], dict[nn.Module, int]]:
        """All layers, and the number of each: the same on all ranks."""
        modules = list(self._module_names)
        return modules, {module: number for number, module in enumerate(modules)}

    def _copy_to_all_ranks(self, leader: nn.Module, owner: int) -> None:
        """Gives every rank a Hessian that more than one of them works with."""
        if self._ranks.size > 1:
            self._ranks.all_gather("a Hessian of many layers", None)
            weight: Any = leader.weight
            if self._ranks.rank != owner:
                self._hessians[leader] = torch.empty(
                    weight.shape[1], weight.shape[1], dtype=torch.float32, device=weight.device
                )
            self._ranks.broadcast(self._hessians[leader], owner)

    def _leader_of(self, given: torch.Tensor) -> nn.Module | None:
        known, version, leader = self._inputs.get(id(given), (None, 0, None))
        return leader if known is not None and known() is given and version == given._version else None

    @torch.no_grad()
    def _compress_rows(self, modules: Sequence[Any], hessian: torch.Tensor, factors: list[_Factor]) -> None:
        """Quantizes layers with one `hessian`; `factors` keeps its factor for the next call."""

        def factorize(
            weights: torch.Tensor, hessians: torch.Tensor, percdamp: float, used_rtn_fallback: torch.Tensor
        ) -> torch.Tensor:
            if not factors:
                factors.append(_factorize(hessians[0], percdamp))
            used_rtn_fallback.fill_(factors[0].failed)
            return factors[0].upper

        args = modules[0].quantization_scheme.weights
        params = [module.weight_observer.get_qparams() for module in modules]
        found, whole = [params[0]["scale"]], params[0]["global_scale"]
        if whole is not None:
            # Rows of several weights under the global scales of each: the scale that remains is the quotient.
            found = [one["scale"].to(torch.float32) / one["global_scale"].to(torch.float32) for one in params]
        weights = torch.cat([module.weight.to(torch.float32) for module in modules])[None]
        scale = torch.cat(found)[None]
        with patch_attr(gptq_quantize, "factorize_hessian", factorize):
            quantized, _, _ = gptq_quantize.quantize_weight(
                weights=weights, hessians=hessian.clone()[None], scale=scale, zero_point=torch.zeros_like(scale),
                global_scale=None, quant_args=args, blocksize=self.block_size, percdamp=self.dampening_frac,
            )  # fmt: skip
        rows = quantized[0].split([module.weight.shape[0] for module in modules])
        for module, part, one in zip(modules, rows, params, strict=True):
            glob = one["global_scale"]
            update_batch_qparams(
                [module],
                part[None],
                one["scale"][None],
                one["zero_point"][None],
                None if glob is None else glob[None],
                args,
            )
        self._num_compressed_modules += len(modules)
        if factors[0].failed:
            names = [self._module_names[module] for module in modules]
            self._rtn_fallback_module_names += names
            logger.warning(f"{names[0]}: its Hessian has no Cholesky factor; rounded to nearest instead")


def _as_served(module: Any, given: torch.Tensor) -> torch.Tensor:
    """The inputs as NVFP4 holds them, if the module's are quantized; the global scale is that of the batch."""
    args = getattr(module.quantization_scheme, "input_activations", None)
    if args is None or args.strategy != QuantizationStrategy.TENSOR_GROUP:
        return given
    return quantize_dequantize(given, observed_global_scale(given.abs().amax().to(torch.float32).reshape(1)))


def _factorize(hessian: torch.Tensor, damping: float) -> _Factor:
    """`hessian` float32 `[K, K]`, which it overwrites."""
    diagonal = hessian.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1.0)
    mean = diagonal.mean()
    for factor in RETRIES:
        damped = hessian.clone()
        damped.diagonal().add_(damping * factor * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if info.item() == 0 and bool(torch.isfinite(upper.diagonal()).all()):
                return _Factor(upper[None], failed=False)
    return _Factor(torch.eye(len(hessian), device=hessian.device)[None], failed=True)


def _parts(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Parts of at most _CHUNK bytes whose members have the same arguments; what has no group scales comes alone."""
    part: list[Any] = []
    module: Any
    for module in modules:
        args = module.quantization_scheme.weights
        alone = args.strategy != QuantizationStrategy.TENSOR_GROUP
        size = 4 * module.weight.numel() + sum(4 * other.weight.numel() for other in part)
        if part and (alone or size > _CHUNK or part[0].quantization_scheme.weights != args):
            yield part
            part = []
        part.append(module)
        if alone:
            yield part
            part = []
    if part:
        yield part
