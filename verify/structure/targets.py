"""Reads quantization_config as vLLM does: finds the config group of each module and compares it with the stored format.

Source: vllm (0.32) model_executor/layers/quantization/compressed_tensors/utils.py (find_matched_target,
should_ignore_layer) and compressed_tensors_moe.py (get_moe_method resolves routed experts through expert 0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calibration.checkpoint.formats import module_of
from calibration.checkpoint.nvfp4 import GROUP
from calibration.families.family import NOT_LINEAR, ROUTED, Family
from recipes.patterns import Pattern, PatternError, TimeLimit
from verify.structure.stored import Stored

METHOD = "compressed-tensors"
NVFP4_FORMAT = "nvfp4-pack-quantized"
_MIXED = "mixed-precision"
_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP}


@dataclass(frozen=True)
class Group:
    """One config group. `weights` and `inputs` are its arguments, `format` defaults to the config's."""

    name: str
    targets: Names
    weights: dict[str, Any]
    inputs: dict[str, Any] | None
    format: str | None
    #: Whether it is one of vLLM's own, which may match no module.
    implied: bool = False

    @property
    def nvfp4(self) -> bool:
        """Whether it is NVFP4: 4-bit float in groups of 16 under a global scale."""
        return {key: self.weights.get(key) for key in _WEIGHTS} == _WEIGHTS

    @property
    def input_scale(self) -> bool:
        """Whether its modules need a calibrated input global scale; dynamic "local" only computes group scales."""
        return self.inputs is not None and self.inputs.get("dynamic") is not True

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.weights.get('num_bits')}-bit {self.weights.get('type')} ({self.format})"


