"""Describes a model family as one value: its grammar, the tensors that its config promises, and how it is served.

Source names are those of the hub checkpoint. The families themselves are in modules of their own, listed in
`calibration.families.registry`; nothing outside this folder knows how a family spells its modules.
Sources: the checkpoints' own headers; transformers/conversion_mapping.py (5.17) for transformers' names;
vllm/models (0.32) for fused projections and serving names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from calibration.checkpoint.stacks import Stack
from calibration.families.encoding import Encoding
from calibration.families.promised import Promise

#: The most names whose places a family keeps; DeepSeek-V4-Pro has 145,116 tensors in 71,000 modules.
MOST_PLACES = 1 << 19

_Search = Callable[[str], re.Match[str] | None]

ROUTED, SHARED, ROUTER = "routed expert", "shared expert", "router"

#: What lies beside the language model of a vision or audio model: copied, whatever a recipe's targets are.
VISION_TOWER, AUDIO_TOWER, PROJECTOR = "vision tower", "audio tower", "projector"
BESIDE = frozenset({VISION_TOWER, AUDIO_TOWER, PROJECTOR})

#: Parts that a recipe may name (`part:routed expert`), whether or not a family has them.
PARTS = (
    ROUTED, SHARED, ROUTER, "attention", "linear attention", "mamba", "convolution", "mlp", "norm", "embedding", "head",
    VISION_TOWER, AUDIO_TOWER, PROJECTOR,
)  # fmt: skip

#: Parts whose weights are not linear layers; `Linear` in a recipe never matches them.
NOT_LINEAR = frozenset({
    "embedding", "router", "norm", "mHC", "sink", "compressor position", "Engram table", "Markov head", "confidence head",
})  # fmt: skip

#: Fields of a config that count the blocks of its draft head, which the hub numbers after the last block.
DRAFT_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")

#: The projections of an expert as DeepSeek and Mixtral name them on the hub, and as transformers names them.
EXPERT_LEAVES = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs: block number (None outside the blocks), part, routed expert number, MTP or not."""

    block: int | None
    part: str
    expert: int | None
    mtp: bool


@dataclass(frozen=True, slots=True)
class FP8Dialect:
    """NVIDIA's dialect of a family that keeps `quant_method: fp8`: its routed experts are NVFP4, its other linear
    layers FP8 in tiles with E8M0 scales. `not_nvfp4` and `draft` are the patterns in NVIDIA's own files for what stays
    FP8 and for the draft head; `built_plain` are the parts that the engine builds unquantized, `tile` is the tile that
    it assumes for every layer, and `config` the fields of config.json that it needs before it looks for NVFP4."""

    not_nvfp4: tuple[str, ...]
    draft: str
    built_plain: frozenset[str]
    tile: tuple[int, int] = (128, 128)
    config: tuple[tuple[str, Any], ...] = ()


class _Searches(NamedTuple):
    """The patterns of a family, compiled."""

    mtp: _Search
    block: _Search
    expert: _Search
    parts: tuple[tuple[str, _Search], ...]
    renames: tuple[tuple[re.Pattern[str], str], ...]


