"""A config.json cut to some of its decoder blocks, which are numbered anew.

Fields that say something of single blocks come in four forms: one value per block (`layer_types`, `compress_ratios`), a
list of block numbers (`mlp_only_layers`), a number of first blocks (`first_k_dense_replace`), and a period
(`decoder_sparse_step`). The first three can be cut to any blocks. A period holds for the first blocks alone, unless
transformers' config class resolves it to one value per block (`full_attention_interval` -> `layer_types`), which is then
written out. Whether a cut is right is proven by its promised tensors (`calibration.plan.miniature`). Names of fields:
transformers/models/*/configuration_*.py (5.17), vllm/models/deepseek_v41.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from calibration.families.family import DRAFT_BLOCKS, draft_blocks

#: Fields that count all blocks.
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
#: Fields that count first blocks which differ from the others.
_FIRST = ("first_k_dense_replace", "num_hash_layers", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
#: Fields that count the blocks of a draft head, which a cut has not, and those that describe one.
_DRAFT_BLOCKS = (*DRAFT_BLOCKS, "n_mtp_layers")
_DRAFT = re.compile(r"^(dspark|mtp)_")
#: Fields that list block numbers, in a list or in a text.
_NUMBERS = re.compile(
    r"(only_layers|layers_enum|layers?_(ids?|idxs?|indices|indexes)|attn_(idxs|indices)|(full_attn|kda)_layers)$"
)
#: A list with one value for each entry of a list of block numbers.
_BESIDE = {"engram_num_embeddings": "engram_layer_ids"}
#: Lists that have nothing to do with blocks, whatever their length.
_NOT_BLOCKS = re.compile(r"token|architectures|label|^_|torch|keys_to_ignore")
#: A list with more different values than this tells blocks apart by number, not by kind.
_MOST_VALUES = 8


def block_traits(config: dict[str, Any], blocks: int, nested: str = "") -> list[tuple[object, ...]]:
    """What the config says of every block beside its shapes, as equal tuples for blocks of one kind: attention type,
    compression, membership in a list. `nested` is the field that contains the language model's fields, if any."""
    found = []
    for fields in (*_levels(config, nested), _resolved(config, blocks)):
        for key, value in sorted(fields.items()):
            if _DRAFT.match(key) or _NOT_BLOCKS.search(key) or not isinstance(value, list):
                continue
            if _lists_numbers(key, value, blocks):
                found.append([number in value for number in range(blocks)])
            elif len(value) >= blocks and all(isinstance(item, str | int | float) for item in value):
                found.append(value[:blocks])
    kinds = [values for values in found if len(set(values)) <= _MOST_VALUES]
    return [tuple(values[number] for values in kinds) for number in range(blocks)]


def cut_config(config: dict[str, Any], kept: Sequence[int], blocks: int, nested: str = "") -> dict[str, Any]:
    """`config`, a model of `blocks` decoder blocks, cut to the blocks `kept` in this order, without its draft head. `nested`
    as in `block_traits`."""
    cut = copy.deepcopy(config)
    for fields in _levels(cut, nested):
        _cut(fields, kept, blocks)
    wanted = {key: [value[number] for number in kept] for key, value in _resolved(config, blocks).items()}
    lists = _resolved(cut, len(kept))
    differing = {key: value for key, value in wanted.items() if lists.get(key) != value}
    if differing:
        *_, inner = _levels(cut, nested)
        inner |= differing
    return cut


def _levels(config: dict[str, Any], nested: str) -> Iterator[dict[str, Any]]:
    """The mappings that hold the language model's fields, the innermost last."""
    yield config
    for key in dict.fromkeys((nested, "text_config")):
        if isinstance(inner := config.get(key), dict):
            yield inner


def _lists_numbers(key: str, value: list[Any], blocks: int) -> bool:
    numbers = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < blocks for item in value)
    return bool(_NUMBERS.search(key)) and numbers and sorted(set(value)) == sorted(value)


def _cut(fields: dict[str, Any], kept: Sequence[int], blocks: int) -> None:
    position = {number: at for at, number in enumerate(kept)}
    drafts = draft_blocks(fields, _DRAFT_BLOCKS)
    step = fields.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:
        dense = [number for number in range(blocks) if (number + 1) % step]
        fields["mlp_only_layers"] = sorted({*dense, *(fields.get("mlp_only_layers") or ())})
        fields["decoder_sparse_step"] = 1
    for key, value in list(fields.items()):
        if key in _COUNTS and value == blocks:
            fields[key] = len(kept)
        elif key in _DRAFT_BLOCKS:
            fields[key] = 0
        elif _DRAFT.match(key):
            del fields[key]
        elif key in _FIRST and isinstance(value, int):
            fields[key] = sum(number < value for number in kept)
        elif isinstance(value, list) and not _NOT_BLOCKS.search(key):
            numbers = fields.get(_BESIDE.get(key, ""))
            if isinstance(numbers, list):
                continue  # cut with its list of numbers
            if _lists_numbers(key, value, blocks):
                for beside in (name for name, of in _BESIDE.items() if of == key and name in fields):
                    fields[beside] = [item for at, item in zip(value, fields[beside], strict=False) if at in position]
                fields[key] = [position[number] for number in value if number in position]
            elif len(value) in (blocks, blocks + drafts) or (len(value) > blocks and key == "compress_ratios"):
                fields[key] = [value[number] for number in kept]
        elif isinstance(value, str) and _NUMBERS.search(key) and (listed := _numbers(value)) is not None:
            fields[key] = ",".join(str(position[number]) for number in listed if number in position)


def _numbers(text: str) -> list[int] | None:
    """The block numbers of a text that lists them (`moe_layers_enum` of Step-3.5 and 3.7: "3,4,5"); None for any other text."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().isdecimal() for part in parts) else None


def _resolved(config: dict[str, Any], blocks: int) -> dict[str, list[Any]]:
    """The lists with one value per block that transformers' config class has, given or derived; none for a model that
    transformers does not know, or a config that its class refuses."""
    from transformers import CONFIG_MAPPING  # takes seconds, and a source that is only planned needs no cut

    if config.get("model_type") not in CONFIG_MAPPING:
        return {}
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
        found = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(plain)).get_text_config()
        values = dict(vars(found))
    except Exception:  # config classes raise what they like; whatever builds the model says so
        return {}
    finally:
        logging.getLogger("transformers").setLevel(level)
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, list)
        and len(value) == blocks
        and not _NOT_BLOCKS.search(key)
        and not _lists_numbers(key, value, blocks)
        and all(isinstance(item, str | int | float) for item in value)
    }
