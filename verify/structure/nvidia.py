"""quantization_config of NVIDIA's dialect as vLLM reads it: DeepSeek-V4's FP8 with NVFP4 experts, and modelopt's own form.

Source: vllm (0.32) models/deepseek_v4/quant_config.py and models/deepseek_v41/quant_config.py (DeepseekV4FP8Config; CUDA takes
the second for V4 too, which alone reads `ignore`), model_executor/layers/quantization/fp8.py, modelopt.py
(ModelOptQuantConfigBase.is_layer_excluded) and utils/quant_utils.py (is_layer_skipped).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from calibration.checkpoint.nvfp4 import GROUP
from calibration.families.family import Family
from calibration.plan.schemes import FP8_BLOCK, NVFP4, NVFP4A16
from verify.structure.targets import NVFP4_FORMAT, Group, Names, Quantization

_KEY = "quantization_config"
#: vLLM's names of fused projections, under which alone it looks for patterns that leave a module out.
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj", "wq_a": "fused_wqa_wkv", "wkv": "fused_wqa_wkv",
}  # fmt: skip
#: Comparisons of entries with modules, and of shell patterns with modules, each of which may be a regex that is compiled
#: again: a second each. Honest lists of the largest models need a tenth.
_MOST_COMPARISONS, _MOST_PATTERNS = 10_000_000, 30_000


class _LeftOut(Names):
    """Entries of `ignore`, `exclude_modules` or `ignored_layers`. A module is named by an entry equal to it, routed experts
    by any entry below theirs, and with `wildcards` also by shell patterns and, with `parts`, by a part of its name."""

    def __init__(self, entries: tuple[str, ...], wildcards: bool, problems: list[str], parts: bool = True) -> None:
        self.entries = entries
        self._wildcards, self._parts, self._problems = wildcards, parts, problems
        self._equal = frozenset(entries)
        self._wild = [entry for entry in self._equal if set(entry) & set("*?[")]
        self._experts = {found[1] for entry in entries if (found := re.match(r"(.*\.experts)(?:\.|$)", entry))}
        self._known: dict[str, bool] = {}
        self._spent = self._matched = 0

    def name(self, module: str, names: Iterable[str]) -> bool:
        """See `Names.name`."""
        return module in self._equal or any(self._leaves_out(name) for name in (module, *names))

    def idle(self, modules: Mapping[str, tuple[str, ...]]) -> list[str]:
        """None: lists of modules that are not quantized hold norms and whole subtrees, which is no fault."""
        return []

    def _leaves_out(self, name: str) -> bool:
        if name in self._equal:
            return True
        experts = re.match(r"(.*\.experts)\.", name)
        parent, _, leaf = name.rpartition(".")
        seen = experts[1] if experts else f"{parent}.{_FUSED.get(leaf, leaf)}"
        if seen not in self._known:
            self._known[seen] = bool(experts and seen in self._experts) or (self._wildcards and self._pattern_of(seen))
        return self._known[seen]

    def _pattern_of(self, name: str) -> bool:
        self._spent += len(self._equal)
        self._matched += len(self._wild)
        if self._spent > _MOST_COMPARISONS or self._matched > _MOST_PATTERNS:
            problem = f"{_KEY}: {len(self.entries):,} entries of modules that are left out take too long to match"
            self._problems += [problem] if problem not in self._problems else []
            return False
        within = self._parts and any(entry in name for entry in self._equal)
        return within or any(fnmatchcase(name, pattern) for pattern in self._wild)


class _Experts(Names):
    """Routed experts but for those of blocks that `ignore` names, which vLLM reads as MXFP4 then."""

    def __init__(self, family: Family, ignore: tuple[str, ...], problems: list[str]) -> None:
        self.entries = ("routed experts",)
        self._expert, self._ignore = family.expert, _LeftOut(ignore, True, problems, parts=False)

    def name(self, module: str, names: Iterable[str]) -> bool:
        """See `Names.name`."""
        return re.search(self._expert, module + ".") is not None and not self._ignore.name(module, ())

    def idle(self, modules: Mapping[str, tuple[str, ...]]) -> list[str]:
        """None: there is one entry, which is not the checkpoint's."""
        return []


class _Linears(Names):
    """Every linear layer of vLLM's; with `head` the output head too, which is none."""

    def __init__(self, head: bool) -> None:
        self.entries = ("Linear",)
        self._head = head

    def name(self, module: str, names: Iterable[str]) -> bool:
        """By its name none or all; see `Quantization.group`."""
        return self._head

    def idle(self, modules: Mapping[str, tuple[str, ...]]) -> list[str]:
        """None."""
        return []


