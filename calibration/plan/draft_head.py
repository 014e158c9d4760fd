"""Checks whether vLLM's draft model of DeepSeek-V4 can read a draft head (`mtp.*`) in its stored format.

Read in vLLM 0.32, not run: its CPU platform has no draft model of this family (models/deepseek_v4/cpu/mtp.py raises
NotImplementedError). Under `quant_method: fp8` the draft's linear layers are FP8 in tiles, and its experts NVFP4 or, where
`ignore` names `mtp.*`, MXFP4 (models/deepseek_v41/quant_config.py, which CUDA takes for V4 too). Under compressed-tensors
no target matches them, so that every one of them must be plain (mtp.py builds them with the target's quant_config).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from calibration.checkpoint.dialect import NVIDIA, Dialect
from calibration.checkpoint.formats import Formats, module_of
from calibration.families.family import NOT_LINEAR, ROUTED, Family

_LABELS = {
    "fp8_tiles": "FP8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "modelopt_nvfp4": "NVFP4 (modelopt)",
    "plain": "plain",
}


def draft_head_doubts(formats: Formats, family: Family, dialect: Dialect, ignore: Iterable[str]) -> list[str]:
    """Why vLLM would misread the draft head of a checkpoint in `dialect` whose config has this `ignore`; empty if there
    is no draft head."""
    experts, linears = dict[str, str](), dict[str, str]()
    plain = NOT_LINEAR | (family.fp8_dialect.built_plain if family.fp8_dialect is not None else frozenset())
    for name in formats.checkpoint.tensors:
        place = family.place(name)
        if not place.mtp or name in formats.companions or not name.endswith((".weight", ".weight_packed")):
            continue
        built_plain = place.part in plain or len(formats.of(name).shape) != 2
        built_plain |= any(re.search(pattern, module_of(name)) for pattern, _ in family.never_quantized)
        if not built_plain:
            (experts if place.part == ROUTED else linears).setdefault(formats.of(name).kind, module_of(name))
    if dialect is not NVIDIA:
        stored = {kind: module for kind, module in (experts | linears).items() if kind != "plain"}
        return [
            f"{module} is stored as {_LABELS.get(kind, kind)}: under compressed-tensors vLLM builds the draft head plain"
            f"{'; the nvidia dialect keeps it readable' if family.fp8_dialect is not None else ''}"
            for kind, module in stored.items()
        ]
    if family.fp8_dialect is None:  # modelopt's own form, whose list names a draft head that is plain
        return [
            f"{module} is stored as {_LABELS.get(kind, kind)}: under modelopt's config vLLM builds the draft head plain or as "
            "NVFP4"
            for kind, module in (experts | linears).items()
            if kind not in ("plain", "modelopt_nvfp4")
        ]
    doubts = [
        f"{module} is stored as {_LABELS.get(kind, kind)}: under NVIDIA's dialect vLLM reads the draft's linear layers as FP8"
        for kind, module in linears.items()
        if kind != "fp8_tiles"
    ]
    for kind, module in experts.items():
        named = any(fnmatch.fnmatchcase(f"{module.partition('.experts.')[0]}.experts", entry) for entry in ignore)
        wanted = "mxfp4" if named else "modelopt_nvfp4"
        if kind != wanted:
            doubts.append(
                f"{module} is stored as {_LABELS.get(kind, kind)}, and quantization_config.ignore "
                f"{'names' if named else 'does not name'} it: vLLM would read {_LABELS[wanted]}"
            )
    return doubts
