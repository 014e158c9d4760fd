"""What of a quantized weight follows from source and recipe alone.

This is an allow-list: a modifier or an argument that is not named here is not taken for round to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from recipes.schema import Recipe

_ROUNDS = "QuantizationModifier"
#: Modifiers whose factors are exact in the output's norms: weights are derived with them.
SMOOTHS = ("SmoothQuantModifier", "AWQModifier")
#: Observers that take a weight's group scales from the extremes of its groups.
_EXTREMES = frozenset({"memoryless-minmax", "static-minmax", "minmax"})
#: Arguments of QuantizationModifier that do not touch weights.
_OF_INPUTS = frozenset({"input_observer", "output_observer", "bypass_divisibility_checks", "kv_cache_scheme"})


@dataclass(frozen=True)
class Basis:
    """`derived`: scales and codes follow from the source. `recorded`: the scales were chosen by a search, which is not
    repeated; the codes follow from the source and the scales as they are stored. `tuned`: the codes depend on data. `why` says
    what in the recipe makes it so."""

    kind: Literal["derived", "recorded", "tuned"]
    why: str = ""


def weight_basis(recipe: Recipe, group: str) -> Basis:
    """The basis of the weights of a config group."""
    if recipe.method != "calibrate":
        return Basis("derived")
    names = [entry.name for entry in recipe.modifiers]
    other = [name for name in names if name not in (_ROUNDS, *SMOOTHS)]
    if other or _ROUNDS not in names:
        return Basis("tuned", (other or names)[0])
    observers, unknown = _observers(recipe, group)
    if unknown:
        return Basis("tuned", f"QuantizationModifier with {', '.join(unknown)}")
    searching = [name for name in observers if name not in _EXTREMES]
    return Basis("recorded", f"weight observer {searching[0]}") if searching else Basis("derived")


def _observers(recipe: Recipe, group: str) -> tuple[list[str], list[str]]:
    """The observers that the recipe names for the weights of a group, and the arguments that are not known here."""
    modifier = recipe.quantization_modifier
    named: list[Any] = []
    unknown = []
    for key, value in modifier.arguments.items():
        if value is None or key in _OF_INPUTS:
            continue
        if key == "weight_observer":
            named.append(value)
        elif key == "observer" and isinstance(value, dict):
            named.append(value.get("weights"))
        else:
            unknown.append(key)
    written = (modifier.config_groups[group].weights if group in modifier.config_groups else None) or {}
    named.append(written.get("observer"))
    unknown += [key for key in written if key in ("observer_kwargs", "actorder") and written[key]]
    return [str(name).lower().replace("_", "-").replace(" ", "-") for name in named if name], unknown
