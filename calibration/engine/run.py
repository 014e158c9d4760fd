"""The settings and state of one calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from torch import nn

from calibration.engine.experts import ExpertCalibration
from calibration.engine.results import CalibrationSummary, Callbacks
from calibration.engine.smoothing import Smoother
from calibration.model import tracing
from calibration.model.source_model import SourceModel
from calibration.model.tracing import called_modules
from calibration.runs.memory import PeakMemory
from calibration.runs.ranks import Ranks
from calibration.runs.resume import Resume
from recipes.errors import WorkflowError


@dataclass
class CalibrationRun:
    """The settings and state of one run of the pipeline.

    `fused` are groups of transformers module names that must share a weight global scale; `scratch` holds activations
    beyond `max_host_memory` bytes. With `resume`, the blocks it names are skipped and every boundary is saved. Each of
    several `ranks` takes its own batches, and the weights of the modules (source names) that `owners` assigns to it.
    """

    source: SourceModel
    callbacks: Callbacks
    scratch: Path
    fused: Sequence[tuple[str, ...]] = ()
    min_tokens_per_expert: int = 1
    max_host_memory: int | None = None
    resume: Resume | None = None
    ranks: Ranks = field(default_factory=Ranks)
    owners: Mapping[str, int] = field(default_factory=dict)
    #: Smooths each block before its layers are observed.
    smoother: Smoother | None = None
    #: Numbers of the batches that the smoother sees.
    sample: range = range(0)
    experts: ExpertCalibration = field(default_factory=ExpertCalibration)
    summary: CalibrationSummary = field(default_factory=CalibrationSummary)
    memory: PeakMemory = field(default_factory=PeakMemory)
    #: Whether the modifiers were accepted and the forward passes have started.
    calibrating: bool = False

    def tell(self, event: str, **facts: Any) -> None:
        """Reports an event of the calibration through `on_progress`."""
        self.callbacks.on_progress({"event": event, **facts})

    def trace(self, sample: dict[str, Any], ignore: list[str]) -> list[Subgraph]:
        """Traces the model with llm-compressor on one batch. Raises WorkflowError unless each block becomes its own
        subgraph."""
        blocks = list(self.source.blocks.values())
        try:
            with tracing.repaired_tracing():
                subgraphs = trace_subgraphs(self.source.model, sample, self.source.sequential_targets, ignore)
        except Exception as error:
            name = type(self.source.model).__name__
            raise WorkflowError(f"{name}: llm-compressor cannot trace this model: {str(error)[-600:]}") from error
        found = [self.blocks_in(subgraph) for subgraph in subgraphs]
        if [block for group in found for block in group] != blocks or any(len(group) > 1 for group in found):
            raise WorkflowError(
                f"{type(self.source.model).__name__}: tracing gave {len(subgraphs)} parts, not one for each of the "
                f"{len(blocks)} blocks, in order; this model type is not supported"
            )
        return list(subgraphs)

    def blocks_in(self, subgraph: Subgraph) -> list[nn.Module]:
        """The blocks that a subgraph calls: one, or none before the first block and after the last."""
        blocks = set(self.source.blocks.values())
        return [module for module in called_modules(subgraph, self.source.model) if module in blocks]
