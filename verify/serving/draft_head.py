"""Whether the served draft head was tried: it is read, and not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibration.checkpoint.dialect import is_nvidia
from calibration.checkpoint.files import read_json_or_none
from calibration.checkpoint.index import INDEX_NAME
from calibration.families.registry import family_of
from recipes.errors import WorkflowError
from verify.checks import Check, unchecked

_WHY = (
    "read from the headers (structure.mtp), not run: vLLM 0.32 has no draft model of this family for a CPU "
    "(models/deepseek_v4/cpu/mtp.py raises NotImplementedError), and nothing is served with speculation here"
)


def draft_head_checks(checkpoint: Path, config: dict[str, Any]) -> list[Check]:
    """UNCHECKED for a checkpoint in NVIDIA's dialect, whose draft head is there to speculate; nothing for others."""
    weight_map = (read_json_or_none(checkpoint / INDEX_NAME) or {}).get("weight_map")
    try:
        family = family_of(config)
    except WorkflowError:
        return []
    if (
        family.fp8_dialect is None
        or not is_nvidia(config.get("quantization_config"))
        or not isinstance(weight_map, dict)
    ):
        return []
    there = any(family.place(name).mtp for name in weight_map)
    return [unchecked("serving.draft_head", "the engine speculates with the draft head", _WHY)] if there else []
