"""NVFP4 as compressed-tensors computes it."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from calibration.plan.schemes import NVFP4A16


def of_compressed_tensors(weight: torch.Tensor, global_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """(packed, group scales as bytes, global scale) by compressed-tensors in float32."""
    weight = weight.to(torch.float32)
    if global_scale is None:
        global_scale = generate_gparam(weight.min(), weight.max())
    arguments = QuantizationArgs(**{**NVFP4A16.weights, "scale_dtype": torch.float8_e4m3fn})
    groups = weight.reshape(weight.shape[0], -1, 16)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, global_scale)
    values = ct_quantize(weight, scale, None, arguments, global_scale=global_scale)
    return pack_fp4_to_uint8(values), scale.to(torch.float8_e4m3fn).view(torch.uint8), global_scale
