"""config.json and hf_quant_config.json of an output in NVIDIA's dialect, and what that dialect cannot say.

DeepSeek-V4 keeps `quant_method: fp8` and adds `moe_quant_algo: NVFP4`, as NVIDIA's own checkpoints do
(Model-Optimizer, examples/deepseek/deepseek_v4/quantize_to_nvfp4.py) and as vLLM (0.32, models/deepseek_v4*/quant_config.py,
DeepseekV4FP8Config) and SGLang (HybridFp8NvFp4Config) read them: routed experts are NVFP4 but for those that `ignore` names,
every other linear layer is FP8 in tiles with E8M0 scales but for those that `ignored_layers` names. Other families have
modelopt's own form: one algorithm, and the modules that it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from calibration.checkpoint.formats import module_of
from calibration.checkpoint.header import OutputTensor
from calibration.checkpoint.nvfp4 import GROUP
from calibration.checkpoint.source_config import without
from calibration.families.family import NOT_LINEAR, ROUTED, ROUTER, FP8Dialect
from calibration.plan.plan import Plan, Step
from calibration.plan.schemes import FP8_BLOCK, NVFP4

HF_QUANT_CONFIG = "hf_quant_config.json"
#: vLLM 0.32 takes the file for modelopt's by this name alone; the version says who wrote it.
_PRODUCER = {"name": "modelopt", "version": "nvfp4-workflows"}
_FOUR_BITS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}
_PLAIN = frozenset({"BF16", "F16", "F32"})
#: The output head of every family in modelopt's own form.
_HEAD = "lm_head"


def nvidia_problems(plan: Plan) -> list[str]:
    """What the output of `plan`, which is in NVIDIA's dialect, holds that no config of that dialect describes."""
    steps = [step for step in plan.steps.values() if step.group is not None and step.action != "consume"]
    if plan.family.fp8_dialect is not None:
        return [problem for step in steps if (problem := _hybrid_problem(plan, step)) is not None]
    schemes = {plan.groups[str(step.group)].name for step in steps}
    if FP8_BLOCK.name in schemes:
        some = next(step.module for step in steps if plan.groups[str(step.group)] is FP8_BLOCK)
        return [
            f"{some}: FP8 tiles beside NVFP4 have no form here in NVIDIA's dialect of {plan.family.name}; write them plain "
            "(export.kept: plain), or keep compressed_tensors"
        ]
    if len(schemes) > 1:
        return [f"{' and '.join(sorted(schemes))} in one checkpoint have no form here in NVIDIA's dialect; choose one"]
    return []


def _hybrid_problem(plan: Plan, step: Step) -> str | None:
    scheme, name = plan.groups[str(step.group)], plan.family.name
    if scheme is FP8_BLOCK:
        scale = _scale_of(plan, step)
        if step.action == "copy" and scale is not None and scale.dtype == "F8_E8M0":
            return None
        return (
            f"{step.module}: its FP8 tiles have scales that are no powers of two, or are made here; under NVIDIA's dialect of "
            f"{name} an engine reads every tile scale as a power of two: keep compressed_tensors, or write it plain"
        )
    if plan.family.place(step.source).part != ROUTED:
        return (
            f"{step.module}: NVIDIA's dialect of {name} has NVFP4 in routed experts alone; an engine would read this one as "
            "FP8: leave it out of the targets, or keep compressed_tensors"
        )
    if scheme is not NVFP4:
        return (
            f"{step.module}: {scheme.name} has no input scale, which an engine reads under NVIDIA's dialect of {name}"
        )
    return None


def _scale_of(plan: Plan, step: Step) -> OutputTensor | None:
    names = (f"{step.module}.scale", f"{step.module}.weight_scale")
    return next((plan.outputs[name] for name in names if name in plan.outputs), None)


