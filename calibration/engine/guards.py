"""Checks of a calibration: mappings stay inside a block, every input was observed, values are finite, every scale was
computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.observers import ACTIVATION_OBS
from torch import nn

from calibration.checkpoint.dequantize import is_finite, is_positive
from calibration.model.source_model import SourceModel
from recipes.errors import RecipeError, WorkflowError, collapsed


def require_mappings_inside_blocks(modifiers: Iterable[Any], source: SourceModel) -> None:
    """Raises RecipeError if AWQ or SmoothQuant would scale a layer against layers that are not in memory with it."""
    problems = []
    for modifier in modifiers:
        for attribute in ("_resolved_mappings", "resolved_mappings_"):
            for mapping in getattr(modifier, attribute, None) or ():
                names = [source.module_name(m) for m in (mapping.smooth_layer, *mapping.balance_layers)]
                owners = {next((b for b in source.blocks if f"{n}.".startswith(f"{b}.")), n) for n in names}
                if len(owners) > 1:
                    problems.append(
                        f"{type(modifier).__name__}: the mapping {names[0]} -> {names[1]} crosses blocks; blocks "
                        "are calibrated one at a time, so give `mappings` that stay inside a block"
                    )
    if problems:
        raise RecipeError(collapsed(problems))


def require_routing(source: SourceModel) -> None:
    """Raises RecipeError if experts of the model are called without what the router chose (Llama 4), so that nobody knows
    which tokens they saw."""
    for name, module in source.model.named_modules():
        if isinstance(module, LinearExperts2D) and type(module).forward is not LinearExperts2D.forward:
            raise RecipeError(
                f"calibration.experts: topped_up counts the tokens of each expert, and {type(source.model).__name__} calls "
                f"{name} without its router's choice; use `experts: all`"
            )


def require_statistics(quantized: Mapping[str, nn.Module], where: str) -> None:
    """Raises RecipeError if an activation observer saw nothing. Must run before the scales are computed, which drops
    the statistics. Stock llm-compressor logs a warning and keeps an uninitialized scale."""
    blind = [
        name
        for name, module in quantized.items()
        for base in ACTIVATION_OBS
        if (observer := getattr(module, f"{base}_observer", None)) is not None and not observer.has_statistics
    ]
    if blind:
        more = f" and {len(blind) - 4} more" if len(blind) > 4 else ""
        raise RecipeError(
            f"{where}: no calibration token reached {', '.join(blind[:4])}{more}; their input scales would be "
            "arbitrary: for routed experts set `calibration.experts: all`, or use more samples; add other layers to "
            "ignore, their model does not run them as one matrix product"
        )


def require_scales(quantized: Mapping[str, nn.Module], where: str) -> None:
    """Raises WorkflowError that lists every scale and global scale that is not finite and positive."""
    problems = []
    for name, module in quantized.items():
        for leaf, scale in module.named_parameters(recurse=False):
            if leaf.endswith("_scale") and not is_positive(scale):
                value = scale.float()
                bad = value[~(torch.isfinite(value) & (value > 0))]
                problems.append(f"{where}: {name}.{leaf}: {bad[0].item()} is not a finite positive scale")
    if problems:
        raise WorkflowError(collapsed(problems))


def first_non_finite(modules: Iterable[tuple[str, nn.Module]], forward: Callable[[], Any]) -> str | None:
    """Runs `forward`. Returns the name of the first of `modules` whose output contains NaN or Inf; None if there is
    none."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else (output,)
            if not all(is_finite(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
