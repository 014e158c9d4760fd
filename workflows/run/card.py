"""The model card README.md of an output checkpoint: recipe, source, versions, sizes, verdicts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

from calibration.checkpoint.dialect import NVIDIA
from calibration.plan.task import Task
from calibration.plan.versions import versions
from recipes.loader import dump_recipe
from verify.checks import Check, level_verdicts
from verify.report.tables import markdown, markdown_text
from workflows.inspect_checkpoint import headroom


def model_card(task: Task, checks: Sequence[Check], facts: Mapping[str, str]) -> str:
    """The card as Markdown. `facts` are additional rows of its table (calibration data, tokens per expert)."""
    recipe, plan, source = task.recipe, task.plan, task.source
    groups = "; ".join(f"{name}: {s.name}, {len(plan.modules(name)):,} modules" for name, s in plan.groups.items())
    rows = {
        "source": recipe.source.checkpoint + (f" @ {recipe.source.revision}" if recipe.source.revision else ""),
        "family": plan.family.described,
        "quantized": groups,
        "parameters": f"{plan.parameters:,}",
        "size": f"{plan.output_bytes:,} bytes (source {source.total_bytes:,}), {plan.bits_per_parameter:.3f} bits per parameter",
        **({"input scales": headroom(plan.input_headroom)} if plan.input_headroom else {}),
        **facts,
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "plan": plan.digest,
    }
    verdicts = ", ".join(f"{level} {verdict}" for level, verdict in level_verdicts(checks).items())
    table = "\n".join(f"| {key} | {markdown_text(value)} |" for key, value in rows.items())
    front = {
        "base_model": recipe.source.checkpoint,
        "library_name": "vllm",
        "tags": ["nvfp4", "modelopt" if plan.dialect == NVIDIA.name else "compressed-tensors", "llm-compressor"],
    }
    yaml_text = dump_recipe(recipe).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", yaml_text)), default=0))
    body = markdown(checks) if checks else "Not verified yet: every level is UNCHECKED."
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()}
---

# {markdown_text(recipe.output.rstrip("/").rpartition("/")[2])}

Tensor names are the source's own. What is not quantized is byte-identical to the source.

| | |
|---|---|
{table}

## Verification: {verdicts}

{body}

## Recipe

{fence}yaml
{yaml_text}
{fence}
"""
