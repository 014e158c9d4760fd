"""Makes the output's config.json: the source's, except for `quantization_config` and fields that the serving engine
needs."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from calibration.checkpoint.dialect import NVIDIA
from calibration.checkpoint.source_config import without
from calibration.plan.nvidia_config import nvidia_config
from calibration.plan.plan import Plan
from calibration.plan.schemes import Scheme

#: The compressed-tensors release whose format the output follows (the one llm-compressor 0.14.0.1 pins).
FORMAT_VERSION = "0.19.0"


def output_config(plan: Plan, source_config: dict[str, Any]) -> dict[str, Any]:
    """The output's config: the source's fields in their order, with `quantization_config` replaced and the fields of
    the family's `serving_config` added. If nothing in the output is quantized (method plain), both are absent, even if
    the source has them. In NVIDIA's dialect `nvidia_config` makes it."""
    if plan.dialect == NVIDIA.name:
        return nvidia_config(plan, source_config)[0]
    config = without(source_config, "quantization_config")
    if not plan.groups:
        return {key: value for key, value in config.items() if key not in dict(plan.family.serving_config)}
    config |= dict(plan.family.serving_config)
    return config | {"quantization_config": quantization_config(plan)}


def quantization_config(plan: Plan) -> dict[str, Any]:
    """compressed-tensors' `quantization_config`: one config group per group of the plan, with targets that match vLLM's
    own module names (see `targets`)."""
    groups = {name: _group(scheme, targets(plan, name)) for name, scheme in plan.groups.items() if plan.modules(name)}
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": FORMAT_VERSION,
    }


def targets(plan: Plan, group: str) -> list[str]:
    """The regexes of a config group: exact for blocks and projections, general for expert numbers.

    vLLM puts its own prefix before a name (`model.`) and looks up fused and expert modules under other leaf names, so
    each leaf is accompanied by its `serving_leaves`. Block numbers are listed, so that MTP modules, which vLLM numbers
    after the last block, never match.
    """
    further, within = dict(plan.family.serving_leaves), plan.family.served_in
    prefix = rf"(?:.*\.)?{re.escape(within)}\.(?:model\.)?" if within else r"(?:.*\.)?"
    blocks_of: dict[tuple[str, str], list[int]] = defaultdict(list)
    plain: list[str] = []
    for module in map(plan.family.served_parent, plan.modules(group)):
        block = re.search(plan.family.block, module)
        if block is None:
            plain += plan.family.serving_names(module)[:1] if within else [module]
            continue
        parent, _, leaf = module[block.end() :].rpartition(".")
        numbers = blocks_of[(re.sub(r"\d+", r"\\d+", (parent and f"{parent}.").replace(".", r"\.")), leaf)]
        if int(block[1]) not in numbers:
            numbers.append(int(block[1]))
    leaves_of: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for (parent, leaf), numbers in blocks_of.items():
        leaves_of[(tuple(sorted(numbers)), parent)] += [leaf, *further.get(leaf, ())]
    return plain + [
        rf"re:{prefix}{plan.family.blocks}\.(?:{'|'.join(map(str, numbers))})\.{parent}(?:{'|'.join(sorted(set(leaves)))})$"
        for (numbers, parent), leaves in leaves_of.items()
    ]


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "format": scheme.format,
        "input_activations": scheme.input_activations,
        "output_activations": None,
        "targets": targets,
        "weights": scheme.weights,
    }
