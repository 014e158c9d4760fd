"""Models of llm-compressor's modifiers in a recipe.

Nothing here imports llm-compressor: its modifier names, argument names and preset schemes (in `recipes.fields`) are
written out, and `tests/unit/recipes/test_recipes.py` compares them with the installed package. The supported modifiers
are parsed completely; the others are refused by name, each with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_serializer, model_validator

from recipes.fields import (
    ActivationObserver,
    GroupName,
    Ignored,
    Observer,
    PassThrough,
    Scheme,
    Section,
    Targets,
    Text,
    did_you_mean,
)
from recipes.schemes import FORMATS, is_own_observer, preset_of
from recipes.smoothing import AWQArguments, Smoothing, SmoothQuantArguments

_WHOLE_MODEL = "transforms the weights of all blocks before calibration, and only one block is in memory at a time"
_PRUNES = "prunes weights, and the output's quantization scheme has no place for sparsity"
#: Arguments of modifiers that are this project's.
OWN_ARGUMENTS = {"quantized_inputs"}
#: Modifiers of llm-compressor that no run supports, and why.
REFUSED = {
    "LogarithmicEqualizationModifier": "is SmoothQuant with a formula that does not look at the weights, and loses to it; "
    "use SmoothQuantModifier",
    "SpinQuantModifier": _WHOLE_MODEL,
    "QuIPModifier": _WHOLE_MODEL,
    "AutoRoundModifier": "trains each block with forward passes of its own, which this engine does not feed",
    "SparseGPTModifier": _PRUNES,
    "WandaPruningModifier": _PRUNES,
    "MagnitudePruningModifier": _PRUNES,
    "ConstantPruningModifier": _PRUNES,
    "REAPPruningModifier": "removes experts, and the output keeps the source's tensors",
}


class ConfigGroup(Section):
    """Modules that are quantized the same way: a preset scheme, or the quantization arguments written out."""

    targets: Targets
    """Module names as the source checkpoint spells them; a regular expression begins with 're:'. Each must match."""
    scheme: Scheme | None = None
    """Preset scheme: NVFP4 (weights and activations), NVFP4A16 (weights only) or FP8_BLOCK (128x128 tiles)."""
    weights: PassThrough | None = Field(default=None, validate_default=True)
    """compressed-tensors QuantizationArgs of the weights, instead of a scheme; those of one of the presets."""
    input_activations: PassThrough | None = None
    """compressed-tensors QuantizationArgs of the inputs; only together with weights."""
    output_activations: PassThrough | None = None
    """Must be null: quantized outputs have no place in the output checkpoint."""
    format: Text | None = None
    """compressed-tensors storage format; that of the scheme, and derived from it when left out."""

    @field_validator("weights")
    @classmethod
    def _one_of_scheme_or_weights(cls, weights: PassThrough | None, info: ValidationInfo) -> PassThrough | None:
        if "scheme" in info.data and (weights is None) == (info.data["scheme"] is None):
            given = "neither" if weights is None else "both"
            raise ValueError(f"needs exactly one of 'scheme' and 'weights', has {given}; a preset is `scheme: NVFP4`")
        return weights

    @property
    def preset(self) -> str:
        """The preset scheme, also if its arguments are written out."""
        return self.scheme or preset_of(self.weights or {}, self.input_activations)

    @model_validator(mode="after")
    def _can_be_written(self) -> ConfigGroup:
        if self.output_activations is not None:
            raise ValueError("output_activations: quantized outputs have no place in the output checkpoint; remove it")
        if self.format not in (None, FORMATS[self.preset]):
            raise ValueError(f"format: of {self.preset} is {FORMATS[self.preset]}, not {self.format}; remove it")
        return self

    @field_validator("input_activations", "output_activations")
    @classmethod
    def _only_with_weights(cls, activations: PassThrough | None, info: ValidationInfo) -> PassThrough | None:
        if activations is not None and info.data.get("scheme") is not None:
            raise ValueError("the scheme already says this; remove it, or replace 'scheme' by 'weights' written out")
        return activations


class QuantizationArguments(Section):
    """Arguments of llm-compressor's QuantizationModifier: round to nearest with calibrated activation scales."""

    targets: Targets | None = None
    """Short form for a single group: the modules that `scheme` applies to. Instead of config_groups."""
    scheme: Scheme | None = None
    """Short form for a single group: its preset scheme. Instead of config_groups."""
    config_groups: dict[GroupName, ConfigGroup] | None = Field(default=None, min_length=1, validate_default=True)
    """Groups of modules by a name of your choice, each with its targets and its scheme."""
    ignore: Ignored = Field(default=[])
    """Module names or 're:' expressions to exclude although a target matches. One that matches nothing is only a
    note."""
    kv_cache_scheme: PassThrough | None = None
    """Must be null: the output has no place for scales of the key/value cache yet."""
    weight_observer: Observer | None = None
    """Observer of the weights: one of llm-compressor's, for example memoryless_minmax, memoryless_mse, imatrix_mse, or of this
    project's, which choose NVFP4 group scales: nvfp4_weighted (least error weighted by the mean square of the inputs),
    nvfp4_mse (least squared error), nvfp4_four_six (amax / 6 or amax / 4)."""
    input_observer: ActivationObserver | None = None
    """Observer of the input activations, for example static_minmax."""
    output_observer: ActivationObserver | None = None
    """Observer of the output activations."""
    observer: dict[Literal["weights", "input", "output"], Observer] | None = None
    """The observers together: {weights: ..., input: ..., output: ...}. Instead of the three keys above."""

    bypass_divisibility_checks: bool = False
    """Skip llm-compressor's check that the columns of a weight divide by the group size."""

    @field_validator("config_groups")
    @classmethod
    def _one_form(cls, groups: dict[str, ConfigGroup] | None, info: ValidationInfo) -> dict[str, ConfigGroup] | None:
        if not {"targets", "scheme"} <= info.data.keys():
            return groups
        short = [key for key in ("targets", "scheme") if info.data[key] is not None]
        if groups and short:
            raise ValueError(f"excludes {' and '.join(map(repr, short))} beside it; move them into a group")
        if len(short) == 1:
            raise ValueError("'targets' and 'scheme' go together; give both, or config_groups instead of them")
        return groups

    @field_validator("observer")
    @classmethod
    def _own_are_of_weights(cls, observers: dict[str, str] | None) -> dict[str, str] | None:
        for part, name in (observers or {}).items():
            if part != "weights" and is_own_observer(name):
                raise ValueError(f"{part}: {name} chooses group scales of weights; name it under weights")
        return observers

    @field_validator("kv_cache_scheme")
    @classmethod
    def _no_cache_scales(cls, scheme: PassThrough | None) -> None:
        if scheme is not None:
            raise ValueError("the output has no place for scales of the key/value cache yet; remove it")

    def groups(self) -> dict[str, ConfigGroup]:
        """The config groups; the short form `targets` + `scheme` becomes one group named group_0."""
        if self.targets is not None:
            return {"group_0": ConfigGroup(targets=self.targets, scheme=self.scheme)}
        return dict(self.config_groups or {})


