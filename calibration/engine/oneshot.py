"""Recipe -> llm-compressor's own oneshot call, run through the streaming sequential pipeline."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any

import tqdm  # type: ignore[import-untyped]
from compressed_tensors.offload.utils import as_single_threaded
from compressed_tensors.quantization import DynamicType, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.utils import patch_attr
from llmcompressor import oneshot
from llmcompressor.core import create_session
from llmcompressor.logger import configure_logger
from llmcompressor.modifiers import Modifier, ModifierFactory
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.observers import Observer
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from pydantic import ValidationError
from torch import accelerator
from torch.distributed import ReduceOp
from torch.utils.data import DataLoader

from calibration.checkpoint.collector import objects_frozen
from calibration.engine.attachment import BlockQuantizationModifier
from calibration.engine.exact import ExactWeights
from calibration.engine.experts import ExpertCalibration
from calibration.engine.gptq import StreamingGPTQModifier
from calibration.engine.pipeline import PIPELINE, current
from calibration.engine.results import CalibrationSummary, Callbacks
from calibration.engine.run import CalibrationRun
from calibration.engine.smoothing import Smoother
from calibration.engine.topped_up import TopUp
from calibration.model.heap import reuse_freed_memory
from calibration.model.source_model import SourceModel
from calibration.plan.matching import resolved_targets
from calibration.plan.plan import Plan
from calibration.plan.task import Task
from calibration.runs.ranks import Ranks
from calibration.runs.resume import Resume
from calibration.runs.sharing import assign_owners
from recipes.errors import RecipeError
from recipes.modifiers import ConfigGroup
from recipes.schema import Recipe
from recipes.schemes import ARGUMENTS

#: The observer of activations: the extremes of all batches, whatever their order. llm-compressor's default for schemes
#: that name none is a moving average, which depends on it.
ACTIVATION_OBSERVER = "static_minmax"
#: Warnings of llm-compressor that say nothing about a run of this engine.
_NOISE = (
    "Calibration pipeline is set to",
    "No accelerator available!",
    "Disabling tokenizer parallelism",
    "Overriding weight observer for lower memory usage",
)


def calibrate(
    task: Task,
    source_model: SourceModel,
    batches: DataLoader[dict[str, Any]],
    callbacks: Callbacks,
    activations: Resume | Path,
    ranks: Ranks | None = None,
) -> CalibrationSummary:
    """Calibrates the modules that the task's plan quantizes with the recipe's modifiers, block by block.

    `batches` yields dicts of `input_ids` and `attention_mask` (int64 `[batch, tokens]`), the same at every iteration; what
    the mask rules out at the ends of a row reaches no block (calibration.data.padding).
    Activations beyond `offload.max_host_memory` go to a scratch directory, which is `offload.directory` or else
    `activations`; or, if that is a Resume, where it says, and stay there after an error; the blocks that it names as
    finished are left out. llm-compressor's bars and log lines are left out; its warnings become `log` events. Of several
    `ranks` all call this with the same arguments; see `calibration.runs.ranks` for what each does.
    Raises RecipeError for arguments that llm-compressor refuses and modifiers that cannot run block by block,
    SourceError for NaN and Inf, ParityError and WorkflowError for a calibration that would be wrong.
    """
    recipe, plan, ranks = task.recipe, task.plan, ranks or Ranks()
    calibration, resume = recipe.calibration, activations if isinstance(activations, Resume) else None
    scratch = activations.activations if isinstance(activations, Resume) else activations
    if calibration is None:
        raise RecipeError("calibration: is missing; `calibration: {dataset: bundled}` is the smallest")
    modifiers, owners = build_modifiers(task, source_model), assign_owners(plan, ranks.size)
    names = source_model.model_modules()
    for modifier in modifiers:
        if isinstance(modifier, StreamingGPTQModifier):
            modules = source_model.modules_of(owners)
            modifier.divide(ranks, {modules[name]: rank for name, rank in owners.items()})
    run = CalibrationRun(
        source=source_model,
        callbacks=callbacks,
        scratch=task.scratch or scratch,
        fused=[tuple(names[module] for module in group if module in names) for group in plan.fused],
        min_tokens_per_expert=calibration.min_tokens_per_expert,
        max_host_memory=recipe.offload.max_host_memory and recipe.offload.max_host_memory // ranks.local,
        resume=resume,
        ranks=ranks,
        owners=owners,
        experts=ExpertCalibration(TopUp(calibration.topped_up) if calibration.topped_up else None),
        smoother=None if recipe.smoothing is None else Smoother(plan, recipe.smoothing, source_model, ranks),
    )
    reuse_freed_memory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(objects_frozen())
        # llm-compressor's own way with ranks broadcasts what lies on accelerators alone, and hangs where an expert saw
        # a token on one rank and none on another: each rank runs it as if there were no other.
        stack.enter_context(as_single_threaded())
        stack.enter_context(create_session())
        stack.enter_context(current(run))
        stack.enter_context(quiet(callbacks.on_progress))
        # It replaces zero-centered norms by others, computed from weights that are not in memory yet, for modifiers that
        # scale a norm's weight. The model's own norms stay.
        entrypoint = importlib.import_module("llmcompressor.entrypoints.oneshot")
        stack.enter_context(patch_attr(entrypoint, "norm_calibration_context", contextlib.nullcontext))
        # The empty model has none left (calibration.model.linear_experts); to look for them again takes 0.8 CPU-s.
        stack.enter_context(patch_attr(entrypoint, "get_non_linearized_moes", lambda model: []))
        if not accelerator.is_available():
            # AWQ pins its cache, which fails without an accelerator and gains nothing there.
            stack.enter_context(patch_attr(IntermediatesCache, "pin_memory", lambda *_, **__: None))
        try:
            oneshot(
                model=source_model.model,
                recipe=modifiers,
                dataset=batches,
                pipeline=PIPELINE,
                moe_calibrate_all_experts=calibration.experts == "all",
                # The batches are tokens already; without an object here oneshot looks for a tokenizer.
                processor=object(),
            )
        except (ValueError, TypeError, AssertionError) as error:
            if run.calibrating:
                raise
            raise RecipeError(f"modifiers: llm-compressor refuses them: {error}") from error
    return run.summary


def build_modifiers(task: Task, source: SourceModel) -> list[Modifier]:
    """llm-compressor's modifiers of the recipe, their targets resolved to transformers' module names.

    Raises RecipeError, all at once, for arguments that llm-compressor does not take.
    """
    recipe, plan = task.recipe, task.plan
    problems: list[str] = []
    modifiers: list[Modifier] = []
    quantization = recipe.quantization_modifier
    others = quantization.name != QuantizationModifier.__name__
    if others and not ModifierFactory._loaded:
        # It imports every modifier with its packages (auto_round alone takes half a second), and prints what fails.
        with contextlib.redirect_stdout(io.StringIO()):
            ModifierFactory.refresh()
    create = partial(ModifierFactory.create, allow_registered=True, allow_experimental=False)
    for position, entry in enumerate(recipe.modifiers):
        if entry.smoothing is not None:  # calibration.engine.smoothing
            continue
        where, arguments = f"modifiers.{position}.{entry.name}", dict(entry.arguments)
        try:
            if position == quantization.position:
                groups = _schemes(quantization.config_groups, source, plan, _is_pinned(recipe))
                arguments = quantization.arguments | {"config_groups": groups}
            if arguments.pop("quantized_inputs", False):
                modifiers.append(StreamingGPTQModifier(**arguments))
            else:
                modifiers.append(create(entry.name, **arguments) if others else _blockwise(arguments, task, source))
        except ValidationError as error:
            problems += [
                f"{where}.{'.'.join(map(str, detail['loc']))}: {detail['msg']}".replace(".:", ":")
                for detail in error.errors()
            ]
        except Exception as error:  # whatever an optional package or a validator of llm-compressor raises
            problems.append(f"{where}: llm-compressor refuses it: {error}")
    if problems:
        raise RecipeError(problems)
    return modifiers


def require_divisible(recipe: Recipe) -> None:
    """Raises RecipeError, naming modifier and observer, for what several ranks would not calibrate to the same bytes.

    Extremes are the same in any order; averages and sums of floating-point numbers depend on which rank saw what.
    """
    problems = []
    for position, entry in enumerate(recipe.modifiers):
        where = f"modifiers.{position}.{entry.name}"
        if entry.name == "SmoothQuantModifier":
            continue
        if entry.name == "GPTQModifier" and not entry.arguments.get("quantized_inputs"):
            problems.append(
                f"{where}: sums over all samples, and floating-point sums depend on their order; with `quantized_inputs: true` "
                "it keeps one order"
            )
            continue
        if entry.name == "GPTQModifier" and recipe.calibration is not None and recipe.calibration.topped_up:
            problems.append(f"{where}: sums over all samples, and topped_up adds tokens in another order")
            continue
        if entry.name not in ("QuantizationModifier", "GPTQModifier"):
            problems.append(f"{where}: sums over all samples, and floating-point sums depend on their order")
            continue
        groups = {
            name: _scheme(group, ["Linear"], _is_pinned(recipe))
            for name, group in recipe.quantization_modifier.config_groups.items()
        }
        known = recipe.quantization_modifier.arguments.items()
        arguments = {key: value for key, value in known if key in QuantizationModifier.model_fields}
        resolved = QuantizationModifier(**arguments, config_groups=groups).resolved_config.config_groups
        for name, scheme in resolved.items():
            for part in ("weights", "input_activations", "output_activations"):
                args = getattr(scheme, part)
                if args is None or args.dynamic is True:
                    continue
                observer = args.observer or ("memoryless_minmax" if part == "weights" else "minmax")
                reductions = Observer.get_value_from_registry(observer)._act_sync_dict
                if part == "weights":
                    # llm-compressor lets weights be seen once, whatever average the observer would take.
                    divisible = observer in ("static_minmax", "minmax", "mse") or not reductions
                else:
                    divisible = bool(reductions) and set(reductions.values()) <= {ReduceOp.MIN, ReduceOp.MAX}
                if not divisible:
                    problems.append(f"{where}: {name}.{part}: observer {observer} depends on the order of the samples")
    if problems:
        raise RecipeError(
            [f"{problem}; more than one rank would give other bytes: start it without torchrun" for problem in problems]
        )


@contextlib.contextmanager
def quiet(on_progress: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """No bars and no log lines of llm-compressor inside; its warnings become `log` events, each text once."""
    original, told = tqdm.std.tqdm.__init__, set[str]()

    @wraps(original)
    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **(kwargs | {"disable": True}))

    def report(message: Any) -> None:
        text, level = message.record["message"], message.record["level"].name.lower()
        if level != "metric" and text not in told and not text.startswith(_NOISE):
            told.add(text)
            on_progress({"event": "log", "level": level, "message": text})

    logger.remove()
    sink = logger.add(report, level="WARNING", format="{message}", catch=False)
    try:
        with patch_attr(tqdm.std.tqdm, "__init__", disabled), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.remove(sink)
        configure_logger()


def _blockwise(arguments: dict[str, Any], task: Task, source: SourceModel) -> BlockQuantizationModifier:
    plan, exact = task.plan, ExactWeights(task)
    modules = source.modules_of(chain(plan.quantized, *plan.fused))
    modifier = BlockQuantizationModifier(**arguments)
    modifier.choose(
        {modules[name]: str(step.group) for name, step in plan.quantized.items()},
        [[modules[name] for name in group if name in modules] for group in plan.fused],
        lambda module: exact.scale(plan.quantized[source.source_module(source.module_name(module))]) is not None,
    )
    return modifier


def _schemes(
    groups: dict[str, ConfigGroup], source: SourceModel, plan: Plan, pinned: bool
) -> dict[str, QuantizationScheme]:
    names = source.model_modules()
    everything = [name for name, _ in source.model.named_modules()]
    wanted: dict[str, list[str]] = defaultdict(list)
    for module, step in plan.quantized.items():
        wanted[str(step.group)].append(names[module])
    schemes = {}
    for group, modules in wanted.items():
        schemes[group] = _scheme(groups[group], resolved_targets(modules, everything), pinned)
    return schemes


def _is_pinned(recipe: Recipe) -> bool:
    """Whether observers of activations are ours to choose where a group names none."""
    return not {"input_observer", "observer"} & recipe.quantization_modifier.arguments.keys()


def _scheme(given: ConfigGroup, targets: list[str], pinned: bool) -> QuantizationScheme:
    if given.scheme is not None:
        scheme = preset_name_to_scheme(given.scheme, targets)
    else:
        weights, inputs = ARGUMENTS[given.preset]
        arguments = {"targets": targets, "weights": weights | (given.weights or {})}
        if inputs is not None:
            arguments["input_activations"] = inputs | (given.input_activations or {})
        scheme = QuantizationScheme.model_validate(arguments)
    args = scheme.input_activations
    if pinned and args is not None and args.dynamic in (False, DynamicType.LOCAL):
        args.observer = (given.input_activations or {}).get("observer") or ACTIVATION_OBSERVER
    return scheme
