"""The quantization schemes that this project writes: their output tensors and their entries in `quantization_config`.

Names and shapes follow compressed-tensors' formats `nvfp4-pack-quantized` and `float-quantized` (0.17 to 0.19).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from calibration.checkpoint.dialect import COMPRESSED_TENSORS, Dialect
from calibration.checkpoint.nvfp4 import GROUP
from calibration.checkpoint.tiles import TILE
from calibration.plan.tiled import Heights, tiled_input_problem, tiled_rows_problem
from recipes.schemes import ARGUMENTS, FORMATS

Outputs = tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Scheme:
    """One scheme: `format` in compressed-tensors' words, whether it needs calibrated input scales, and the arguments of
    its config group."""

    name: str
    format: str
    input_scale: bool
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None

    def problem(self, shape: tuple[int, ...], heights: Heights) -> str | None:
        """Why a weight of this shape cannot have the scheme, or None. `heights` of the weight as in `stacked_heights`."""
        if len(shape) != 2:
            return f"needs a 2-D weight, it has {len(shape)} dimensions"
        if self.name == "FP8_BLOCK":
            return tiled_input_problem(shape[1]) or tiled_rows_problem(heights)
        if self.name.startswith("NVFP4") and shape[1] % GROUP:
            return f"needs K to be a multiple of {GROUP}, K is {shape[1]}"
        return None

    def outputs(self, module: str, shape: tuple[int, ...], dialect: Dialect = COMPRESSED_TENSORS) -> Outputs:
        """(name, safetensors dtype, shape) of every tensor that a `[M, K]` weight becomes; for NVFP4 in the order
        packed codes, group scales, global scale, input scale."""
        rows, columns = shape
        if self.name == "FP8_BLOCK":
            grid = (math.ceil(rows / TILE), math.ceil(columns / TILE))
            return ((f"{module}.weight", "F8_E4M3", shape), (f"{module}.weight_scale", "F32", grid))
        outputs: Outputs = (
            (f"{module}.{dialect.packed}", "U8", (rows, columns // 2)),
            (f"{module}.{dialect.group_scale}", "F8_E4M3", (rows, columns // GROUP)),
            (f"{module}.{dialect.global_scale}", "F32", dialect.scalar),
        )
        return (*outputs, (f"{module}.{dialect.input_scale}", "F32", dialect.scalar)) if self.input_scale else outputs


def _scheme(name: str, input_scale: bool) -> Scheme:
    return Scheme(name, FORMATS[name], input_scale, *ARGUMENTS[name])


NVFP4, NVFP4A16, FP8_BLOCK = _scheme("NVFP4", True), _scheme("NVFP4A16", False), _scheme("FP8_BLOCK", False)
SCHEMES = {scheme.name: scheme for scheme in (NVFP4, NVFP4A16, FP8_BLOCK)}
