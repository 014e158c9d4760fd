"""One table of naming facts per model family: parts, fused groups, transformers' names, serving names.

Source names are those of the hub checkpoint. Nothing else in the project knows how a family spells its modules.
Sources: the checkpoints' own headers; transformers/conversion_mapping.py (5.17) for transformers' names;
vllm/models (0.32) for fused projections and serving names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recipes.errors import SourceError

ROUTED, SHARED, ROUTER = "routed expert", "shared expert", "router"

#: Parts whose weights are not linear layers; `Linear` in a recipe never means them.
NOT_LINEAR = frozenset({"embedding", "router", "norm", "mHC", "sink", "compressor position"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs: block number (None outside the blocks), part, routed expert number, MTP or not."""

    block: int | None
    part: str
    expert: int | None
    mtp: bool


@dataclass(frozen=True)
class Family:
    """The grammar of one family. Patterns are searched in source names; the first part that fits wins."""

    name: str
    model_types: tuple[str, ...]
    block: str
    parts: tuple[tuple[str, str], ...]
    fused_leaves: tuple[tuple[str, ...], ...]
    renames: tuple[tuple[str, str], ...] = ()
    mtp: str = r"(?!)"
    expert: str = r"\.experts\.(\d+)\."
    #: Linear layers that must stay as they are, each pattern with its reason.
    never_quantized: tuple[tuple[str, str], ...] = ()
    #: Linear layers that transformers does not run as one matrix product, so that no observer sees their input.
    not_observed: str = r"(?!)"
    #: Further spellings of a leaf that vLLM's own module tree uses when it resolves quantization targets.
    serving_leaves: tuple[tuple[str, tuple[str, ...]], ...] = ()
    #: vLLM's module tree from source modules, as `renames`.
    serving_renames: tuple[tuple[str, str], ...] = ()
    #: Parts beside the linear layers that vLLM quantizes where a target names them.
    serving_quantizes: tuple[str, ...] = ()
    #: Fields of config.json that the serving engine needs changed once routed experts are NVFP4.
    serving_config: tuple[tuple[str, Any], ...] = ()

    def place(self, tensor: str) -> Place:
        """The place of a source tensor or module name."""
        mtp = re.search(self.mtp, tensor) is not None
        block = None if mtp else re.search(self.block, tensor)
        expert = re.search(self.expert, tensor + ".")
        part = next((part for part, pattern in self.parts if re.search(pattern, tensor)), "other")
        return Place(int(block[1]) if block else None, part, int(expert[1]) if expert else None, mtp)

    def model_name(self, name: str) -> str | None:
        """The name in transformers' module tree with linearized experts (llm-compressor's LinearExperts2D) of a source
        tensor or module; None where transformers has no such module (MTP)."""
        if re.search(self.mtp, name):
            return None
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def serving_names(self, module: str) -> tuple[str, ...]:
        """The names under which vLLM resolves quantization targets for a source module, its own tree's first: routed
        experts through expert 0 alone and by one spelling or the other (its CUDA and CPU models differ), a fused
        projection by its own leaf, another one by the tree's. Empty for MTP."""
        if re.search(self.mtp, module):
            return ()
        tree = re.sub(self.expert, ".experts.0.", module)
        for pattern, replacement in self.serving_renames:
            tree = re.sub(pattern, replacement, tree)
        parent, _, leaf = tree.rpartition(".")
        served = dict(self.serving_leaves).get(leaf, ())
        if self.place(module).part == ROUTED:
            return tuple(f"{parent}.{name}" for name in (leaf, *served))
        fused = any(leaf in group for group in self.fused_leaves)
        return (tree,) if fused or not served else tuple(f"{parent}.{name}" for name in served)

    def fused(self, modules: Iterable[str]) -> list[tuple[str, ...]]:
        """Groups of these source modules that the serving engine runs as one matrix (gate/up, q/k/v, ...)."""
        by_parent: dict[str, list[str]] = {}
        for module in modules:
            by_parent.setdefault(module.rpartition(".")[0], []).append(module)
        groups = []
        for siblings in by_parent.values():
            leaves = {sibling.rpartition(".")[2]: sibling for sibling in siblings}
            for wanted in self.fused_leaves:
                group = tuple(leaves[leaf] for leaf in wanted if leaf in leaves)
                if len(group) > 1:
                    groups.append(group)
        return groups


_HF_PARTS = (
    ("norm", r"norm\.weight$"),
    ("routed expert", r"\.experts\.\d+\."),
    ("shared expert", r"\.shared_experts?\."),
    ("router", r"\.(mlp|block_sparse_moe)\.gate(\.|$)"),
    ("attention", r"\.self_attn\."),
    ("mlp", r"\.mlp\."),
    ("embedding", r"^model\.embed_tokens(\.|$)"),
    ("head", r"^lm_head(\.|$)"),
    ("norm", r"norm(\.weight)?$"),
)
_HF_BLOCK = r"^model\.layers\.(\d+)\."
_HF_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_EXPERT_LEAVES = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
_SERVED_EXPERT_LEAVES = tuple((hub, (served,)) for hub, served in _EXPERT_LEAVES)