def nvidia_config(plan: Plan, source_config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and hf_quant_config.json of the output of `plan`; every other field of config.json is the source's."""
    config = without(source_config, "quantization_config")
    if plan.family.fp8_dialect is not None:
        config |= dict(plan.family.fp8_dialect.config)
        described, beside = _hybrid(plan, plan.family.fp8_dialect)
        declared = source_config.get("quantization_config")
        if isinstance(declared, dict) and declared.get("quant_method") == "fp8":
            described = declared | described  # what the source says of its FP8 still holds
    else:
        described, beside = _modelopt(plan)
    return config | {"quantization_config": described}, {"producer": dict(_PRODUCER), "quantization": beside}


def agrees(beside: object, described: dict[str, Any]) -> bool:
    """Whether a hf_quant_config.json says what the `quantization_config` of config.json says; what it leaves open is no
    disagreement."""
    said = beside.get("quantization") if isinstance(beside, dict) else None
    if not isinstance(said, dict):
        return False
    names = {"quant_algo": "quant_algo", "group_size": "group_size", "exclude_modules": "ignore",
             "quantized_layers": "quantized_layers"}  # fmt: skip
    return all(
        said.get(theirs) is None or ours not in described or said[theirs] == described[ours]
        for theirs, ours in names.items()
    )


def _hybrid(plan: Plan, words: FP8Dialect) -> tuple[dict[str, Any], dict[str, Any]]:
    experts, ignored = dict[str, None](), list[str]()
    for module in _modules(plan, "nvfp4"):
        experts[re.split(plan.family.expert, module)[0] + ".experts"] = None
    draft_is_nvfp4 = any(plan.family.place(name).mtp and name.endswith(".weight_scale_2") for name in plan.outputs)
    excluded = [*words.not_nvfp4, *([] if draft_is_nvfp4 else [words.draft])]
    for module in _plain_modules(plan):
        place = plan.family.place(f"{module}.weight")
        entry = re.split(plan.family.expert, module)[0] + ".experts" if place.part == ROUTED else module
        if entry not in ignored:
            ignored.append(entry)
    shared = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": GROUP,
        "quantized_layers": {name: {"quant_algo": "NVFP4", "group_size": GROUP} for name in _in_order(experts)},
    }
    described = {
        "activation_scheme": "dynamic",
        "config_groups": _groups(weight_only=False),
        "fmt": "e4m3",
        "ignore": excluded,
        **({"ignored_layers": ignored} if ignored else {}),
        "moe_quant_algo": "NVFP4",
        "producer": dict(_PRODUCER),
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": list(words.tile),
        **shared,
    }
    return described, shared | {"exclude_modules": excluded}


def _modelopt(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    weight_only = any(scheme.name == "NVFP4A16" and plan.modules(name) for name, scheme in plan.groups.items())
    algorithm = "W4A16_NVFP4" if weight_only else "NVFP4"
    excluded = [*_plain_modules(plan), *_plain_drafts(plan)]
    places = map(plan.family.place, plan.outputs)
    if not any(place.part == "head" and not place.mtp for place in places):
        excluded = [_HEAD, *excluded]  # tied to the embedding, and vLLM builds one that it would quantize
    described = {
        "config_groups": _groups(weight_only),
        "ignore": excluded,
        "producer": dict(_PRODUCER),
        "quant_algo": algorithm,
        "quant_method": "modelopt",
    }
    beside = {
        "quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": GROUP, "exclude_modules": excluded,
    }  # fmt: skip
    return described, beside


def _groups(weight_only: bool) -> dict[str, Any]:
    inputs = None if weight_only else dict(_FOUR_BITS)
    return {"group_0": {"input_activations": inputs, "weights": dict(_FOUR_BITS), "targets": ["Linear"]}}


def _modules(plan: Plan, kind: str) -> list[str]:
    return [
        module for name, scheme in plan.groups.items() if scheme.name.lower() == kind for module in plan.modules(name)
    ]


def _plain_drafts(plan: Plan) -> list[str]:
    """A wildcard for each block of the draft head that is stored plain; without it an engine builds it as NVFP4."""
    drafts: dict[str, set[str]] = {}
    for output in plan.outputs.values():
        if (match := re.search(plan.family.mtp, output.name)) is not None:
            drafts.setdefault(match[0].rstrip("."), set()).add(output.dtype)
    return [f"{block}.*" for block, dtypes in drafts.items() if dtypes <= _PLAIN]


def _plain_modules(plan: Plan) -> list[str]:
    """The modules of the output that an engine would quantize and that are stored plain; the draft head is not among them."""
    found = []
    for output in plan.outputs.values():
        module, place = module_of(output.name), plan.family.place(output.name)
        linear = place.part not in NOT_LINEAR or place.part == ROUTER
        built_plain = any(re.search(pattern, module) for pattern, _ in plan.family.never_quantized)
        if plan.family.fp8_dialect is not None:
            built_plain |= place.part in plan.family.fp8_dialect.built_plain
        if output.name.endswith(".weight") and output.dtype in _PLAIN and len(output.shape) == 2 and linear:
            found += [] if built_plain or place.mtp else [module]
    return _in_order(found)


def _in_order(names: Iterable[str]) -> list[str]:
    """Names by their texts and numbers: block 2 before block 10, whatever shard they lie in."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
