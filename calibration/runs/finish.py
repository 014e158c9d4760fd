"""What makes an output's shards a checkpoint, however they were written: side files, recipe, config, and the index last."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from calibration.checkpoint.files import write_json, write_safely, write_text
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from calibration.checkpoint.side_files import side_files
from calibration.plan.plan import Plan
from calibration.plan.quantization_config import output_config

#: The model card, which is the output's own.
CARD_NAME = "README.md"


def finish_output(plan: Plan, source: Checkpoint, output: Path, recipe_text: str) -> list[str]:
    """Writes the source's side files, recipe.yaml and config.json, and the index last: from then on the checkpoint in
    `output` loads. Returns the files that it wrote, relative to the output."""
    copied = [(path, str(path.relative_to(source.directory))) for path in side_files(source.directory).copied]
    for path, name in copied:
        write_safely(output / name, functools.partial(shutil.copyfile, path), path.stat().st_size)
    write_text(output / "recipe.yaml", recipe_text)
    write_json(output / CONFIG_NAME, output_config(plan, source.config))
    index = {
        "metadata": {"total_size": plan.output_bytes},
        "weight_map": dict(sorted(plan.weight_map.items())),
    }
    write_json(output / INDEX_NAME, index)
    return [*(name for _, name in copied), "recipe.yaml", CONFIG_NAME, INDEX_NAME]