_DEEPSEEK_V4 = Family(
    name="deepseek_v4",
    model_types=("deepseek_v4",),
    block=r"^layers\.(\d+)\.",
    mtp=r"^mtp\.",
    parts=(
        ("mHC", r"(^|\.)hc_\w+$"),
        ("norm", r"(^|[._])[eh]?norm(\.weight)?$"),
        ("MTP projection", r"^mtp\.\d+\.[eh]_proj(\.|$)"),
        ("compressor position", r"\.ape$"),
        ("sink", r"\.attn_sink$"),
        ("indexer", r"\.attn\.indexer\."),
        ("compressor", r"\.attn\.compressor\."),
        ("attention", r"\.attn\."),
        ("routed expert", r"\.ffn\.experts\.\d+\."),
        ("shared expert", r"\.ffn\.shared_experts\."),
        ("router", r"\.ffn\.gate(\.|$)"),
        ("embedding", r"^embed(\.|$)"),
        ("head", r"^head(\.|$)"),
    ),
    fused_leaves=(("w1", "w3"), ("wq_a", "wkv")),
    never_quantized=(
        (r"\.compressor\.(wkv|wgate)$", "vLLM runs the compressor unquantized"),
        (r"\.indexer\.weights_proj$", "vLLM runs the indexer's weights_proj unquantized"),
    ),
    not_observed=r"\.attn\.wo_a$",
    renames=(
        (r"^embed\b", "model.embed_tokens"),
        (r"^head\b", "lm_head"),
        (r"^norm\b", "model.norm"),
        (r"^hc_head_", "model.hc_head.hc_"),
        (r"^layers\.", "model.layers."),
        (r"\.hc_(attn|ffn)_", r".\1_hc."),
        (r"\.attn_norm\b", ".input_layernorm"),
        (r"\.ffn_norm\b", ".post_attention_layernorm"),
        (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
        (r"\.attn\.indexer\.wq_b\b", ".self_attn.compressor.indexer.q_b_proj"),
        (r"\.attn\.indexer\.weights_proj\b", ".self_attn.compressor.indexer.scorer.weights_proj"),
        (r"\.attn\.", ".self_attn."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.q_norm\b", ".q_a_norm"),
        (r"(\.compressor(?:\.indexer)?)\.ape$", r"\1.position_bias"),
        (r"(\.compressor(?:\.indexer)?)\.norm\b", r"\1.kv_norm"),
        (r"(\.compressor(?:\.indexer)?)\.wgate\b", r"\1.gate_proj"),
        (r"\.self_attn\.wq_a\b", ".self_attn.q_a_proj"),
        (r"\.self_attn\.wq_b\b", ".self_attn.q_b_proj"),
        (r"\.wkv\b", ".kv_proj"),
        (r"\.wo_a\b", ".o_a_proj"),
        (r"\.wo_b\b", ".o_b_proj"),
        (r"\.ffn\.", ".mlp."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        *((rf"(\.experts\.\d+|\.shared_experts)\.{hub}\b", rf"\1.{hf}") for hub, hf in _EXPERT_LEAVES),
    ),
    serving_leaves=_SERVED_EXPERT_LEAVES,
    serving_renames=(
        (r"^(layers|norm|hc_head)", r"model.\1"),
        (r"^embed\b", "model.embed_tokens"),
        (r"^head\b", "lm_head"),
    ),
    # With "fp4" or no value vLLM renames every `.weight_scale` outside the experts and then misses it.
    serving_config=(("expert_dtype", "nvfp4"),),
)

_MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    block=_HF_BLOCK,
    parts=_HF_PARTS,
    fused_leaves=(*_HF_FUSED, ("w1", "w3")),
    renames=(
        (r"\.block_sparse_moe\.", ".mlp."),
        *((rf"(\.experts\.\d+)\.{hub}\b", rf"\1.{hf}") for hub, hf in _EXPERT_LEAVES),
    ),
)

FAMILIES = (
    _DEEPSEEK_V4,
    _MIXTRAL,
    Family("qwen3_moe", ("qwen3_moe",), _HF_BLOCK, _HF_PARTS, _HF_FUSED, serving_quantizes=("router",)),
    Family("dense", ("llama", "qwen3", "mistral"), _HF_BLOCK, _HF_PARTS, _HF_FUSED),
)


def family_of(config: dict[str, Any], where: str = "config.json") -> Family:
    """The family of a checkpoint by its `model_type`. Raises SourceError for one that was never checked here."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for family in FAMILIES for t in family.model_types))
    raise SourceError(f"{where}: model_type {model_type!r} has no grammar here; supported: {known}")
