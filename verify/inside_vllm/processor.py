"""Controls what vLLM sees of the CPU, which determines its choice of CPU kernels.

vLLM asks `torch.cpu` for the processor's features: AMX tiles determine its FP8 linear layers, experts, MLA and
attention; AVX-512 and its BF16 instructions determine which of three builds of its kernels is loaded. AMX only
multiplies BF16, FP16, INT8 and FP8, but vLLM 0.32 also picks AMX kernels in float32, where they raise ("expect A to be
bfloat16 or half"). Therefore a float32 run hides AMX and uses the same kernels on every processor.

Runs inside vLLM's interpreter, before vLLM is imported: imports the standard library and torch only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

PROBES = {
    "avx512": "_is_avx512_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "amx": "_is_amx_tile_supported",
    "amx_fp16": "_is_amx_fp16_supported",
}
"""Feature -> the function of `torch.cpu` that vLLM asks for it. Each is built on the one before: vLLM's AMX kernels are only
in its build for AVX-512 with BF16."""
AT_IMPORT = ("avx512", "avx512_bf16")
"""Features that vLLM checks while it is imported; it checks the others whenever it chooses a kernel."""


def set_features(pretended: Mapping[str, bool], dtype: str) -> dict[str, str]:
    """Make the probes of `torch.cpu` answer as if the processor had the `pretended` features, and hide AMX in float32.

    A processor that lacks a feature, or is said to, lacks what is built on it too, unless that is pretended.
    Returns per feature the answer to vLLM: "yes" and "no" are true, "claimed" is a false yes, "hidden" is a no about a
    feature that exists or is pretended. Raises ValueError for an unknown feature.
    """
    if unknown := sorted(set(pretended) - set(PROBES)):
        raise ValueError(f"processor: unknown features {unknown}; known are {sorted(PROBES)}")
    answers: dict[str, str] = {}
    has = True
    for feature, probe in PROBES.items():
        true = bool(getattr(torch.cpu, probe)())
        has = pretended.get(feature, true and has)
        answer = has and not (dtype == "float32" and feature.startswith("amx"))
        if answer != true:
            setattr(torch.cpu, probe, lambda answer=answer: answer)
        answers[feature] = ("yes" if true else "claimed") if answer else ("hidden" if true or has else "no")
    return answers
