"""The good checkpoints that the faults spoil: DeepSeek-V4 and Qwen3-MoE with expert and attention weights in NVFP4, and an
untied dense model, all written by the real exporter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from calibration.checkpoint.direct import Buffer, digest
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import CONFIG_NAME
from calibration.plan.plan import Plan
from tests.exported import export, recipe
from tests.models import deepseek_v4, standard
from tests.models.tokenizer import write_json

LINEAR = [r"re:.*layers\..*_proj$"]
BASES = ("deepseek_v4", "qwen3_moe", "mistral")


@dataclass(frozen=True)
class Good:
    """A good checkpoint: where it is, its plan and source, and the digests of its shards as a run would journal them."""

    directory: Path
    plan: Plan
    source: Formats
    digests: dict[str, str]


def make(base: str, directory: Path) -> Good:
    """Writes source and output of a base into the new `directory`."""
    source, output = directory / "source", directory / "output"
    if base == "deepseek_v4":
        deepseek_v4.write(source, "fp8_mxfp4")
        # Requantized, as a source in FP8 alone would be: exact weights leave less to spoil.
        plan, formats = export(source, output, recipe(source, output, export={"mxfp4": "requantize"}))
    else:
        standard.write(source, base)  # type: ignore[arg-type]
        plan, formats = export(source, output, recipe(source, output, LINEAR))
        _as_llm_compressor_says_it(output)
    digests = {shard.name: digest(shard, Buffer(2**20)) for shard in sorted(output.glob("*.safetensors"))}
    return Good(output, plan, formats, digests)


def _as_llm_compressor_says_it(output: Path) -> None:
    """The config group of a recipe with `targets: Linear` and an ignore list, which means the same modules."""
    config = json.loads((output / CONFIG_NAME).read_text())
    config["quantization_config"]["config_groups"]["experts"]["targets"] = ["Linear"]
    config["quantization_config"]["ignore"] = ["lm_head", r"re:.*mlp\.gate$"]
    write_json(output / CONFIG_NAME, config)