class Names:
    """Targets or ignore entries, matched as in vLLM: `re:` from the start of vLLM's names, others by equality, also
    with the source's name, which vLLM maps to its own. An entry that is not a valid pattern, or takes too long to
    match, is added to `problems` and matches nothing from then on."""

    def __init__(self, entries: Sequence[str], where: str, problems: list[str], limit: TimeLimit) -> None:
        self.entries = tuple(entries)
        self._exact = frozenset(e for e in entries if not e.startswith("re:"))
        self._where, self._problems = where, problems
        self._patterns: dict[str, Pattern] = {}
        for entry in dict.fromkeys(e for e in entries if e.startswith("re:")):
            try:
                self._patterns[entry] = Pattern(entry[3:], limit)
            except PatternError as error:
                self._refuse(entry, error)

    def name(self, module: str, names: Iterable[str]) -> bool:
        """Whether an entry matches the source module, whose names in vLLM are `names`."""
        if module in self._exact:
            return True
        return any(n in self._exact or any(self._match(e, n) for e in tuple(self._patterns)) for n in names)

    def idle(self, modules: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Entries that match none of the modules (source module -> vLLM's names)."""
        served = {name for names in modules.values() for name in names}
        every = served | modules.keys()
        return [
            e for e in self.entries
            if (not any(self._match(e, name) for name in served) if e.startswith("re:") else e not in every)
        ]  # fmt: skip

    def _match(self, entry: str, name: str) -> bool:
        try:
            return entry in self._patterns and self._patterns[entry].match(name)
        except PatternError as error:
            self._refuse(entry, error)
            return False

    def _refuse(self, entry: str, error: PatternError) -> None:
        self._patterns.pop(entry, None)
        self._problems.append(f"quantization_config.{self._where}: {entry[:200]!r} {error}")


@dataclass
class Quantization:
    """The parsed `quantization_config`; `problems` are reasons why vLLM cannot read it."""

    groups: list[Group] = field(default_factory=list)
    ignore: Names = field(default_factory=lambda: Names((), "ignore", [], TimeLimit()))
    problems: list[str] = field(default_factory=list)
    present: bool = False
    #: The part that this project does not support, so that nothing can be compared; None if there is none.
    unresolved: str = ""

    def group(self, module: str, names: tuple[str, ...], linear: bool) -> Group | None:
        """The group of a module: the first that matches it, else the one of `Linear` if the module is a `linear` layer
        in vLLM; None if there is none or ignore matches the module."""
        if self.ignore.name(module, names):
            return None
        named = next((group for group in self.groups if group.targets.name(module, names)), None)
        return named or (next((g for g in self.groups if "Linear" in g.targets.entries), None) if linear else None)


def read_quantization(config: dict[str, Any]) -> Quantization:
    """Parses `quantization_config`; every malformed part becomes a problem."""
    raw = config.get("quantization_config")
    found = Quantization(present=raw is not None)
    if raw is None:
        return found
    if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
        method = raw.get("quant_method") if isinstance(raw, dict) else raw
        found.problems.append(f"quantization_config: quant_method is {method!r}, {METHOD} is needed")
        return found
    limit = TimeLimit()

    def names(value: Any, where: str) -> Names:
        return Names(_entries(value, where, found.problems), where, found.problems, limit)

    found.ignore = names(raw.get("ignore") or [], "ignore")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        found.problems.append("quantization_config: config_groups is missing or empty")
        return found
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            found.problems.append(f"{where}: weights is missing")
            continue
        inputs = group.get("input_activations")
        if inputs is not None and not isinstance(inputs, dict):
            found.problems.append(f"{where}: input_activations is no mapping")
            inputs = None
        targets = names(group.get("targets"), f"config_groups.{name}.targets")
        form = group.get("format") or raw.get("format")
        made = Group(str(name), targets, group["weights"], inputs, form if isinstance(form, str) else None)
        found.groups.append(made)
        if not targets.entries:
            found.problems.append(f"{where}: targets is empty")
        if made.nvfp4 and made.format != NVFP4_FORMAT:
            found.problems.append(f"{where}: weights are NVFP4 and format is {made.format!r}, {NVFP4_FORMAT} is needed")
        if made.nvfp4 and inputs is not None and {key: inputs.get(key) for key in _WEIGHTS} != _WEIGHTS:
            found.problems.append(f"{where}: weights are NVFP4 and input_activations are not")
        if made.nvfp4 and inputs is not None and inputs.get("dynamic") is True:
            found.problems.append(f"{where}: input_activations are dynamic; vLLM takes a stored input_global_scale")
        for side, arguments in (("weights", group["weights"]), ("input_activations", inputs or {})):
            if made.nvfp4 and arguments.get("symmetric", True) is not True:
                found.problems.append(f"{where}: {side} are NVFP4 and not symmetric: vLLM has no such scheme")
    if raw.get("format") not in {None, _MIXED, *(g.format for g in found.groups)}:
        found.problems.append(f"quantization_config: format {raw.get('format')!r} is that of no config group")
    return found


def _entries(value: Any, where: str, problems: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        problems.append(
            f"quantization_config.{where}: a list of names and 're:' patterns is needed, found {value!r:.60}"
        )
        return ()
    return tuple(value)


class Resolution:
    """How vLLM treats every module of a checkpoint. `names` maps source modules with a 2-D weight to vLLM's names,
    except MTP and modules that are only read in their stored format."""

    def __init__(self, family: Family, quantization: Quantization, stored: dict[str, Stored]) -> None:
        self.family, self.quantization = family, quantization
        self.modules = {
            module_of(name): found for name, found in stored.items()
            if name.endswith(".weight") and len(found.shape) == 2 and not (place := family.place(name)).mtp
            and place.part not in family.native_parts
        }  # fmt: skip
        self.names = {module: family.serving_names(module) for module in self.modules}
        # vLLM looks up all experts of a block through expert 0.
        self._known: dict[str, Group | None] = {}

    def group(self, module: str) -> Group | None:
        """The group that vLLM applies to a module; None for modules that it always runs unquantized."""
        part, names = self.family.place(f"{module}.weight").part, self.names.get(module, ())
        linear = part not in NOT_LINEAR or part in self.family.serving_quantizes
        if not names or not linear or any(re.search(pattern, module) for pattern, _ in self.family.never_quantized):
            return None
        seen = re.sub(self.family.expert, ".experts.0.", module) if part == ROUTED else module
        if seen not in self._known:
            # vLLM's head is not a Linear: only its own name matches it.
            self._known[seen] = self.quantization.group(seen, names, part != "head")
        return self._known[seen]

    def problems(self) -> tuple[list[str], list[str]]:
        """Problems: a module whose stored format differs from what vLLM expects, a group that matches nothing, a fused
        group ignored in part. Doubts: entries that match nothing, routed experts named in only one of vLLM's two
        spellings."""
        quantization, problems, doubts = self.quantization, list[str](), list[str]()
        if quantization.unresolved:
            return quantization.problems, [quantization.unresolved]
        if not quantization.present:
            low_bit = [module for module, found in self.modules.items() if found.low_bit]
            return [f"{m}: stored quantized, config.json has no quantization_config" for m in low_bit], []
        used: set[str] = set()
        for module, found in self.modules.items():
            group, names = self.group(module), self.names[module]
            if group is None:
                if found.low_bit:
                    why = "ignore names it" if quantization.ignore.name(module, names) else "no target names it"
                    problems.append(f"{module}: stored quantized, {why} in vLLM, which calls it {' or '.join(names)}")
            elif not found.low_bit:
                problems.append(f"{module}: stored as {found.header.dtype}, {group.name} says that it is quantized")
            else:
                used.add(group.name)
                if found.nvfp4 != group.nvfp4:
                    form = "NVFP4" if found.nvfp4 else found.header.dtype
                    problems.append(f"{module}: stored as {form}, {group.name} says {group.label}")
        head = quantization.group("lm_head", ("lm_head",), False)
        if head is not None and not any("lm_head" in names for names in self.names.values()):
            problems.append(f"lm_head: is not stored (tied), vLLM builds one and {head.name} says that it is quantized")
        for group in quantization.groups:
            if group.name not in used and not group.implied:
                problems.append(f"{group.name}: its targets name nothing that is stored quantized")
            doubts += [
                f"{group.name}: target {t!r} names nothing" for t in group.targets.idle(self.names) if t != "Linear"
            ]
        # The head exists in vLLM even if a tied checkpoint does not store it.
        idle = quantization.ignore.idle(self.names | {"lm_head": ("lm_head",)})
        doubts += [f"ignore: {entry!r} names nothing" for entry in idle]
        for names in dict.fromkeys(names for names in self.names.values() if len(names) > 1):
            spelled = [name for name in names if self.quantization.group("", (name,), True)]
            if len(spelled) == 1:
                doubts.append(f"targets name {spelled[0]} and not {' or '.join(n for n in names if n not in spelled)}: "
                              "vLLM's CUDA and CPU models differ")  # fmt: skip
        for group_modules in self.family.fused(m for m in self.modules if self.names[m]):
            if len({quantization.ignore.name(m, self.names[m]) for m in group_modules}) > 1:
                problems.append(f"ignore names only a part of what is served as one matrix: {', '.join(group_modules)}")
        return [*quantization.problems, *problems], doubts
