"""What vLLM is told about the CPU it runs on, which decides its choice of CPU kernels.

vLLM asks `torch.cpu` what the processor has: AMX tiles decide its FP8 linear layers, experts, MLA and attention; AVX-512
and its BF16 instructions decide which of three builds of its kernels is loaded. AMX multiplies BF16, FP16, INT8 and FP8
only, and vLLM 0.32 picks AMX kernels in float32 too, where they raise ("expect A to be bfloat16 or half"). So a float32
run hides AMX and takes the same kernels on every processor.

Runs inside vLLM's interpreter, before vLLM is imported: imports the standard library and torch only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

PROBES = {
    "amx": "_is_amx_tile_supported",
    "amx_fp16": "_is_amx_fp16_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512": "_is_avx512_supported",
}
"""Feature -> the function of `torch.cpu` that vLLM asks for it."""
AT_IMPORT = ("avx512_bf16", "avx512")
"""Features that vLLM asks for while it is imported; the others, whenever it chooses a kernel."""


def tell_features(pretended: Mapping[str, bool], dtype: str) -> dict[str, str]:
    """Make the probes of `torch.cpu` answer as if the processor had the `pretended` features, and hide AMX in float32.

    Returns per feature what vLLM is told: "yes" and "no" are the truth, "claimed" is a yes that is not true, "hidden" a
    no about what is there, or is pretended to be. Raises ValueError for an unknown feature.
    """
    if unknown := sorted(set(pretended) - set(PROBES)):
        raise ValueError(f"processor: unknown features {unknown}; known are {sorted(PROBES)}")
    told: dict[str, str] = {}
    for feature, probe in PROBES.items():
        true = bool(getattr(torch.cpu, probe)())
        has = pretended.get(feature, true)
        answer = has and not (dtype == "float32" and feature.startswith("amx"))
        if answer != true:
            setattr(torch.cpu, probe, lambda answer=answer: answer)
        told[feature] = ("yes" if true else "claimed") if answer else ("hidden" if true or has else "no")
    return told