class GPTQArguments(QuantizationArguments):
    """Arguments of llm-compressor's GPTQModifier: weights rounded so that the layer's output error is small."""

    block_size: JsonValue = None
    """Columns compressed in one pass (llm-compressor's default: 128)."""
    dampening_frac: JsonValue = None
    """Dampening of the Hessian as a fraction of its diagonal (llm-compressor's default: 0.01)."""
    actorder: JsonValue = None
    """Order in which columns are quantized: static, group, weight or null (llm-compressor's default: static)."""
    batched_quantization: JsonValue = None
    """Batching of modules of one shape: auto, a positive number, or null (llm-compressor's default: auto)."""
    quantized_inputs: bool = False
    """This project's: Hessians of the inputs as they are served, in NVFP4; one for every input that layers share (gate and up of
    all experts of a block), with a damping that is raised until there is a factor. false is llm-compressor's own."""


class ModifierEntry(Section):
    """One step of llm-compressor: a mapping with one key, the modifier's name, and its arguments below it."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    QuantizationModifier: QuantizationArguments | None = None
    """Round to nearest with calibrated activation scales. The usual choice, and the fastest."""
    GPTQModifier: GPTQArguments | None = None
    """GPTQ: corrects each column's rounding error in the columns after it. Slower, smaller error."""
    SmoothQuantModifier: SmoothQuantArguments | None = None
    """Stands before one of the others: makes inputs easier to quantize, by a formula. Cheap."""
    AWQModifier: AWQArguments | None = None
    """Stands before one of the others: makes inputs easier to quantize, by a search. Slower, smaller error."""

    @model_validator(mode="before")
    @classmethod
    def _one_known_modifier(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("must be a mapping of a modifier's name to its arguments, as in `AWQModifier: {}`")
        for name in value:
            if name in REFUSED:
                raise ValueError(f"{name} {REFUSED[name]}; remove it")
            if name not in cls.model_fields:
                raise ValueError(
                    f"{name!r} is no modifier that can run here{did_you_mean(str(name), cls.model_fields)}"
                )
        if len(value) != 1:
            names = ", ".join(value) or "none"
            raise ValueError(
                f"must have exactly one key, the modifier's name, has {names}; write one '- ' per modifier"
            )
        return {name: {} if arguments is None else arguments for name, arguments in value.items()}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        # llm-compressor distinguishes an argument set to null from a missing one: keep only what was given.
        return {self.name: self.arguments}

    @property
    def name(self) -> str:
        """Class name of the llm-compressor modifier."""
        return next(iter(self.model_fields_set))

    @property
    def smoothing(self) -> Smoothing | None:
        """Its arguments if it smooths, which changes tensors outside the quantized layers too."""
        return self.SmoothQuantModifier or self.AWQModifier

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that the recipe sets, without defaults, as JSON types."""
        value: Section = getattr(self, self.name)
        return value.model_dump(mode="json", exclude_unset=True)


@dataclass(frozen=True)
class QuantizationEntry:
    """The one modifier of a recipe that selects the modules to quantize."""

    name: str
    """Class name of the llm-compressor modifier."""
    position: int
    """Its index in `Recipe.modifiers`."""
    config_groups: dict[str, ConfigGroup]
    """The groups by name; the short form `targets` + `scheme` is the group group_0."""
    ignore: list[str]
    """Ignore entries as written."""
    arguments: dict[str, Any]
    """Every other argument that the recipe sets (no config_groups, targets, scheme or ignore)."""

    @property
    def observers_of_weights(self) -> list[str]:
        """The weight observers that the recipe names, for all groups or for one."""
        of_groups = [(group.weights or {}).get("observer") for group in self.config_groups.values()]
        of_all = [self.arguments.get("weight_observer"), (self.arguments.get("observer") or {}).get("weights")]
        return [str(name) for name in (*of_all, *of_groups) if name is not None]


def quantization_entries(modifiers: list[ModifierEntry]) -> list[QuantizationEntry]:
    """Every modifier of `modifiers` that has config groups, in order."""
    entries = []
    for position, entry in enumerate(modifiers):
        value = getattr(entry, entry.name)
        if isinstance(value, QuantizationArguments) and (groups := value.groups()):
            rest = {
                key: argument
                for key, argument in entry.arguments.items()
                if key not in ("config_groups", "targets", "scheme", "ignore")
            }
            entries.append(QuantizationEntry(entry.name, position, groups, list(value.ignore), rest))
    return entries
