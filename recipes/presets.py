"""The presets of a recipe: what `preset: fast` and `preset: best` stand for, chosen by measurement (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a preset adds to a recipe: `arguments` to the modifier that quantizes, which `modifier` then names, and the modifiers
    `before` it."""

    modifier: str = "QuantizationModifier"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[Mapping[str, Any], ...] = ()


_WEIGHTED = {"weight_observer": "nvfp4_weighted"}
PRESETS = {
    "fast": Preset(arguments=_WEIGHTED, before=({"SmoothQuantModifier": {"smoothing_strength": 0.5}},)),
    "best": Preset("GPTQModifier", _WEIGHTED | {"quantized_inputs": True}, before=({"AWQModifier": {"n_grid": 8}},)),
}


def expand(data: dict[str, Any]) -> dict[str, Any]:
    """The recipe `data` with what its preset stands for written out, and without the key; unchanged if it has none.

    Raises ValueError if the recipe says otherwise beside it. Data of a wrong type is left to the schema.
    """
    name = data.get("preset")
    preset = PRESETS.get(name) if isinstance(name, str) else None
    modifiers = data.get("modifiers")
    if preset is None or not isinstance(modifiers, list):
        return data
    if data.get("method", "calibrate") != "calibrate":
        raise ValueError(f"preset: {name} needs method 'calibrate', has {data['method']!r}; remove it")
    if len(modifiers) != 1 or not isinstance(modifiers[0], dict) or list(modifiers[0]) != ["QuantizationModifier"]:
        raise ValueError(
            f"preset: {name} chooses the modifiers; name the modules to quantize in one QuantizationModifier, or remove it"
        )
    arguments = modifiers[0]["QuantizationModifier"]
    if not isinstance(arguments, dict):
        return data
    said = [key for key, value in preset.arguments.items() if arguments.get(key, value) != value]
    if "weight_observer" in preset.arguments and "observer" in arguments:
        said.append("observer")
    if said:
        raise ValueError(f"preset: {name} sets {said[0]} of {preset.modifier}; remove one of them")
    made = [*map(dict, preset.before), {preset.modifier: {**arguments, **preset.arguments}}]
    return {key: value for key, value in data.items() if key != "preset"} | {"modifiers": made}
