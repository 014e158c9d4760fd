"""Finds the MXFP4 weights of a calibrated block that NVFP4 represents exactly, and their NVFP4 bytes.

An MXFP4 group scale is a power of two for 32 values. E4M3 represents 18 powers of two, so with a power of two as global
scale both halves of a group keep their codes and scale (`kernels.respell`). Weights that a modifier edits have no exact
form.
"""

from __future__ import annotations

import numpy as np
import torch

from calibration.checkpoint import kernels
from calibration.checkpoint.kernels import Stripe
from calibration.plan.plan import Step
from calibration.plan.schemes import FP8_BLOCK
from calibration.plan.task import Task
from recipes.errors import SourceError


class ExactWeights:
    """The source's MXFP4 weights as NVFP4, for an exporter. Caches one number per fused group."""

    def __init__(self, task: Task) -> None:
        recipe, plan = task.recipe, task.plan
        self._plan, self._formats = plan, task.formats
        edits = [e.name for e in recipe.modifiers if e.smoothing is None] != ["QuantizationModifier"]
        self._wanted = recipe.export.mxfp4 == "lossless" and not edits
        self._fused = {module: group for group in plan.fused for module in group}
        self._scales: dict[tuple[str, ...], np.float32 | None] = {}

    def is_mxfp4(self, step: Step) -> bool:
        """Whether `step` turns a weight stored in MXFP4 into NVFP4."""
        nvfp4 = step.action == "quantize" and self._plan.groups[str(step.group)] is not FP8_BLOCK
        return nvfp4 and self._formats.of(step.source).kind == "mxfp4"

    def scale(self, step: Step) -> np.float32 | None:
        """The weight global scale under which the step's whole fused group is exact; None if there is none."""
        members = [
            self._plan.quantized[m] for m in self._fused.get(step.module, (step.module,)) if m in self._plan.quantized
        ]
        if not self._wanted or not all(self.is_mxfp4(member) for member in members):
            return None
        key = tuple(member.module for member in members)
        if key not in self._scales:
            try:
                spans = [self._span(member) for member in members]
            except kernels.NotFinite as problem:
                path = self._formats.checkpoint.path(step.source)
                raise SourceError(f"{path}: {step.source} or its fused weight {problem}; get a whole copy") from None
            self._scales[key] = kernels.common_lossless_scale(spans)
        return self._scales[key]

    def tensors(self, step: Step) -> list[torch.Tensor] | None:
        """`weight_packed` uint8 `[M, K/2]`, `weight_scale` E4M3 `[M, K/16]` and `weight_global_scale` F32 `[1]` with
        exactly the source's values; None if there is no such form. Raises SourceError if a scale is NaN."""
        scale = self.scale(step)
        if scale is None:
            return None
        packed, scales = (torch.empty(output.shape, dtype=torch.uint8) for output in step.outputs[:2])
        kernels.respell(self._stripe(step), scale, packed.numpy(), scales.numpy())
        return [packed, scales.view(torch.float8_e4m3fn), torch.tensor([float(scale)])]

    def _span(self, step: Step) -> tuple[int, int] | None:
        """`kernels.exponents` of the step's weight. The codes, 16 times as many bytes as the scales, are only read if
        the scales are so far apart that those of all-zero groups must be excluded."""
        span = kernels.scale_exponents(self._scales_of(step))
        return span if kernels.fits_e4m3(span) else kernels.exponents(self._stripe(step))

    def _stripe(self, step: Step) -> Stripe:
        codes = self._formats.checkpoint.read(step.source).view(torch.uint8).numpy()
        return Stripe(self._formats.of(step.source), "U8", codes, self._scales_of(step))

    def _scales_of(self, step: Step) -> kernels.Bytes:
        """The E8M0 codes of a weight's group scales, uint8 `[M, K/32]`."""
        name = self._formats.of(step.source).companions["group_scale"]
        scales: kernels.Bytes = self._formats.checkpoint.read(name).view(torch.uint8).numpy()
        return scales
