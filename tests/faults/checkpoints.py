"""The good checkpoints that the faults spoil: DeepSeek-V4 and Qwen3-MoE with expert and attention weights in NVFP4, and an
untied dense model, all written by the real exporter; DeepSeek-V4 with a DSpark draft head, and V4.1, by the real conversion,
their MXFP4 values kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from calibration.checkpoint.direct import Buffer, digest
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import CONFIG_NAME
from calibration.plan.plan import Plan
from tests.converted import converting, run
from tests.exported import export, plan_of, recipe
from tests.models import deepseek_v4, deepseek_v41, standard
from tests.models.tokenizer import write_json

LINEAR = [r"re:.*layers\..*_proj$"]
ROUTED = [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"]
BASES = ("deepseek_v4", "qwen3_moe", "mistral", "deepseek_v4 dspark", "deepseek_v41")
#: Neither plain transformers nor vLLM on a CPU has code of these.
NOT_RUN = frozenset({"deepseek_v41"})


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
    elif base in ("deepseek_v4 dspark", "deepseek_v41"):
        if base == "deepseek_v41":
            deepseek_v41.write(source)
        else:
            deepseek_v4.write(source, "fp8_mxfp4", draft_blocks=3)
        made = converting(source, output, ROUTED, export={"kept": "plain" if base in NOT_RUN else "native"})
        run(made)
        plan, formats = plan_of(source, made)
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
