"""Runs one batch through the embedding and one block of every kind before the long run: checks for finite values and
trace parity, and measures time and memory. Nothing is observed, quantized or kept."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.args import DatasetArguments
from llmcompressor.core import create_session
from llmcompressor.modeling.moe.context import moe_calibration_context

from calibration.data.padding import without_padding
from calibration.engine.activations import ActivationCache
from calibration.engine.experts import Pass
from calibration.engine.passes import Part, Passes
from calibration.engine.results import Callbacks
from calibration.engine.run import CalibrationRun
from calibration.forecast.speed import Spent, Watch
from calibration.model.source_model import SourceModel
from calibration.model.tracing import forward_context
from calibration.runs.memory import PeakMemory
from recipes.errors import EnvironmentProblem, SourceError, WorkflowError

#: Seconds after which the rehearsal starts no further kind of block.
SECONDS = 120.0


@dataclass(frozen=True)
class RehearsedBlock:
    """The measurements of one block: `blocks` are the numbers of all blocks of its kind; further the cost of loading
    its weights, and of the faster of two forward passes (the traced one and the model's own)."""

    block: int
    name: str
    blocks: tuple[int, ...]
    load: Spent
    forward: Spent
    parity: float


@dataclass
class Rehearsal:
    """The result of a rehearsal. `tokens` is the size of the batch; `boundary_bytes` the size of its activations
    between two blocks; `left_out` are the first blocks of the kinds for which there was no time; `peak_memory` is
    anonymous memory in bytes."""

    tokens: int
    blocks: list[RehearsedBlock] = field(default_factory=list)
    boundary_bytes: int = 0
    left_out: list[int] = field(default_factory=list)
    peak_memory: int = 0


def rehearse_blocks(
    source: SourceModel,
    batches: Iterable[dict[str, torch.Tensor]],
    all_experts: bool,
    scratch: Path,
    seconds: float = SECONDS,
) -> Rehearsal:
    """Runs the largest of `batches` through the traced embedding and the first block of every kind, in the order of the
    model; the blocks between them pass their input on. Weights are read as in calibration, and freed afterwards.

    Raises SourceError (values that are not finite, weights that cannot be read), ParityError, WorkflowError (a model
    that cannot be traced) and EnvironmentProblem (out of memory).
    """
    sample = max(without_padding(batches), key=lambda batch: batch["input_ids"].numel())
    rehearsal = Rehearsal(sample["input_ids"].numel())
    try:
        with PeakMemory() as memory:
            _walk(source, sample, all_experts, scratch, seconds, rehearsal)
            rehearsal.peak_memory = memory.take()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EnvironmentProblem(
            f"out of memory in the rehearsal, with one batch of {rehearsal.tokens} tokens: {error}; lower "
            "calibration.batch_size or calibration.max_seq_length"
        ) from None
    except Exception as error:  # a model's code raises what it likes of a config that does not fit it
        if isinstance(error, WorkflowError) or not _raised_by_the_model(error):
            raise
        raise SourceError(
            f"{source.formats.checkpoint.directory}: transformers' {type(source.model).__name__} fails on one batch: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; does config.json describe this model?"
        ) from error
    finally:
        source.unload([source.model])
    return rehearsal


def _raised_by_the_model(error: BaseException) -> bool:
    """Whether the innermost code that is not torch's is a model's of transformers, and none of this project's."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    last = next((file for file in reversed(files) if "/torch/" not in file), "")
    return "/transformers/" in last


def kinds(source: SourceModel) -> list[tuple[int, ...]]:
    """The numbers of equal blocks (by class, tensors with their shapes, and the config's attention type), kind by kind
    in the order of their first block."""
    types = getattr(source.model.config, "layer_types", None) or ()
    found: dict[Any, list[int]] = {}
    for number, block in enumerate(source.blocks.values()):
        tensors = {
            (re.sub(r"\.\d+\.", ".N.", name), tuple(tensor.shape)) for name, tensor in block.state_dict().items()
        }
        kind = (type(block), frozenset(tensors), types[number] if number < len(types) else None)
        found.setdefault(kind, []).append(number)
    return [tuple(numbers) for numbers in found.values()]


def _walk(
    source: SourceModel, sample: dict[str, Any], all_experts: bool, scratch: Path, seconds: float, into: Rehearsal
) -> None:
    run = CalibrationRun(source, Callbacks(on_block=lambda result: None), scratch)
    chosen = {numbers[0]: numbers for numbers in kinds(source)}
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(create_session())
        cache = stack.enter_context(ActivationCache(source.device, scratch))
        cache.add(sample)
        samples = {0: cache.fetch(0)}
        passes = Passes(run, cache, run.trace(samples[0], DatasetArguments().tracing_ignore), samples)
        stack.enter_context(run.experts.installed())
        stack.enter_context(forward_context(source.model))
        if all_experts:
            stack.enter_context(moe_calibration_context())
        number = 0
        for index in range(len(passes.subgraphs)):
            part = passes.part(index, number)
            if part.block is None and index:
                break
            last = into.blocks[-1] if into.blocks else None
            taken = time.monotonic() - began + (last.load.clock + last.forward.clock if last else 0)
            if number in chosen and last and taken > seconds:
                into.left_out += [first for first in chosen if first >= number]
                break
            facts = _step(passes, part, part.block is not None and number not in chosen)
            if part.block is None:
                continue
            if facts is not None:
                into.blocks.append(RehearsedBlock(number, part.name, chosen[number], *facts))
                into.boundary_bytes = max(into.boundary_bytes, cache.held_bytes)
            number += 1
            if number > max(chosen):
                break


def _step(passes: Passes, part: Part, skipped: bool) -> tuple[Spent, Spent, float] | None:
    """Runs one subgraph. Returns the cost of loading and of the forward pass, and the difference to the model's own
    forward. A `skipped` block is not loaded and passes its input on."""
    source, worst, watch = passes.run.source, 0.0, Watch()
    roots = [root for root in part.roots if not skipped or root is not part.block]
    source.load(roots)
    loaded = watch.lap()
    if part.index == 0:
        passes.record_own_calls()
    with ExitStack() as stack:
        stack.enter_context(passes.run.experts.running(Pass.REPEAT))
        if skipped and part.number is not None:
            stack.enter_context(patch_attr(part.block, "forward", passes.calls[0][part.number].skip))
            part = replace(part, block=None)
        watch.lap()
        for batch, outputs, passed in passes.forward(part, "rehearse"):
            forward = watch.lap()
            if passed is not None:
                passes.require_finite(replace(part, where=f"rehearsal of {part.where}"), passed.made, batch)
                watch.lap()
                worst = passes.check_parity(part, batch, passed)
                forward = min(forward, watch.lap(), key=lambda spent: spent.clock)
            passes.keep(part.index, batch, outputs)
    source.unload(roots)
    return None if part.block is None else (loaded, forward, worst)
