"""Writes the output shards of each finished block, then those outside the blocks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from calibration.checkpoint import nvfp4
from calibration.checkpoint.dequantize import cast_dtype, check_finite, is_positive
from calibration.checkpoint.dialect import COMPRESSED_TENSORS, DIALECTS, inverse
from calibration.checkpoint.formats import TORCH_DTYPES
from calibration.checkpoint.index import TORCH
from calibration.checkpoint.writer import write_shard
from calibration.engine.exact import ExactWeights
from calibration.engine.smoothing import Factors
from calibration.plan.plan import PlannedShard, Step
from calibration.plan.schemes import FP8_BLOCK
from calibration.plan.task import Task
from calibration.runs.ranks import Ranks
from calibration.runs.sharing import assign_owners
from recipes.errors import SourceError, WorkflowError


class Exporter:
    """Writes the output checkpoint of one plan, shard by shard, under the source's own tensor names."""

    def __init__(self, task: Task, ranks: Ranks | None = None) -> None:
        self.task, self.plan, self.formats = task, task.plan, task.formats
        self.ranks = ranks or Ranks()
        self._owners = assign_owners(task.plan, self.ranks.size)
        #: Packed modules that are not yet in a shard: those this rank owns, and those that other ranks sent.
        self._packed: dict[str, dict[str, torch.Tensor]] = {}
        #: Relative rounding error of every module packed so far.
        self.errors: dict[str, float] = {}
        self._exact = ExactWeights(task)
        #: Modules stored in MXFP4 and packed so far: whether they kept their values.
        self.exact: dict[str, bool] = {}
        self._factors: Mapping[str, Factors] = {}

    def block(
        self, block: int, modules: Mapping[str, torch.nn.Module], factors: Mapping[str, Factors] | None = None
    ) -> dict[str, str]:
        """Writes the shards of one calibrated block; `modules` maps source module names to llm-compressor's calibrated
        linear layers, loaded; `factors` are those of smoothing, by source module. Returns shard file name -> sha256.
        Raises WorkflowError if a scale is not finite and positive or a fused group does not share its weight global
        scale. All ranks call it: each packs the modules it owns, rank 0 alone writes, and the others return an empty
        dict."""
        self._factors = factors or {}
        return self._shards(block, modules)

    def rest(self, modules: Mapping[str, torch.nn.Module]) -> dict[str, str]:
        """Writes the shards outside the blocks (embedding, head, MTP, ...), as `block` does."""
        return self._shards(None, modules)

    def _shards(self, block: int | None, modules: Mapping[str, torch.nn.Module]) -> dict[str, str]:
        shards = [shard for shard in self.plan.shards if shard.block == block]
        scales = self._input_global_scales(modules)
        own = {name: module for name, module in modules.items() if self._owners.get(name, 0) == self.ranks.rank}
        self._check_shared_weight_scales(own)
        if self.ranks.size == 1 or not modules:
            return {shard.name: self._shard(shard, modules, scales) for shard in shards if self.ranks.writes}
        # All ranks pack before any rank sends: packing may fail, and no rank may wait for one that failed.
        for step in (self.plan.steps[source] for shard in shards for source in shard.sources):
            if step.action == "quantize" and step.module in own:
                self._packed[step.module] = self._quantized(step, own[step.module], scales.get(step.module))
        own_errors = {name: self.errors[name] for name in own if name in self.errors}
        own_exact = {name: self.exact[name] for name in own if name in self.exact}
        for errors, exact in self.ranks.all_gather(f"packed weights of block {block}", (own_errors, own_exact)):
            self.errors |= errors
            self.exact |= exact
        return {shard.name: digest for shard in shards if (digest := self._gathered(shard, modules, scales))}

    def _gathered(
        self, shard: PlannedShard, modules: Mapping[str, torch.nn.Module], scales: Mapping[str, torch.Tensor]
    ) -> str | None:
        """Collects one shard's tensors on rank 0, which writes the shard and returns its digest."""
        self.ranks.all_gather(f"shard {shard.name}", None)
        for step in (self.plan.steps[source] for source in shard.sources):
            if step.action != "quantize" or not (owner := self._owners[step.module]):
                continue
            if self.ranks.writes:
                self._packed[step.module] = {
                    output.name: self.ranks.receive(owner, output.shape, TORCH[output.dtype]) for output in step.outputs
                }
            elif owner == self.ranks.rank:
                packed = self._packed.pop(step.module)
                for output in step.outputs:
                    self.ranks.send(packed[output.name])
        return self._shard(shard, modules, scales) if self.ranks.writes else None

    def _shard(
        self, shard: PlannedShard, modules: Mapping[str, torch.nn.Module], scales: Mapping[str, torch.Tensor]
    ) -> str:
        steps = [step for source in shard.sources if (step := self.plan.steps[source]).outputs]
        outputs = [output for step in steps for output in step.outputs]
        tensors = (made for step in steps for made in self._step(step, modules, scales).items())
        return write_shard(self.task.output / shard.name, outputs, tensors)

    def _step(
        self, step: Step, modules: Mapping[str, torch.nn.Module], scales: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if step.action == "quantize":
            if step.module not in modules:
                raise WorkflowError(f"{step.module}: is to be quantized and was not calibrated: a defect here")
            if step.module in self._packed:
                return self._packed.pop(step.module)
            return self._quantized(step, modules[step.module], scales.get(step.module))
        output = step.outputs[0]
        if step.action == "copy":
            tensor = self.formats.checkpoint.read(step.source)
            check_finite(tensor, f"{self.formats.checkpoint.path(step.source)}: {step.source}")
        elif step.action == "rescale":
            tensor = self.formats.read(step.source, TORCH[output.dtype])
            tensor = self._factors.get(step.module, Factors()).apply(tensor)
            check_finite(tensor, f"{step.source} after smoothing")
        else:
            dtype = cast_dtype(output.dtype, TORCH_DTYPES[self.task.recipe.export.plain_dtype])
            tensor = self.formats.read(step.source, dtype)
        return {output.name: tensor}

    def _quantized(
        self, step: Step, module: torch.nn.Module, input_global_scale: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        scheme = self.plan.groups[str(step.group)]
        names = [output.name for output in step.outputs]
        if self._exact.is_mxfp4(step):
            kept = self._exact.tensors(step)
            self.exact[step.module] = kept is not None
            if kept is not None:
                self.errors[step.module] = 0.0
                kept += [input_global_scale] if input_global_scale is not None else []
                return dict(zip(names, self._spelled(kept), strict=True))
        weight, scale = _parameter(module, "weight"), _parameter(module, "weight_scale")
        check_finite(weight, f"{step.source} after calibration")
        _check_scale(f"{step.module}.weight_scale", scale)
        if scheme is FP8_BLOCK:
            # Imported late: compressed-tensors imports transformers, which takes seconds that stages without
            # calibration save.
            from compressed_tensors.quantization.lifecycle.forward import quantize

            arguments = module.quantization_scheme.weights  # type: ignore[union-attr]
            codes = quantize(weight, scale, None, arguments, dtype=torch.float8_e4m3fn)
            return dict(zip(names, (codes, scale.to(torch.float32)), strict=True))
        global_scale = _parameter(module, "weight_global_scale")
        _check_scale(f"{step.module}.weight_global_scale", global_scale)
        packed, self.errors[step.module] = nvfp4.pack(weight, scale, global_scale)
        values = [packed, scale.to(torch.float8_e4m3fn), global_scale.to(torch.float32).reshape(1)]
        if input_global_scale is not None:
            values.append(input_global_scale)
        return dict(zip(names, self._spelled(values), strict=True))

    def _spelled(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Codes, group scales and global scales of an NVFP4 weight, with global scales in the output's dialect."""
        dialect = DIALECTS[self.plan.dialect]
        if dialect is COMPRESSED_TENSORS:
            return values
        return values[:2] + [torch.from_numpy(np.array(inverse(value.item()))) for value in values[2:]]

    def _input_global_scales(self, modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
        """Module -> float32 `[1]`, the smallest of its group: a global scale is a divisor, smaller for larger
        activations, so that the smallest one covers every module of the group. The plan's headroom widens all of
        them."""
        scales: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            step = self.plan.quantized.get(name)
            if step is not None and self.plan.groups[str(step.group)].input_scale:
                calibrated = _parameter(module, "input_global_scale").to(torch.float32).cpu().reshape(1)
                scales[name] = calibrated / (self.plan.input_headroom or 1.0)
                _check_scale(f"{name}.input_global_scale", scales[name])
        for group in self.plan.shared_input_scales():
            shared = [scales[name] for name in group if name in scales]
            if shared:
                least = torch.stack(shared).amin(0)
                scales.update(dict.fromkeys((name for name in group if name in scales), least))
        return {name: scale.clone() for name, scale in scales.items()}

    def _check_shared_weight_scales(self, modules: Mapping[str, torch.nn.Module]) -> None:
        for group in self.plan.fused:
            scales = {
                name: float(_parameter(modules[name], "weight_global_scale"))
                for name in group
                if name in modules and hasattr(modules[name], "weight_global_scale")
            }
            if len(set(scales.values())) > 1:
                raise WorkflowError(
                    f"weight_global_scale differs inside a fused group: {scales}; the serving engine would use one of "
                    "them for all: these modules cannot be NVFP4 in this family yet, leave them out of the targets"
                )


def _parameter(module: torch.nn.Module, name: str) -> torch.Tensor:
    value = getattr(module, name, None)
    if not isinstance(value, torch.Tensor):
        raise WorkflowError(f"{type(module).__name__} ends calibration without {name}: a defect here")
    return value.data


def _check_scale(name: str, scale: torch.Tensor) -> None:
    if not is_positive(scale):
        value = scale.to(torch.float32)
        bad = value[~(torch.isfinite(value) & (value > 0))].flatten()[0].item()
        raise SourceError(
            f"{name}: {bad} is not a finite positive scale; no calibration token reached this module, or the weight or "
            "activations overflow; use more samples or `experts: all`"
        )
