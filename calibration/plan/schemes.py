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

    def problem(self, shape: tuple[int, ...], followed: bool = False) -> str | None:
        """Why a weight of this shape cannot have the scheme, or None. `followed` as in `tiled_rows_problem`."""
        if len(shape) != 2:
            return f"needs a 2-D weight, it has {len(shape)} dimensions"
        if self.name == "FP8_BLOCK":
            return tiled_input_problem(shape[1]) or tiled_rows_problem(shape[0], followed)
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


def tiled_input_problem(columns: int, side: int = TILE) -> str | None:
    """Why vLLM 0.32 does not run a weight with K `columns` in FP8 tiles that are `side` wide on a GPU, or None: it quantizes
    inputs in whole groups (fp8_utils.per_token_group_quant_fp8 asserts it; for block weights compilation does not replace it,
    vllm/config/vllm.py has_blocked_weights)."""
    return (
        f"needs K to be a multiple of {side}, K is {columns}: vLLM quantizes inputs in such groups"
        if columns % side
        else None
    )


def tiled_rows_problem(rows: int, followed: bool, side: int = TILE) -> str | None:
    """Why vLLM 0.32 does not load a weight with M `rows` in FP8 tiles that are `side` high, or None. `followed`: whether it puts
    another weight below this one in the same matrix (gate and up of routed experts alike), which must begin a row of tiles
    (fp8_utils.validate_fp8_block_shape and its MoE twin; tensor parallel size 1)."""
    wrong = followed and rows % side
    return f"needs M to be a multiple of {side}, M is {rows}: vLLM stacks another weight below it" if wrong else None


def _scheme(name: str, input_scale: bool) -> Scheme:
    return Scheme(name, FORMATS[name], input_scale, *ARGUMENTS[name])


NVFP4, NVFP4A16, FP8_BLOCK = _scheme("NVFP4", True), _scheme("NVFP4A16", False), _scheme("FP8_BLOCK", False)
SCHEMES = {scheme.name: scheme for scheme in (NVFP4, NVFP4A16, FP8_BLOCK)}
