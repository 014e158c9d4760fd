"""Registers this engine with llm-compressor as a pipeline, which executes one CalibrationRun."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.utils.helpers import DisableQuantization
from torch import nn
from torch.utils.data import DataLoader

from calibration.data.padding import without_padding
from calibration.engine.activations import ActivationCache
from calibration.engine.attachment import BlockQuantizationModifier, link_fused
from calibration.engine.gptq import StreamingGPTQModifier
from calibration.engine.guards import require_mappings_inside_blocks, require_routing
from calibration.engine.passes import Passes
from calibration.engine.run import CalibrationRun
from calibration.engine.smoothing import SAMPLE
from calibration.engine.walk import Walk
from calibration.model.parity import parity_samples
from calibration.model.tracing import forward_context
from recipes.errors import RecipeError

PIPELINE = "streaming_sequential"

_current: ContextVar[CalibrationRun] = ContextVar("calibration run")


@CalibrationPipeline.register(PIPELINE)
class StreamingSequentialPipeline(CalibrationPipeline):  # type: ignore[misc]
    """The registered pipeline; `oneshot(pipeline=PIPELINE)` executes the run that `current` has set."""

    @staticmethod
    def __call__(model: nn.Module, dataloader: DataLoader[Any], dataset_args: Any) -> None:
        """Called by oneshot with its model, the batches and its DatasetArguments."""
        _execute(_current.get(), dataloader, dataset_args.tracing_ignore)


@contextmanager
def current(run: CalibrationRun) -> Iterator[None]:
    """Inside, the pipeline that llm-compressor calls executes `run`."""
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


def _execute(run: CalibrationRun, dataloader: DataLoader[Any], tracing_ignore: list[str]) -> None:
    """Calibrates every block. Raises ParityError, SourceError (non-finite values), WorkflowError (scales)."""
    started, model = time.monotonic(), run.source.model
    with ExitStack() as stack:
        scratch, lasting = (run.resume.activations, True) if run.resume else (run.scratch, False)
        cache = ActivationCache(run.source.device, scratch, run.max_host_memory, lasting)
        stack.enter_context(cache)
        stack.enter_context(run.memory)
        stack.callback(run.source.stop_prefetch)
        batches = tokens = 0
        for number, batch in enumerate(without_padding(dataloader)):
            if tokens < SAMPLE:
                run.sample = range(number + 1)
            batches, tokens = batches + 1, tokens + batch["input_ids"].numel()
            if run.experts.top_up is not None:
                run.experts.top_up.add_batch(batch["input_ids"], run.ranks.owns(number))
            if run.ranks.owns(number):
                cache.add(batch, number)
        if not len(cache):
            raise RecipeError("calibration: the data set yields no batch; give it more or longer samples")
        samples = parity_samples(cache)
        run.tell("trace", blocks=len(run.source.blocks), batches=batches)
        subgraphs = run.trace(samples[0], tracing_ignore)
        stack.enter_context(run.experts.installed())
        LifecycleCallbacks.calibration_start()
        if run.experts.top_up is not None:
            require_routing(run.source)
        require_mappings_inside_blocks(active_session().lifecycle.recipe.modifiers, run.source)
        named = model.named_modules(remove_duplicate=False)
        # Empty if all modifiers attach observers block by block.
        observed = {name: module for name, module in named if "weight_observer" in module._modules}
        link_fused([observed[name] for name in group if name in observed] for group in run.fused)
        gc.collect()  # tracing leaves reference cycles of graphs
        run.calibrating = True
        stack.enter_context(forward_context(model))
        stack.enter_context(DisableQuantization(model))
        session = active_session()
        session.state.loss_masks, session.state.sequential_prefetch = None, False
        modifiers = session.lifecycle.recipe.modifiers
        edits = not all(isinstance(modifier, QuantizationModifier) for modifier in modifiers)
        blockwise = [modifier for modifier in modifiers if isinstance(modifier, BlockQuantizationModifier)]
        dividing = [modifier for modifier in modifiers if isinstance(modifier, StreamingGPTQModifier)]
        head = model.get_output_embeddings()
        quantizes_head = is_module_quantized(head) or any(modifier.quantizes(head) for modifier in blockwise)
        Walk(Passes(run, cache, subgraphs, samples, quantizes_head), edits, blockwise, dividing).walk()
        LifecycleCallbacks.calibration_end()
        run.ranks.all_gather(
            "end", None
        )  # activations on a shared disk may only be removed after every rank has read them
    run.summary.blocks, run.summary.batches = len(run.source.blocks), batches
    run.summary.seconds = time.monotonic() - started
