"""Repairs tracing, so that a traced block gets the causal mask that the model's own forward passes to it.

Stock llm-compressor loses the causal mask of models that write `mask_function = create_causal_mask if ... else ...`
(Mixtral, Qwen3-MoE, Mistral in transformers 5.17): the call is then not wrapped with its surroundings but becomes a
graph node, whose config argument is rebuilt from `config.to_dict()`. The rebuilt config lacks `_attn_implementation`,
so the mask function assumes SDPA and returns no mask, and eager attention runs without one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from compressed_tensors.utils import patch_attr
from llmcompressor.pipelines.sequential import helpers
from llmcompressor.pipelines.sequential.helpers import Subgraph
from llmcompressor.utils import helpers as contexts
from torch import nn
from torch.fx.node import Argument
from transformers.configuration_utils import PretrainedConfig


class ConfigKeepingTracer(helpers.SequentialTracer):  # type: ignore[misc]
    """llm-compressor's tracer, except that it passes on the model's config as the same object."""

    def create_arg(self, a: Any) -> Argument:
        """The representation of the argument `a` in the graph."""
        if isinstance(a, PretrainedConfig):
            for name, module in self.root.named_modules():
                for attribute, value in vars(module).items():
                    if value is a:
                        node: Argument = self.create_node("get_attr", f"{name}.{attribute}".lstrip("."), (), {})
                        return node
        argument: Argument = super().create_arg(a)
        return argument


@contextmanager
def _eval_mode_kept() -> Iterator[None]:
    # `build_skeleton` has set it for good. llm-compressor would set it four times, each for 94,000 modules of a DeepSeek-V4-Pro:
    # 0.3 CPU-s.
    with patch_attr(contexts, "eval_context", nullcontext):
        yield


@contextmanager
def forward_context(model: nn.Module) -> Iterator[None]:
    """llm-compressor's `calibration_forward_context` of a SourceModel's model, which is in eval mode and stays so."""
    with _eval_mode_kept(), contexts.calibration_forward_context(model):
        yield


@contextmanager
def repaired_tracing() -> Iterator[None]:
    """Inside, llm-compressor's trace_subgraphs uses the repaired tracer."""
    with patch_attr(helpers, "SequentialTracer", ConfigKeepingTracer), _eval_mode_kept(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not reference an nn.Module.*")
        yield


def called_modules(subgraph: Subgraph, model: nn.Module) -> list[nn.Module]:
    """The modules that a subgraph calls, and the owners of the tensors that it reads directly."""
    found: dict[nn.Module, None] = {}
    for node in subgraph.graph.nodes:
        if node.op == "call_module":
            found[model.get_submodule(node.target)] = None
        elif node.op == "get_attr":
            owner = model.get_submodule(node.target.rpartition(".")[0])
            # Constants that tracing met are attributes of the model, and no tensors of it.
            if any(node.target.rpartition(".")[2] in own for own in (owner._parameters, owner._buffers)):
                found[owner] = None
    return list(found)
