"""The two dialects (spellings) of an NVFP4 weight, and the conversion of their global scales.

compressed-tensors divides by its global scales (`448 * 6 / amax`, F32 `[1]`). modelopt, whose dialect NVIDIA's own
checkpoints use, multiplies by the inverse (F32 scalars). Packed codes and group scales have the same bytes in both.
Sources: compressed-tensors 0.19, compressors/nvfp4; Model-Optimizer,
modelopt/torch/quantization/qtensor/nvfp4_tensor.py and examples/deepseek/deepseek_v4/quantize_to_nvfp4.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

DialectName = Literal["compressed_tensors", "nvidia"]


@dataclass(frozen=True)
class Dialect:
    """One dialect. `packed`, `group_scale`, `global_scale` and `input_scale` are the leaf names of a module's four
    tensors, `scalar` is the shape of the last two, `kind` is the stored format of such a weight in `formats`."""

    name: DialectName
    kind: Literal["nvfp4", "modelopt_nvfp4"]
    packed: str
    group_scale: str
    global_scale: str
    input_scale: str
    scalar: tuple[int, ...]

    @property
    def companions(self) -> dict[str, str]:
        """Role -> leaf name of the scales that every weight has."""
        return {"group_scale": self.group_scale, "global_scale": self.global_scale}


COMPRESSED_TENSORS = Dialect(
    "compressed_tensors", "nvfp4", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", (1,)
)
NVIDIA = Dialect("nvidia", "modelopt_nvfp4", "weight", "weight_scale", "weight_scale_2", "input_scale", ())
DIALECTS = {dialect.name: dialect for dialect in (COMPRESSED_TENSORS, NVIDIA)}


def inverse(scale: float | np.float32) -> np.float32:
    """Converts a global scale to the other dialect: `1 / scale` in float32. Infinite or zero if that is out of
    float32's range."""
    with np.errstate(all="ignore"):
        return np.float32(1) / np.float32(scale)


def returns(scale: float | np.float32) -> bool:
    """Whether the inverse of the inverse equals the scale, bit for bit, which is not so for every float32."""
    return bool(inverse(inverse(scale)) == np.float32(scale))


def is_nvidia(raw: object) -> bool:
    """Whether a quantization_config is in NVIDIA's dialect."""
    if not isinstance(raw, dict):
        return False
    method = raw.get("quant_method")
    return (method == "fp8" and "moe_quant_algo" in raw) or (isinstance(method, str) and method.startswith("modelopt"))
