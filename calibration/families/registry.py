"""The families with a table, and every other one whose grammar transformers tells. A model type that is neither raises
SourceError: another family's grammar or promised tensors say nothing about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.checkpoint.stacks import by_expert
from calibration.families import huggingface
from calibration.families.deepseek_v4 import DEEPSEEK_V4
from calibration.families.deepseek_v41 import DEEPSEEK_V41
from calibration.families.family import Family
from calibration.families.promised import ConfigReader, Wanted
from recipes.errors import SourceError

FAMILIES: tuple[Family, ...] = (DEEPSEEK_V4, DEEPSEEK_V41, *huggingface.FAMILIES)
#: The chat formats that a recipe may name; a tokenizer with their special tokens has them.
ENCODINGS = tuple(dict.fromkeys(family.encoding for family in FAMILIES if family.encoding is not None))


def family_of(config: dict[str, Any], where: str = "config.json", names: Iterable[str] = ()) -> Family:
    """The family of a checkpoint by its `model_type`: the table's, or else derived from the whole config, and spelled as
    the `names` of its tensors are. Raises SourceError if it cannot be derived."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family.of_config(config)
    from calibration.families.derived import derive  # imports transformers, which no family of the table needs

    return derive(config, where, names)


def open_source(directory: Path) -> Checkpoint:
    """Opens a source as `Checkpoint.open` does, with stacks of experts as one tensor per expert and projection. Raises
    SourceError as it does, and for a stack that does not fit config.json. A config of no known family, or in which a
    family cannot be derived, has no stacks: whoever needs the family reports that."""
    return unstacked(Checkpoint.open(directory))


def unstacked(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with its stacks of experts taken apart, as `open_source` presents them."""
    try:
        family = family_of(checkpoint.config, str(checkpoint.directory / CONFIG_NAME), checkpoint.tensors)
    except SourceError:
        return checkpoint
    if not family.stacks:
        return checkpoint
    from calibration.families.stacked import with_scales  # imports torch, as every family with stacks did

    return by_expert(checkpoint, with_scales(family.stacks, checkpoint.tensors))


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the language model: those of config.json, overridden by the nested ones if the family nests them
    (`Family.language`), as wrappers of vision and audio models do."""
    model_type = config.get("model_type")
    nested = next((family.language for family in FAMILIES if model_type in family.model_types), "text_config")
    inner = config.get(nested)
    return (
        {**config, **{k: v for k, v in inner.items() if k != "model_type"}} if isinstance(inner, dict) else dict(config)
    )


def expected_tensors(config: dict[str, Any], names: Iterable[str] = ()) -> tuple[dict[str, Wanted], list[str]]:
    """Every logical tensor of a checkpoint with this config, spelled as its `names` are, and the problems of the config. If
    it has problems, the tensors are empty, because nothing can be derived from it. Raises SourceError for an unknown
    model_type."""
    family = family_of(config, names=names)
    reader = ConfigReader(language_config(config), family.language)
    tensors = dict(family.promised(reader))
    # A field that every block needs is reported once per block.
    return ({}, list(dict.fromkeys(reader.problems))) if reader.problems else (tensors, [])
