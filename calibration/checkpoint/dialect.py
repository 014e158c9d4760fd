"""The two spellings of an NVFP4 weight, and the global scales of one as the other has them.

compressed-tensors divides by its global scales (`448 * 6 / amax`, F32 `[1]`). modelopt, whose spelling NVIDIA's own
checkpoints have, multiplies by the inverse (F32 scalars). Packed codes and group scales have the same bytes in both.
Sources: compressed-tensors 0.19, compressors/nvfp4; Model-Optimizer, modelopt/torch/quantization/qtensor/nvfp4_tensor.py
and examples/deepseek/deepseek_v4/quantize_to_nvfp4.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

DialectName = Literal["compressed_tensors", "nvidia"]


@dataclass(frozen=True)
class Dialect:
    """One spelling. `packed`, `group_scale`, `global_scale` and `input_scale` are the leaves of the four tensors of a
    module, `scalar` is the shape of the last two, `kind` what `formats` calls such a weight."""

    name: DialectName
    kind: Literal["nvfp4", "modelopt_nvfp4"]
    packed: str
    group_scale: str
    global_scale: str
    input_scale: str
    scalar: tuple[int, ...]

    @property
    def companions(self) -> dict[str, str]:
        """Role -> leaf of the scales that every weight has."""
        return {"group_scale": self.group_scale, "global_scale": self.global_scale}


COMPRESSED_TENSORS = Dialect(
    "compressed_tensors", "nvfp4", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", (1,)
)
NVIDIA = Dialect("nvidia", "modelopt_nvfp4", "weight", "weight_scale", "weight_scale_2", "input_scale", ())
DIALECTS = {dialect.name: dialect for dialect in (COMPRESSED_TENSORS, NVIDIA)}


def inverse(scale: float | np.float32) -> np.float32:
    """A global scale of one dialect as the other has it: `1 / scale` in float32. Infinite or zero if float32 has none."""
    with np.errstate(all="ignore"):
        return np.float32(1) / np.float32(scale)


def returns(scale: float | np.float32) -> bool:
    """Whether the inverse of the inverse is the scale itself, bit for bit: float32 does not allow it for every scale."""
    return bool(inverse(inverse(scale)) == np.float32(scale))


def is_nvidia(raw: object) -> bool:
    """Whether a quantization_config is in NVIDIA's dialect."""
    if not isinstance(raw, dict):
        return False
    method = raw.get("quant_method")
    return (method == "fp8" and "moe_quant_algo" in raw) or (isinstance(method, str) and method.startswith("modelopt"))
