"""Checkpoints of vision and audio models: which part of the wrapper's module tree is the language model, which a tower.

The language model alone is built, calibrated and quantized; what lies beside it is copied. A part is told by the module
tree of the wrapper's own class in transformers: a submodel belongs to the sub-config that it was built from. Also the
names that this checkpoint uses, if they are others than transformers writes: its loading knows older spellings.
Sources: transformers/modeling_utils.py, core_model_loading.py, conversion_mapping.py (5.17).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from calibration.checkpoint.source_config import TEXT_CONFIG
from calibration.families.family import AUDIO_TOWER, PROJECTOR, VISION_TOWER

#: The sub-config that a tower is built from, and its part.
_TOWERS = {"vision_config": VISION_TOWER, "audio_config": AUDIO_TOWER}
#: The name of the language model in vLLM's wrappers (0.32: `init_vllm_registered_model(prefix="language_model")`).
LANGUAGE_MODEL = "language_model"


class UnknownPart(Exception):
    """A module of a wrapper that is neither the language model nor a tower nor the wrapper's own."""


@dataclass(frozen=True)
class Wrapper:
    """A wrapper's module tree. `language` is the name of the language model in it, `text` what its tensors begin with in the
    language model that is built alone; `towers` maps names of submodels to their parts."""

    language: str
    text: str
    head: str
    towers: Mapping[str, str]

    def part(self, module: str) -> str | None:
        """The part of a module that is not the language model's; None for those that are."""
        if module == self.head or _below(module, self.language):
            return None
        return next((part for name, part in self.towers.items() if _below(module, name)), PROJECTOR)

    def in_text_model(self, tensor: str) -> str:
        """The name of a tensor of the wrapper in the language model that is built alone."""
        rest = tensor.removeprefix(f"{self.language}.")
        return rest if rest == tensor or not self.text else f"{self.text}.{rest}"


def _below(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


#: Model types that transformers lacks and vLLM reads as the architecture that they declare. Of any other one only its own
#: code knows what it computes: a Llama by its tensors may be another model.
_DECLARED = frozenset({"kimi_k2"})


def known_model_type(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config under the model type that transformers has for the architecture that it declares, if its own is one of
    _DECLARED. The language model in a wrapper's config as well."""
    kept, declared = dict(config), config.get("architectures")
    unknown = kept.get("model_type") in _DECLARED and kept.get("model_type") not in CONFIG_MAPPING
    if unknown and isinstance(declared, list) and declared:
        names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        kept["model_type"] = next((known for known, kind in names if kind == declared[0]), kept.get("model_type"))
    if isinstance(inner := kept.get(TEXT_CONFIG), dict):
        kept[TEXT_CONFIG] = known_model_type(inner)
    return kept


def wrapper_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """transformers' class of the whole model if `config` nests a language model; None if it is a language model's."""
    if config.get_text_config() is config:
        return None
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if (found := mapping.get(type(config), None)) is not None:
            kind: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return kind
    return None


def read_wrapper(model: PreTrainedModel) -> Wrapper | None:
    """The wrapper that an empty model is; None if it is a language model. Raises UnknownPart."""
    text = model.config.get_text_config()
    if text is model.config:
        return None
    submodels = {name: module for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)}
    language = next((name for name, module in submodels.items() if type(module.config) is type(text)), None)
    if language is None:
        raise UnknownPart(f"no submodel of {type(model).__name__} is built from its {TEXT_CONFIG}")
    towers: dict[str, str] = {}
    for name, module in submodels.items():
        if _below(name, language) or any(_below(name, tower) for tower in towers) or module.config is model.config:
            continue
        part = next(
            (part for key, part in _TOWERS.items() if _is(module.config, getattr(model.config, key, None))), None
        )
        if part is not None:
            towers[name] = part
        elif type(module.config) is not type(model.config):
            raise UnknownPart(f"{name} of {type(model).__name__} is a {type(module).__name__}: no known kind of tower")
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    whole = isinstance(submodels[language], causal) if causal is not None else False
    return Wrapper(
        language, "" if whole else (causal or submodels[language]).base_model_prefix or "model", head, towers
    )


def _is(config: PreTrainedConfig, other: Any) -> bool:
    return other is not None and type(config) is type(other)


def loaded_into(model: PreTrainedModel, name: str) -> str:
    """The (first) tensor of the model that transformers loads a hub tensor into."""
    conversions = get_model_conversion_mapping(model)
    renamings = [found for found in conversions if isinstance(found, WeightRenaming)]
    converters = [found for found in conversions if isinstance(found, WeightConverter)]
    known = dict.fromkeys(model.state_dict(), True)
    return str(rename_source_key(name, renamings, converters, model.base_model_prefix, known)[0])


def own_spelling(model: PreTrainedModel, fills: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Hub name as transformers writes it -> the checkpoint's, for the `names` (of its tensors) that transformers writes
    otherwise and loads into the same place. `fills` maps its own hub names to tensors of the model."""
    present = set(names)
    # The scales of a weight under a known name are no names of their own.
    others = [name for name in present if name not in fills and f"{name.rpartition('.')[0]}.weight" not in fills]
    if not others:
        return {}
    renamings = [found for found in get_model_conversion_mapping(model) if isinstance(found, WeightRenaming)]
    places = {target: hub for hub, target in fills.items() if hub not in present}
    known = dict.fromkeys([*model.state_dict(), *fills.values()], True)

    def loaded_as(name: str) -> str:
        return str(rename_source_key(name, renamings, [], model.base_model_prefix, known)[0])

    found: dict[str, str] = {}
    left = [name for name in sorted(others) if not _take(found, places, loaded_as(name), name)]
    if left and places:  # projections of experts have other names on the hub, which are merged after the renaming
        places = {loaded_as(hub): hub for hub in places.values() if hub not in found}
        known |= dict.fromkeys(places, True)
        for name in left:
            _take(found, places, loaded_as(name), name)
    return found


def _take(found: dict[str, str], places: Mapping[str, str], target: str, name: str) -> bool:
    hub = places.get(target)
    return hub is not None and found.setdefault(hub, name) == name
