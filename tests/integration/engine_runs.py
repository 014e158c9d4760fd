"""What the engine's tests share: one run of our engine, one run of stock llm-compressor, on the same batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from llmcompressor import oneshot as stock_oneshot
from llmcompressor.core import create_session
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4PreTrainedModel

from calibration.checkpoint.formats import Formats
from calibration.data.padding import without_padding
from calibration.engine.oneshot import calibrate, quiet
from calibration.engine.results import BlockResult, CalibrationSummary, Callbacks
from calibration.families.registry import open_source
from calibration.model.skeleton import build_skeleton
from calibration.model.source_model import SourceModel
from calibration.plan.planner import make_plan
from calibration.plan.task import Task
from calibration.runs.row_invariance import try_products
from recipes.schema import Recipe
from tests.models import any_family, deepseek_v4, standard
from tests.uneven import ROUNDED, install_if_asked

STANDARD = ("llama", "qwen3", "mistral", "qwen3_moe", "mixtral")
STORED = ("bf16", "fp8", "fp8_mxfp4")
#: NVFP4 linear layers of each family, as the source spells them.
TARGETS = {
    "deepseek_v4": r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$",
    "mixtral": r"re:.*\.(experts\.\d+\.w[123]|[qkvo]_proj)$",
    "other": r"re:.*\.layers\..*_proj$",
}
Scales = dict[str, torch.Tensor]

# On a busy machine with few cores OpenMP's waiting threads cost ten times the work.
torch.set_num_threads(1)
install_if_asked()


@cache
def _root() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="engine-models-")


@cache
def model_directory(name: str) -> Path:
    """A tiny checkpoint: a family of tests.models.standard or any_family, or a stored format of tests.models.deepseek_v4."""
    directory = Path(_root().name) / name
    if name in STANDARD:
        return standard.write(directory, name)
    if name in any_family.FAMILIES:
        return any_family.write(directory, name)
    # No ragged FP8 tiles: transformers cuts 160 rows with 2 tile scales into 80 + 80 rows, the format says 128 + 32.
    return deepseek_v4.write(directory, name, o_lora_rank=64)


def family(name: str) -> str:
    """Key into TARGETS."""
    return "deepseek_v4" if name in STORED else name if name == "mixtral" else "other"


def batches(count: int = 3, size: int = 2, tokens: int = 40, seed: int = 0) -> DataLoader[dict[str, torch.Tensor]]:
    """Random tokens; the last sample of the last batch is padded by a quarter on the right."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        {
            "input_ids": torch.randint(2, 1024, (size, tokens), generator=generator),
            "attention_mask": torch.ones(size, tokens, dtype=torch.long),
        }
        for _ in range(count)
    ]
    if made:
        made[-1]["attention_mask"][-1, -tokens // 4 :] = 0
    return loader(made)


def loader(made: Iterable[dict[str, torch.Tensor]]) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches as they are, in the form that llm-compressor takes."""
    return DataLoader(list(made), batch_size=None)  # type: ignore[arg-type]


@dataclass
class Run:
    """A finished run of our engine: scales and weights by `<source module>.<parameter>`."""

    summary: CalibrationSummary
    source: SourceModel
    parameters: Scales = field(default_factory=dict)
    results: list[BlockResult] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def scales(self) -> Scales:
        return {name: value for name, value in self.parameters.items() if name.endswith("_scale")}


def recipe(name: str, modifiers: list[dict[str, Any]] | None = None, **sections: Any) -> Recipe:
    """A recipe for a tiny model; `sections` are merged over the defaults."""
    groups = {"group": {"targets": [TARGETS[family(name)]], "scheme": "NVFP4"}}
    content = {
        "source": {"checkpoint": str(model_directory(name))},
        "output": str(Path(_root().name) / "out"),
        "modifiers": modifiers or [{"QuantizationModifier": {"config_groups": groups}}],
        "calibration": {"dataset": "bundled"},
        "export": {"kept": "plain", "mxfp4": "requantize"},  # stock knows nothing else
    }
    return Recipe.model_validate(content | sections)


def skeleton(name: str) -> SourceModel:
    return build_skeleton(Formats(open_source(model_directory(name))), Path(_root().name) / f"{name}.run", False)


def ours(
    chosen: Recipe,
    source: SourceModel,
    data: DataLoader[Any] | None = None,
    watch: Callable[[BlockResult], None] = lambda result: None,
) -> Run:
    """Runs our engine."""
    formats = source.formats
    run = Run(CalibrationSummary(), source)

    def on_block(result: BlockResult) -> None:
        watch(result)
        run.results.append(result)
        for module, linear in result.modules.items():
            for leaf, value in linear.named_parameters(recurse=False):
                run.parameters[f"{module}.{leaf}"] = value.data.clone()

    task = Task.of(chosen, formats)
    scratch = Path(_root().name) / "scratch"
    callbacks = Callbacks(on_block, run.events.append)
    run.summary = calibrate(task, source, batches() if data is None else data, callbacks, scratch)
    return run


def stock_model(name: str) -> PreTrainedModel:
    """transformers' own load (which dequantizes by itself) with linearized experts, weights in BF16 but for what the
    source stores in F32 beside the norms."""
    kept = [part for part in DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict if "norm" not in part]
    with ExitStack() as stack:
        stack.enter_context(patch.object(DeepseekV4PreTrainedModel, "_keep_in_fp32_modules_strict", kept))
        stack.enter_context(quiet(lambda event: None))
        model = AutoModelForCausalLM.from_pretrained(
            model_directory(name), dtype=torch.bfloat16, attn_implementation="eager"
        )
        model.config.text_config = model.config.get_text_config()  # asked for by its linearization of Llama-4
        linearize_moe(model)
    return model.eval()


def stock(
    name: str, source: SourceModel, modifiers: Sequence[Modifier] | None = None, data: DataLoader[Any] | None = None
) -> Scales:
    """Parameters that stock llm-compressor's oneshot with its own sequential pipeline leaves behind, under the source's
    names: scales and weights of the quantized linear layers, weights of all other modules. It is given the rows without
    their padding, which it would observe."""
    model = stock_model(name)
    # oneshot refuses the quantized config that the checkpoint has on disk.
    model.config.name_or_path = source.model.config.name_or_path
    names = {transformers: name for name, transformers in source.model_modules().items()}
    wanted = make_plan(source.formats.checkpoint, source.formats, recipe(name)).quantized
    ignore = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ignore = [module for module in ignore if names[module] not in wanted]
    chosen = [QuantizationModifier()] if modifiers is None else list(modifiers)
    chosen[-1] = type(chosen[-1])(targets=["Linear"], scheme="NVFP4", ignore=ignore)
    with ExitStack() as stack:
        stack.enter_context(create_session())
        stack.enter_context(quiet(lambda event: None))
        stack.enter_context(patch.object(IntermediatesCache, "pin_memory", lambda *_, **__: None))
        stock_oneshot(
            model=model,
            recipe=chosen,
            dataset=loader(without_padding(batches() if data is None else data)),
            pipeline="sequential",
            processor=object(),
        )
    return {
        f"{names[module]}.{leaf}": value.data
        for module, linear in model.named_modules()
        if module in names
        for leaf, value in linear.named_parameters(recurse=False)
    }


def differing(left: Scales, right: Scales) -> list[str]:
    """Names that only one has, or whose values differ in any bit."""
    return sorted(left.keys() ^ right.keys()) + [
        name for name in left.keys() & right.keys() if not torch.equal(left[name], right[name])
    ]


def even_products(run: Run) -> bool:
    """Whether a row's product does not depend on the number of rows, for the quantized layers of a run: where it does,
    experts that see their routed tokens alone are equal to stock's, which see all of them, up to rounding."""
    return try_products(value.shape for name, value in run.parameters.items() if name.endswith(".weight")).row_invariant


def differing_from_stock(run: Run, theirs: Scales) -> list[str]:
    """Names of scales that only one has, or whose values differ: in any bit, or, of input global scales where products are
    uneven, by more than three BF16 roundings; these are counted and printed."""
    names, even = differing(run.scales, theirs), even_products(run)
    off = {
        name: abs(float(run.scales[name] / theirs[name]) - 1)
        for name in names
        if not even and name.endswith(".input_global_scale") and name in run.scales and name in theirs
    }
    if off:
        print(
            f"{len(off)} of {len(theirs)} scales are not stock's bit for bit, the farthest by {max(off.values()):.2%}"
        )
    return [name for name in names if off.get(name, 1) > ROUNDED]


def require_equal_but_for_rounding(one: Run, two: Run, blocks: Collection[int]) -> None:
    """Input global scales of `blocks` are within three BF16 roundings, and each expert has the same number of tokens. Where a
    row's product depends on the number of rows, roundings add up after the first block: one token in a hundred may take
    another expert, and the extremes of one in a hundred layers be up to six roundings away; what differs is printed."""
    drifts, tokens, moved, modules, far = not even_products(one), 0, 0, 0, []
    for mine, other in zip(one.results, two.results, strict=True):
        if mine.block not in blocks:
            continue
        counts = Counter(mine.tokens_per_expert)
        away_now = (Counter(other.tokens_per_expert) - counts).total()
        assert not away_now or (drifts and mine.block), (mine.block, away_now)
        tokens, moved, modules = tokens + counts.total(), moved + away_now, modules + len(mine.modules)
        for module in mine.modules:
            scale = f"{module}.input_global_scale"
            away = abs(float(two.scales[scale] / one.scales[scale]) - 1)
            if away > ROUNDED:
                assert drifts and mine.block and away <= 2 * ROUNDED, (scale, away)
                far.append(scale)
    print(f"{moved} of {tokens} tokens with another expert, {len(far)} of {modules} extremes over three roundings away")
    assert modules and moved <= 0.01 * tokens and len(far) <= 0.01 * modules, far
