"""What follows from source and recipe alone is an allow-list: what it does not name is never taken for round to nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.modifiers import ModifierEntry
from recipes.schema import Recipe
from recipes.schemes import ARGUMENTS, OBSERVERS, OWN_OBSERVERS
from verify.proof.basis import weight_basis

_EXTREMES = {"memoryless-minmax", "static-minmax", "minmax"}


def basis(*modifiers: dict[str, Any], method: str = "calibrate") -> str:
    made = Recipe.model_validate(
        {"source": {"checkpoint": "a/b"}, "output": str(Path("o")), "modifiers": list(modifiers), "method": method}
        | ({"calibration": {"dataset": "bundled"}} if method == "calibrate" else {})
    )
    return weight_basis(made, "group_0").kind


def quantize(**arguments: Any) -> dict[str, Any]:
    return {"QuantizationModifier": {"targets": "Linear", "scheme": "NVFP4"} | arguments}


def test_every_modifier_but_round_to_nearest_is_tuned() -> None:
    for name in ModifierEntry.model_fields:
        made = Recipe.model_construct(method="calibrate", modifiers=[ModifierEntry.model_construct(_fields_set={name})])
        if name != "QuantizationModifier":
            assert weight_basis(made, "group_0").kind == "tuned", name


@pytest.mark.parametrize("observer", (*OBSERVERS, *OWN_OBSERVERS))
def test_an_observer_of_extremes_is_derived_every_other_recorded(observer: str) -> None:
    wanted = "derived" if observer in _EXTREMES else "recorded"
    assert basis(quantize(weight_observer=observer)) == wanted
    assert basis(quantize(weight_observer=observer.replace("-", "_").upper())) == wanted
    assert basis(quantize(observer={"weights": observer})) == wanted
    weights, inputs = ARGUMENTS["NVFP4"]
    written = {"weights": {**weights, "observer": observer}, "input_activations": inputs}
    groups = {"group_0": {"targets": "Linear", **written}}
    assert basis({"QuantizationModifier": {"config_groups": groups}}) == wanted


def test_observers_of_inputs_do_not_touch_weights_and_methods_without_data_are_derived() -> None:
    assert basis(quantize(input_observer="minmax", observer={"input": "mse"})) == "derived"
    assert basis(quantize(), method="convert") == "derived"
