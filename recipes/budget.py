"""The section `budget` of a recipe: how large the output may be, and the schemes among which each layer's is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator

from recipes.fields import Section, did_you_mean
from recipes.modifiers import quantization_entries
from recipes.schemes import ARGUMENTS

#: The candidate that leaves a layer as it is in the source, or undoes its stored form.
UNQUANTIZED = "bfloat16"
CANDIDATES = (*ARGUMENTS, UNQUANTIZED)


def _check_candidate(name: str) -> str:
    known = {candidate.upper(): candidate for candidate in CANDIDATES}
    if name.upper() not in known:
        raise ValueError(f"is no scheme that can be written{did_you_mean(name, CANDIDATES)}")
    return known[name.upper()]


Candidate = Annotated[
    str, AfterValidator(_check_candidate), WithJsonSchema({"type": "string", "enum": list(CANDIDATES)})
]


class Budget(Section):
    """The modules that the modifier names get, each, the candidate that loses least within the size."""

    bits_per_parameter: float = Field(gt=0, le=32, allow_inf_nan=False)
    """Largest size of the output: the bits of all stored tensors, scales and what stays unquantized included, for each
    parameter of the source. inspect_checkpoint prints the same figure."""
    candidates: list[Candidate] = Field(default=["NVFP4", "FP8_BLOCK", UNQUANTIZED], min_length=2)
    """What a module, or modules that vLLM serves as one, may become: schemes, and bfloat16 (left in the source's dtype)."""
    tokens: int = Field(default=512, ge=64, le=65_536)
    """Tokens of the calibration text by which the candidates are judged."""

    @field_validator("candidates")
    @classmethod
    def _some_scheme_once(cls, candidates: list[str]) -> list[str]:
        twice = [name for at, name in enumerate(candidates) if name in candidates[:at]]
        if twice:
            raise ValueError(f"name {twice[0]} twice; remove one")
        return candidates


def budget_problem(budget: Budget, beside: Mapping[str, Any]) -> str | None:
    """What `beside` the budget, other validated keys of the recipe, contradicts it; None if nothing does."""
    method, export = beside.get("method"), beside.get("export")
    if method not in (None, "calibrate"):
        return f"candidates are judged on calibration text, and method {method!r} has none; remove it, or use calibrate"
    if export is not None and export.dialect == "nvidia" and "FP8_BLOCK" in budget.candidates:
        return "candidates: FP8_BLOCK beside NVFP4 has no form in export.dialect: nvidia; remove one of them"
    for entry in quantization_entries(beside.get("modifiers", [])):
        for name, group in entry.config_groups.items():
            if group.scheme is None:
                return f"chooses schemes by name, and {name} has its arguments written out; give it a scheme"
            if group.scheme not in budget.candidates:
                return f"candidates: {group.scheme} of {name} is none of them; add it, or give {name} another scheme"
    return None
