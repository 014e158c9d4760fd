"""The quantization schemes that this project can write and verify, in compressed-tensors' words (QuantizationArgs, 0.17
to 0.19)."""

from __future__ import annotations

from typing import Any

Arguments = dict[str, Any]

_FP4: Arguments = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16, "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
_FP8: Arguments = {"num_bits": 8, "type": "float", "symmetric": True}
#: Preset name -> arguments of the weights and of the inputs (None: inputs are not quantized).
ARGUMENTS: dict[str, tuple[Arguments, Arguments | None]] = {
    "NVFP4": (_FP4, {**_FP4, "dynamic": "local"}),
    "NVFP4A16": (_FP4, None),
    "FP8_BLOCK": (
        {**_FP8, "strategy": "block", "block_structure": [128, 128], "dynamic": False},
        {**_FP8, "strategy": "group", "group_size": 128, "dynamic": True},
    ),
}
#: Preset name -> storage format.
FORMATS = {
    "NVFP4": "nvfp4-pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "FP8_BLOCK": "float-quantized",
}
# The defaults of QuantizationArgs.
_DEFAULTS: Arguments = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
#: Observers of llm-compressor 0.14.0.1, which ignores case and reads `_` and spaces as `-`.
OBSERVERS = (
    *("memoryless-minmax", "static-minmax", "minmax", "memoryless-mse", "mse", "nvfp4-expanded-mse", "fouroversix"),
    *("imatrix-mse", "nvfp4-expanded-imatrix"),
)
#: Observers of this project, of weights alone (calibration/engine/weighted.py).
OWN_OBSERVERS = ("nvfp4-weighted", "nvfp4-mse", "nvfp4-four-six")


def has_input_scale(preset: str) -> bool:
    """Whether the inputs of a preset have a stored scale, which calibration determines; dynamic scales are computed
    during serving."""
    inputs = ARGUMENTS[preset][1]
    return inputs is not None and inputs["dynamic"] is not True


def preset_of(weights: Arguments, inputs: Arguments | None) -> str:
    """The preset with these arguments. Raises ValueError with the differences to the nearest preset."""
    nearest = "FP8_BLOCK" if weights.get("num_bits", 8) == 8 else "NVFP4" if inputs else "NVFP4A16"
    wanted_weights, wanted_inputs = ARGUMENTS[nearest]
    problems = list(_differences("weights", weights, wanted_weights))
    if wanted_inputs is not None:
        problems += _differences("input_activations", inputs or {}, wanted_inputs)
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(
            f"written out must be the arguments of {', '.join(ARGUMENTS)}, which are all that can be written and "
            f"verified; for {nearest} {shown}; `scheme: {nearest}` says it all"
        )
    return nearest


def is_observer(name: object) -> bool:
    """Whether llm-compressor or this project has an observer of this name."""
    return isinstance(name, str) and _dashed(name) in (*OBSERVERS, *OWN_OBSERVERS)


def is_own_observer(name: object) -> bool:
    """Whether an observer is this project's, and so of weights alone."""
    return isinstance(name, str) and _dashed(name) in OWN_OBSERVERS


def _dashed(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


def _free_problem(part: str, key: str, value: object) -> str | None:
    """The problem of an argument that only affects how values are computed, not what is stored; None if there is
    none."""
    if key == "observer" and value is not None and not is_observer(value):
        return f"must be one of {', '.join((*OBSERVERS, *OWN_OBSERVERS))}"
    if key == "observer" and part != "weights" and is_own_observer(value):
        return "must not be an observer that chooses group scales of weights"
    if key == "observer_kwargs" and not isinstance(value, dict | None):
        return "must be a mapping"
    if key == "actorder" and value not in (None, False, "weight", "static"):
        return "must be null, 'weight' or 'static'"
    return None


def _differences(part: str, given: Arguments, wanted: Arguments) -> list[str]:
    problems = []
    for key in dict.fromkeys((*wanted, *given)):
        value = given.get(key, _DEFAULTS.get(key))
        value = value.lower() if isinstance(value, str) and key in ("type", "strategy", "dynamic") else value
        # Missing storage types follow from the other arguments.
        free = key in ("scale_dtype", "zp_dtype") and value in (None, _FP4["scale_dtype"])
        if key in ("observer", "observer_kwargs", "actorder"):
            if problem := _free_problem(part, key, value):
                problems.append(f"{part}.{key} {problem}, is {str(value)[:40]!r}")
        elif not free and value != wanted.get(key):
            problems.append(f"{part}.{key} must be {wanted.get(key)!r}, is {str(value)[:40]!r}")
    return problems
