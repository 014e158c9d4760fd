"""`quantized_inputs: true`: llm-compressor's GPTQModifier, made fit for mixtures of experts and for quantized activations.

Four things differ. Layers that share an input (q, k, v; gate and up of all experts of a block) share one Hessian and one
factorization. The Hessian is that of the inputs as they are served: quantized to NVFP4 and back. A Hessian that has no Cholesky
factor is damped ten times as much, and again. An input channel that was always zero keeps its weights, rounded to nearest; the
original sets them to zero. A block's Hessians take 4 K^2 bytes for every distinct input.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
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

from calibration.checkpoint.nvfp4 import RANGE, quantize_dequantize
from recipes.errors import WorkflowError

#: Factors on the damping, in order; then the weight is rounded to nearest.
RETRIES = (1.0, 10.0, 100.0, 1000.0)
#: Bytes of float32 weights that are quantized together; more rows make products larger, not better.
_CHUNK = 2**30


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
            super().calibrate_module(module, (_as_served(module, given),), _output)

    def compress_modules(self) -> None:
        """Quantizes all layers that saw tokens, those of one Hessian together."""
        groups: dict[nn.Module, list[nn.Module]] = {}
        for module, leader in self._leaders.items():
            groups.setdefault(leader, []).append(module)
        for leader, modules in groups.items():
            hessian, samples = self._hessians.pop(leader, None), self._num_samples.pop(leader, None)
            if hessian is not None:
                self._compress_shared(modules, hessian.div_(samples))
        self._leaders.clear()
        self._inputs.clear()

    def _leader_of(self, given: torch.Tensor) -> nn.Module | None:
        known, version, leader = self._inputs.get(id(given), (None, 0, None))
        return leader if known is not None and known() is given and version == given._version else None

    @torch.no_grad()
    def _compress_shared(self, modules: list[nn.Module], hessian: torch.Tensor) -> None:
        factors: list[_Factor] = []

        def factorize(
            weights: torch.Tensor, hessians: torch.Tensor, percdamp: float, used_rtn_fallback: torch.Tensor
        ) -> torch.Tensor:
            if not factors:
                factors.append(_factorize(hessians[0], percdamp))
            used_rtn_fallback.fill_(factors[0].failed)
            return factors[0].upper

        with patch_attr(gptq_quantize, "factorize_hessian", factorize):
            for part in _parts(modules):
                self._compress_rows(part, hessian)
        self._num_compressed_modules += len(modules)
        if factors[0].failed:
            names = [self._module_names[module] for module in modules]
            self._rtn_fallback_module_names += names
            logger.warning(f"{names[0]}: its Hessian has no Cholesky factor; rounded to nearest instead")

    def _compress_rows(self, modules: Sequence[Any], hessian: torch.Tensor) -> None:
        args = modules[0].quantization_scheme.weights
        params = [module.weight_observer.get_qparams() for module in modules]
        found, whole = [params[0]["scale"]], params[0]["global_scale"]
        if whole is not None:
            # Rows of several weights under the global scales of each: the scale that remains is the quotient.
            found = [one["scale"].to(torch.float32) / one["global_scale"].to(torch.float32) for one in params]
        weights = torch.cat([module.weight.to(torch.float32) for module in modules])[None]
        scale = torch.cat(found)[None]
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


def _as_served(module: Any, given: torch.Tensor) -> torch.Tensor:
    """The inputs as NVFP4 holds them, if the module's are quantized; the global scale is that of the batch."""
    args = getattr(module.quantization_scheme, "input_activations", None)
    if args is None or args.strategy != QuantizationStrategy.TENSOR_GROUP:
        return given
    largest = given.abs().amax().to(torch.float32).clamp_min(1e-30)
    return quantize_dequantize(given, (RANGE / largest).reshape(1))


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
