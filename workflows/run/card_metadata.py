"""The hub's metadata of a model card (https://huggingface.co/docs/hub/model-cards), from recipe, config and the source's card.

The source's card is a stranger's: only its license is taken, and only in the form that the hub has for one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from calibration.checkpoint.dialect import NVIDIA
from calibration.checkpoint.files import read_bytes
from calibration.plan.task import Task
from recipes import documents
from recipes.errors import WorkflowError
from recipes.portable import hub_dataset, hub_id
from verify.accuracy.recovery import Recovery

_MOST_BYTES = 1 << 20
#: Field -> the form in which it is taken over.
_LICENSE = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}"),
    "license_name": re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+_-]{0,63}"),
    "license_link": re.compile(r"https://[A-Za-z0-9./_~%+=&?#-]{1,300}|LICENSE[A-Za-z0-9._-]{0,40}"),
}


def metadata(task: Task, scored: Sequence[Recovery] = ()) -> dict[str, Any]:
    """The metadata of the output of `task`, with its scores if lm-eval gave some (`scored`). What is not known is left out: a
    source that is a local directory has no id that a reader could follow."""
    recipe, plan, config = task.recipe, task.plan, task.source.config
    base = hub_id(recipe.source)
    data = hub_dataset(recipe.calibration.dataset) if recipe.calibration else None
    form = "modelopt" if plan.dialect == NVIDIA.name else "compressed-tensors"
    tags = (["nvfp4"] if any(scheme.name.startswith("NVFP4") for scheme in plan.groups.values()) else []) + [form]
    return {
        **({"base_model": base} if base else {}),
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "pipeline_tag": pipeline_tag(config),
        **license_of(task.source.directory),
        "tags": [*tags, "vllm", "llm-compressor"],
        **({"datasets": [data]} if data else {}),
        **model_index(Path(recipe.output).name, scored),
    }


def model_index(name: str, scored: Sequence[Recovery]) -> dict[str, Any]:
    """The scores in the hub's form, one result a task; empty if there is none. Tasks keep letters, digits, `_`, `.` and `-`."""
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": task, "type": task},
            "metrics": [
                {"type": metric, "value": round(found.output, 4), "name": f"{metric} over {found.samples} samples"}
            ],
        }
        for found in scored
        if math.isfinite(found.output)
        for task, metric in [(_name(found.task), _name(found.metric))]
    ]
    return {"model-index": [{"name": _name(name), "results": results}]} if results else {}


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:80]


def pipeline_tag(config: Mapping[str, Any]) -> str:
    """The hub's task of a checkpoint, by the towers that its config has."""
    sees, hears = (isinstance(config.get(f"{tower}_config"), dict) for tower in ("vision", "audio"))
    return (
        "any-to-any"
        if sees and hears
        else "image-text-to-text"
        if sees
        else "audio-text-to-text"
        if hears
        else "text-generation"
    )


def license_of(source: Path) -> dict[str, str]:
    """license, license_name and license_link of the source's card; empty if it has none, or one in another form."""
    try:
        text = read_bytes(source / "README.md", max_bytes=_MOST_BYTES).decode(errors="replace")
        front = re.match(r"---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.S)
        said = documents.parse(front[1]).data if front else None
    except (WorkflowError, yaml.YAMLError):
        return {}
    found = {}
    for field, form in _LICENSE.items():
        value = said.get(field) if isinstance(said, dict) else None
        if isinstance(value, str) and form.fullmatch(value):
            found[field] = value
    return found if "license" in found else {}
