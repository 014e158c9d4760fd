"""The JSON files of an output that follow from its plan: config.json, the index, in NVIDIA's dialect hf_quant_config.json."""

from __future__ import annotations

from typing import Any

from calibration.checkpoint.dialect import NVIDIA
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME
from calibration.plan.nvidia_config import HF_QUANT_CONFIG, nvidia_config
from calibration.plan.plan import Plan
from calibration.plan.quantization_config import output_config


def planned_files(plan: Plan, source_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> its content, the index last: only then does the output load."""
    files = {HF_QUANT_CONFIG: nvidia_config(plan, source_config)[1]} if plan.dialect == NVIDIA.name else {}
    index = {"metadata": {"total_size": plan.output_bytes}, "weight_map": dict(sorted(plan.weight_map.items()))}
    return files | {CONFIG_NAME: output_config(plan, source_config), INDEX_NAME: index}