def read_nvidia(config: dict[str, Any], family: Family) -> Quantization:
    """Parses a `quantization_config` for which `is_nvidia` holds; every part that vLLM cannot read is a problem."""
    raw = config[_KEY]
    found = Quantization(present=True)
    (_read_hybrid if raw["quant_method"] == "fp8" else _read_modelopt)(raw, config, family, found)
    return found


def _read_hybrid(raw: dict[str, Any], config: dict[str, Any], family: Family, found: Quantization) -> None:
    problems = found.problems
    if family.fp8_dialect is None:
        problems.append(f"{_KEY}: moe_quant_algo beside quant_method 'fp8' is read for DeepSeek-V4 alone")
    if str(raw["moe_quant_algo"]).upper() != "NVFP4":
        problems.append(f"{_KEY}: moe_quant_algo is {raw['moe_quant_algo']!r:.60}, NVFP4 is needed")
    for key, value in family.fp8_dialect.config if family.fp8_dialect is not None else ():
        if config.get(key, value) != value:
            problems.append(f"{key} is {config[key]!r:.60}: vLLM looks at moe_quant_algo where it is {value!r} alone")
    if raw.get("activation_scheme") != "dynamic":
        problems.append(f"{_KEY}: activation_scheme is {raw.get('activation_scheme')!r:.60}, 'dynamic' is needed")
    tile = raw.get("weight_block_size")
    if not isinstance(tile, list) or len(tile) != 2 or not all(type(side) is int and side > 0 for side in tile):
        problems.append(f"{_KEY}: weight_block_size is {tile!r:.60}, two sizes are needed")
        tile = FP8_BLOCK.weights["block_structure"]
    _group_size(raw, problems)
    skipped = raw.get("ignored_layers") or raw.get("modules_to_not_convert") or []
    found.ignore = _LeftOut(_texts(skipped, "ignored_layers", problems), False, problems)
    ignore = _texts(raw.get("ignore") or [], "ignore", problems)
    weights = FP8_BLOCK.weights | {"block_structure": tile}
    found.groups = [
        Group(
            "NVFP4 experts", _Experts(family, ignore, problems), NVFP4.weights, NVFP4.input_activations, NVFP4_FORMAT
        ),
        Group("FP8", _Linears(head=False), weights, FP8_BLOCK.input_activations, FP8_BLOCK.format, implied=True),
    ]


def _read_modelopt(raw: dict[str, Any], config: dict[str, Any], family: Family, found: Quantization) -> None:
    inner = raw.get("quantization") if isinstance(raw.get("quantization"), dict) else raw
    assert isinstance(inner, dict)
    algorithm = str(inner.get("quant_algo")).upper()
    if algorithm == "MIXED_PRECISION":
        found.unresolved = f"{_KEY}: modelopt's MIXED_PRECISION is not resolved here: its layers were not compared"
        return
    if algorithm not in ("NVFP4", "W4A16_NVFP4"):
        found.problems.append(f"{_KEY}: quant_algo is {inner.get('quant_algo')!r:.60}, NVFP4 or W4A16_NVFP4 is needed")
        return
    if inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme"):
        found.unresolved = f"{_KEY}: the KV cache is quantized, which is not checked here"
    _group_size(inner, found.problems)
    groups = raw.get("config_groups")
    without_inputs = isinstance(groups, dict) and bool(groups) and all(
        isinstance(group, dict) and group.get("input_activations") is None for group in groups.values()
    )  # fmt: skip
    scheme = NVFP4A16 if algorithm != "NVFP4" or without_inputs else NVFP4
    excluded = inner.get("exclude_modules") if inner is not raw else raw.get("ignore")
    entries = []
    for entry in _texts(excluded or [], "ignore", found.problems):
        # `path*` means the module and what is below it.
        entries += [entry[:-1], entry[:-1] + ".*"] if re.search(r"[^.]\*$", entry) else [entry]
    found.ignore = _LeftOut(tuple(entries), True, found.problems)
    found.groups = [Group(scheme.name, _Linears(head=True), scheme.weights, scheme.input_activations, NVFP4_FORMAT)]


def _group_size(raw: dict[str, Any], problems: list[str]) -> None:
    if raw.get("group_size") not in (None, GROUP):
        problems.append(f"{_KEY}: group_size is {raw['group_size']!r:.60}, NVFP4 has {GROUP}")


def _texts(value: Any, where: str, problems: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        problems.append(f"{_KEY}.{where}: a list of names is needed, found {value!r:.60}")
        return ()
    return tuple(value)
