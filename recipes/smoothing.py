"""Arguments of the modifiers that smooth: AWQModifier and SmoothQuantModifier, in llm-compressor's words.

Both move part of the range of a layer's input channels into its weights, by factors that a norm or the projection before
it takes out again. `calibration.plan.smoothing` says which tensors that is, `calibration.engine.smoothing` does it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from recipes.fields import Ignored, Section, Target, Targets


class SmoothMapping(Section):
    """One choice of layers to smooth."""

    smooth_layer: Target
    """The layer that takes the factors out: a norm, v_proj or up_proj, as the source or transformers spells it."""
    balance_layers: Targets
    """The layers that read it and take the factors in; those left out here are added, or the output would be wrong."""


def _as_mapping(value: Any) -> Any:
    """SmoothQuant writes a mapping as [balance_layers, smooth_layer]."""
    if isinstance(value, list):
        if len(value) != 2:
            raise ValueError("must be [balance_layers, smooth_layer], or a mapping with these keys")
        return {"balance_layers": value[0], "smooth_layer": value[1]}
    return value


Mappings = list[Annotated[SmoothMapping, BeforeValidator(_as_mapping)]]


class SmoothingArguments(Section):
    """What both modifiers take."""

    mappings: Mappings | None = Field(default=None, min_length=1)
    """Layers to smooth, each a smooth_layer and its balance_layers. Left out: all that the model's structure allows."""
    ignore: Ignored = Field(default=[])
    """Names or 're:' expressions of smooth layers to leave alone."""


class SmoothQuantArguments(SmoothingArguments):
    """Arguments of SmoothQuantModifier: factors from a formula, without a search."""

    smoothing_strength: float = Field(default=0.5, ge=0, le=1)
    """0 leaves all the range in the inputs, 1 moves all of it into the weights."""


class AWQArguments(SmoothingArguments):
    """Arguments of AWQModifier: factors from a search for the smallest error of the quantized layers' outputs."""

    duo_scaling: bool | Literal["both"] = True
    """Factors from inputs and weights (true), from inputs alone (false), or whichever is better (both)."""
    n_grid: int = Field(default=20, ge=2, le=100)
    """Number of exponents that are tried."""


Smoothing = SmoothQuantArguments | AWQArguments
