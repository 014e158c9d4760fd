"""Checks the fields of a config.json that this project reads, once, before anything is derived from them.

A config is a stranger's. A field may be absent (the code that needs it reports that) but never has a type or size on
which arithmetic could fail. Fields not listed here are never read and may hold anything; code that reads another field
must add it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recipes.errors import SourceError, first_of

#: Maximum number of routed experts of a model, over all blocks; a 1.6 T model has about 25,000. The expected tensors
#: are generated from this number.
MOST_EXPERTS = 100_000
#: Fields that contain the number of routed experts per block; families use different ones.
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
#: Maximum number of problems that one message lists.
_MOST_PROBLEMS = 20
#: The field of a vision or audio model's config that holds its language model's.
TEXT_CONFIG = "text_config"

Width = Annotated[int, Field(ge=0, le=1 << 31)]
Count = Annotated[int, Field(ge=0, le=100_000)]
Blocks = Annotated[int, Field(ge=0, le=10_000)]
Positive = Annotated[int, Field(gt=0, le=1 << 31)]
Text = Annotated[str, Field(max_length=1_000)]
#: `fail_fast`: one problem for a list, not one for each of its million entries.
Widths = Annotated[list[Width], Field(max_length=10_000, fail_fast=True)]
Names = Annotated[list[Text], Field(max_length=1_000_000, fail_fast=True)]
Tile = Annotated[list[Positive], Field(min_length=2, max_length=2, fail_fast=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class QuantizationArguments(_Part):
    """`weights` and `input_activations` of a config group (compressed_tensors.quantization.QuantizationArgs)."""

    num_bits: Annotated[int, Field(gt=0, le=64)] | None = None
    type: Text | None = None
    symmetric: bool | None = None
    strategy: Text | None = None
    group_size: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    block_structure: Tile | Text | None = None
    dynamic: bool | Text | None = None


class ConfigGroup(_Part):
    """One entry of `config_groups`."""

    targets: Names | None = None
    weights: QuantizationArguments | None = None
    input_activations: QuantizationArguments | None = None
    format: Text | None = None


class Quantization(_Part):
    """The parts of `quantization_config` that are read here: FP8 tiles and compressed-tensors' groups."""

    quant_method: Text | None = None
    weight_block_size: Tile | None = None
    format: Text | None = None
    ignore: Names | None = None
    config_groups: dict[str, ConfigGroup] | None = Field(None, max_length=10_000)


class VisionConfig(_Part):
    """`vision_config` of a multimodal checkpoint."""

    num_hidden_layers: Blocks | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    patch_size: Count | None = None
    downsample_ratio: Count | None = None


class LanguageConfig(_Part):
    """The fields of a language model that are read, at the top level of config.json or nested. An absent field is
    None."""

    model_type: Text | None = None
    num_hidden_layers: Blocks | None = None
    num_nextn_predict_layers: Annotated[int, Field(le=1_000, ge=-1)] | None = None
    num_hash_layers: Blocks | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | Widths | None = None
    moe_intermediate_size: Width | Widths | None = None
    vocab_size: Width | None = None
    max_position_embeddings: Positive | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Width | None = None
    index_n_heads: Count | None = None
    index_head_dim: Width | None = None
    q_lora_rank: Width | None = None
    o_lora_rank: Width | None = None
    o_groups: Count | None = None
    hc_mult: Count | None = None
    compress_ratios: Widths | None = None
    n_routed_experts: Count | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    n_shared_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    decoder_sparse_step: Positive | None = None
    first_k_dense_replace: Blocks | None = None
    mlp_only_layers: Widths | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    use_qk_norm: bool | None = None
    mlp_bias: bool | None = None
    n_mtp_layers: Annotated[int, Field(le=1_000, ge=0)] | None = None
    dspark_block_size: Count | None = None
    dspark_markov_rank: Width | None = None
    dspark_n_routed_experts: Count | None = None
    dspark_target_layer_ids: Annotated[list[Width], Field(max_length=1_000, fail_fast=True)] | None = None
    draft_vocab_size: Width | None = None
    enable_confidence_head: bool | None = None
    quantization_config: Quantization | None = None
    kv_source_layer_ids: Widths | None = None
    index_source_layer_ids: Widths | None = None
    engram_layer_ids: Widths | None = None
    engram_num_embeddings: Widths | None = None
    engram_max_ngram_size: Count | None = None
    engram_n_heads: Count | None = None
    engram_head_dim: Width | None = None


class SourceConfig(LanguageConfig):
    """The fields of a config.json that are read."""

    text_config: LanguageConfig | None = None
    vision_config: VisionConfig | None = None
    compression_config: Quantization | None = None


def declared_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a config.json, or of the language model in it (Kimi-K2.5 has it there); empty if there is
    none."""
    inner = config.get(TEXT_CONFIG)
    nested = inner.get("quantization_config") if isinstance(inner, dict) else None
    found = config.get("quantization_config") or nested
    return found if isinstance(found, dict) else {}


def without(config: Mapping[str, Any], *fields: str) -> dict[str, Any]:
    """A config without these fields, in it and in that of its language model."""
    kept = {key: value for key, value in config.items() if key not in fields}
    if isinstance(inner := kept.get(TEXT_CONFIG), dict):
        kept[TEXT_CONFIG] = {key: value for key, value in inner.items() if key not in fields}
    return kept


def routed_experts(config: dict[str, Any]) -> int | None:
    """The number of routed experts per block; None if the config has no such field."""
    return max((value for key in EXPERT_COUNTS if isinstance(value := config.get(key), int)), default=None)


def check_config(config: dict[str, Any], where: Path) -> None:
    """Raises SourceError that lists every field of `config` with a wrong type or size; `where` is its file."""
    problems = list[str]()
    try:
        found = SourceConfig.model_validate(config)
    except ValidationError as error:
        problems = [
            f"{where}: {_field(detail['loc'])}: {detail['msg']}, is {_shown(detail['input'])}"
            for detail in error.errors(include_url=False)
        ]
    else:
        parts = (("", found), *([("text_config.", found.text_config)] if found.text_config else ()))
        problems = [f"{where}: {field}{problem}" for field, part in parts for problem in _too_many_experts(part)]
    if problems:
        raise SourceError([*first_of(problems, _MOST_PROBLEMS), f"{where}: remedy: copy or download config.json again"])


def _too_many_experts(found: LanguageConfig) -> Iterator[str]:
    experts = routed_experts(found.model_dump()) or 0
    drafts = max(found.num_nextn_predict_layers or 0, found.n_mtp_layers or 0, len(found.dspark_target_layer_ids or ()))
    for field, blocks, each in (
        ("num_hidden_layers", found.num_hidden_layers or 0, experts),
        ("num_nextn_predict_layers", drafts, found.dspark_n_routed_experts or experts),
    ):
        if each * blocks > MOST_EXPERTS:
            yield f"{field}: {blocks} blocks of {each} experts are more than {MOST_EXPERTS:,} experts in all"


def _field(location: tuple[int | str, ...]) -> str:
    # pydantic adds the member of a union to the path (`list[constrained-int]`).
    return ".".join(str(part)[:100] for part in location if "constrained" not in str(part))


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    return f"{value!r:.80}"