@dataclass(frozen=True)
class Family:
    """One family. Patterns are searched in source names; the first matching part wins."""

    name: str
    model_types: tuple[str, ...]
    block: str
    parts: tuple[tuple[str, str], ...]
    fused_leaves: tuple[tuple[str, ...], ...]
    #: Yields the tensors that a config.json of this family promises.
    promised: Promise
    renames: tuple[tuple[str, str], ...] = ()
    #: Matches the tensors of MTP blocks; its group, if it matched, is the block's number.
    mtp: str = r"(?!)()"
    #: Whether MTP blocks are numbered after the others; the config has their number (`of_config`).
    mtp_follows: bool = False
    expert: str = r"\.experts\.(\d+)\."
    #: Linear layers that must stay unquantized, each pattern with its reason.
    never_quantized: tuple[tuple[str, str], ...] = ()
    #: Linear layers that transformers does not run as one matrix product, so that no observer sees their input.
    not_observed: str = r"(?!)"
    #: Further spellings of a leaf that vLLM's own module tree uses when it resolves quantization targets.
    serving_leaves: tuple[tuple[str, tuple[str, ...]], ...] = ()
    #: vLLM's module tree from source modules, as `renames`.
    serving_renames: tuple[tuple[str, str], ...] = ()
    #: The name of the language model in vLLM's module tree, if it is a part of a wrapper: targets begin with it.
    served_in: str = ""
    #: Modules that vLLM looks up under another parent than the hub's: pattern and replacement.
    serving_parents: tuple[tuple[str, str], ...] = ()
    #: Parts, besides linear layers, that vLLM quantizes if a target matches them.
    serving_quantizes: tuple[str, ...] = ()
    #: Fields of config.json that the serving engine needs changed if routed experts are NVFP4.
    serving_config: tuple[tuple[str, Any], ...] = ()
    #: None if modelopt's own form describes it.
    fp8_dialect: FP8Dialect | None = None
    #: Parts that engines only read in their stored format: copied byte for byte with their scales, whatever the method.
    native_parts: tuple[str, ...] = ()
    #: The field of config.json that holds the language model's fields, if they are nested.
    language: str = ""
    #: Why the family cannot be calibrated (there is no forward pass), or empty.
    not_calibrated: str = ""
    #: The family's own chat format, if its tokenizers have no template.
    encoding: Encoding | None = None
    #: Hub tensors that hold all routed experts of a block; names of single experts are those of their slices.
    stacks: tuple[Stack, ...] = ()
    #: Layers of transformers' tree that the hub stores as several, each with their leaves, from the first row on: they
    #: are built as modules of their own below the layer's name.
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    #: Leaves of hub weights that are several parts of one matrix in vLLM, from the first row on: each part's name and its
    #: share of the rows, relative to the others'.
    merged: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    #: Whether this grammar is derived from transformers for one config (`calibration.families.derived`), not from a table.
    derived: bool = False
    #: Whether a test of this project serves it and compares the logits with an independent reference.
    tested: bool = True

    def of_config(self, config: dict[str, Any]) -> Family:
        """This family with the part of its grammar that only a config contains: the numbers of its MTP blocks."""
        first, count = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
        if not (self.mtp_follows and isinstance(first, int) and isinstance(count, int) and count > 0):
            return self
        numbers = "|".join(str(number) for number in range(first, first + count))
        return replace(self, mtp=self.block.replace(r"(\d+)", f"({numbers})"))

    @property
    def blocks(self) -> str:
        """What the list of decoder blocks is called: `layers`, `blocks` of DBRX, `h` of GPT-J."""
        return self.block[: self.block.index(r"\.(")].rpartition(".")[2].removeprefix("^")

    @property
    def described(self) -> str:
        """The name, and for a derived grammar whether a test of this project compares the family with a reference."""
        tested = "tested by this project" if self.tested else "no test of this project, proven by each run"
        return f"{self.name} (derived from transformers' model; {tested})" if self.derived else f"{self.name} (tested)"

    def place(self, tensor: str) -> Place:
        """The place of a source tensor or module name."""
        found = self._places.get(tensor)
        if found is None:
            if len(self._places) >= MOST_PLACES:
                self._places.clear()
            found = self._places[tensor] = self._find_place(tensor)
        return found

    def _find_place(self, tensor: str) -> Place:
        search = self._searches
        mtp = search.mtp(tensor) is not None
        block = None if mtp else search.block(tensor)
        expert = search.expert(tensor + ".")
        part = next((part for part, matches in search.parts if matches(tensor)), "other")
        return Place(int(block[1]) if block else None, part, int(expert[1]) if expert else None, mtp)

    @cached_property
    def _places(self) -> dict[str, Place]:
        """What `place` has found: plan, tables, empty model and ranks all ask for the same names."""
        return {}

    @cached_property
    def _searches(self) -> _Searches:
        return _Searches(
            re.compile(self.mtp).search,
            re.compile(self.block).search,
            re.compile(self.expert).search,
            tuple((part, re.compile(pattern).search) for part, pattern in self.parts),
            tuple((re.compile(pattern), replacement) for pattern, replacement in self.renames),
        )

    def mtp_blocks(self, tensors: Iterable[str]) -> set[str]:
        """The numbers of the MTP blocks to which these source tensors belong."""
        found = (re.search(self.mtp, tensor) for tensor in tensors)
        return {match[1] for match in found if match is not None and match[1] is not None}

    def model_name(self, name: str) -> str | None:
        """The name in transformers' module tree with linearized experts (llm-compressor's LinearExperts2D) of a source
        tensor or module; None if transformers has no such module (MTP)."""
        if self._searches.mtp(name):
            return None
        for pattern, replacement in self._searches.renames:
            if pattern.search(name):  # `sub` reads the replacement first
                name = pattern.sub(replacement, name)
        return name

    def serving_names(self, module: str) -> tuple[str, ...]:
        """The names with which vLLM looks up the quantization target of a source module, the name in its own module
        tree first. It looks up routed experts only through expert 0, under either of two spellings (its CUDA and CPU
        models differ), a fused projection under its own leaf, and others under the tree's. Empty for MTP."""
        if re.search(self.mtp, module):
            return ()
        tree = self.served_parent(re.sub(self.expert, ".experts.0.", module))
        for pattern, replacement in self.serving_renames:
            tree = re.sub(pattern, replacement, tree)
        parent, _, leaf = tree.rpartition(".")
        served = dict(self.serving_leaves).get(leaf, ())
        if self.place(module).part == ROUTED:
            return tuple(f"{parent}.{name}" for name in (leaf, *served))
        fused = any(leaf in group for group in self.fused_leaves)
        return (tree,) if fused or not served else tuple(f"{parent}.{name}" for name in served)

    def served_parent(self, module: str) -> str:
        """A source module under the parent that vLLM gives it."""
        for pattern, replacement in self.serving_parents:
            module = re.sub(pattern, replacement, module)
        return module

    def merged_rows(self, module: str, rows: int) -> dict[str, int]:
        """The parts of vLLM's matrix that a source module with so many rows is, what a message calls their heights -> rows: `M`
        alone if the module is one of them."""
        parts = dict(self.merged).get(module.rpartition(".")[2], ())
        whole = sum(share for _, share in parts)
        return {f"M of {name}": rows * share // whole for name, share in parts} or {"M": rows}

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


def draft_blocks(fields: Mapping[str, Any], names: Iterable[str] = DRAFT_BLOCKS) -> int:
    """How many blocks the draft head of a config with these fields has, by the fields `names`."""
    return max((count for name in names if isinstance(count := fields.get(name), int)), default=0)
