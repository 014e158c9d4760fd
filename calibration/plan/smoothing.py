"""Which layers a recipe smooths, and with which others: from names and shapes, before a tensor is read.

A site is a layer that takes factors out of its output channels (a norm, v_proj, up_proj) and every layer that reads them,
which takes them in. One reader left out would change the model, so a site is only made if everything beside its readers
is known; the engine proves each of them on the loaded block (calibration.engine.smoothing). Names are those of
transformers' tree with linearized experts, which llm-compressor's mappings use too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from calibration.checkpoint.formats import Formats, logical_name, module_of
from calibration.families.family import Family
from calibration.families.registry import language_config
from calibration.plan.plan import Smoothed, Step
from recipes.errors import RecipeError, collapsed, without_numbers
from recipes.fields import KEPT_FP8
from recipes.patterns import Pattern, PatternError, TimeLimit
from recipes.schema import Recipe
from recipes.smoothing import SmoothMapping

#: Norms of a block -> the one that the MLP reads. Attention reads input_layernorm in all of them.
_MLP_NORM = {
    frozenset({"input_layernorm", "post_attention_layernorm"}): "post_attention_layernorm",
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    ): "pre_feedforward_layernorm",
}
_READS_ATTENTION_NORM = r"self_attn\.((q|k|v|qkv|q_a)_proj|kv_a_proj_with_mqa)"
_READS_MLP_NORM = r"mlp\.((experts\.\d+\.|shared_experts?\.)?(gate|up|gate_up)_proj|gate|shared_expert_gate)"
#: Modules beside those, which read something else.
_INSIDE_ATTENTION = r"self_attn\.(o_proj|[qk]_norm|q_a_layernorm|q_b_proj|kv_a_layernorm|kv_b_proj)"
_INSIDE_MLP = r"mlp\.(experts\.\d+\.|shared_experts?\.)?down_proj"
_VALUES, _OUTPUT = "self_attn.v_proj", "self_attn.o_proj"
_LeftOut = Callable[[str, str], None]


def smoothed_sites(
    recipe: Recipe, formats: Formats, family: Family, steps: Mapping[str, Step]
) -> tuple[tuple[Smoothed, ...], list[str]]:
    """The sites that the recipe's modifier smooths, and a note for each kind that it leaves out. Raises RecipeError for
    mappings that match nothing or ask for what cannot be smoothed."""
    arguments = recipe.smoothing
    if arguments is None:
        return (), []
    notes: dict[str, str] = {}
    chosen = _Choice(arguments.mappings, arguments.ignore, family)
    found = [
        site
        for block in _blocks(formats, family)
        for site in block.sites(lambda module, why: chosen.leave_out(notes, module, why))
        if chosen.takes(site)
    ]
    sites = []
    for site in found:
        if why := _stays(recipe, formats, steps, site):
            chosen.leave_out(notes, site.smooth, why)
        elif any(_rounds_coarsely(recipe, _step(formats, steps, reader)) for reader in site.readers):
            sites.append(site)
    problems = chosen.problems(found)
    if problems:
        raise RecipeError(collapsed(problems))
    if not sites:
        notes["nothing"] = "modifiers: nothing in this model is smoothed"
    return tuple(sites), list(notes.values())


def possible_sites(formats: Formats, family: Family) -> tuple[Smoothed, ...]:
    """Every site that the model's structure allows, whatever a recipe smooths: those of a checkpoint whose recipe is unknown are
    among them."""
    stored = {module_of(name) for name in formats.checkpoint.tensors if logical_name(name).endswith(".weight")}
    return tuple(
        site
        for block in _blocks(formats, family)
        for site in block.sites(lambda module, why: None)
        if stored.issuperset((site.smooth, *site.readers))
    )


def rescaled_steps(steps: Mapping[str, Step], sites: tuple[Smoothed, ...]) -> dict[str, Step]:
    """The steps, with the action `rescale` for each tensor that takes a factor and is not quantized."""
    rows = {site.smooth: site for site in sites}
    columns = {reader: site for site in sites for reader in site.readers}
    changed = {}
    for name, step in steps.items():
        scaled = []
        if step.module in rows:
            leaves = sorted({leaf(reader) for reader in rows[step.module].readers})
            scaled.append(f"loses the factors that {', '.join(leaves)} take in")
        if step.module in columns and not name.endswith("bias"):
            scaled.append(f"takes in the factors that {leaf(columns[step.module].smooth)} loses")
        if scaled and step.action in ("copy", "cast"):
            part = step.reason.partition(":")[0]
            changed[name] = replace(step, action="rescale", reason=f"{part}: {' and '.join(scaled)} (smoothing)")
    return dict(steps) | changed


def leaf(module: str) -> str:
    """The last part of a module's name."""
    return module.rpartition(".")[2]


class _Choice:
    """The sites that a recipe's mappings and ignore entries choose."""

    def __init__(self, mappings: list[SmoothMapping] | None, ignore: list[str], family: Family) -> None:
        limit = TimeLimit()
        self._family, self._given = family, mappings
        self._mappings = [
            (_Entry(m.smooth_layer, limit), [_Entry(t, limit) for t in m.balance_layers]) for m in mappings or ()
        ]
        self._ignore = [_Entry(entry, limit) for entry in ignore]
        self._refused: dict[str, str] = {}

    def takes(self, site: Smoothed) -> bool:
        if any(entry.matches(self._names(site.smooth)) for entry in self._ignore):
            return False
        if self._given is None:
            return True
        return any(
            smooth.matches(self._names(site.smooth))
            and any(entry.matches(self._names(reader)) for entry in readers for reader in site.readers)
            for smooth, readers in self._mappings
        )

    def leave_out(self, notes: dict[str, str], module: str, why: str) -> None:
        """Notes a site that cannot be made, or, if the recipe names it, refuses it."""
        pattern = without_numbers(module)
        if any(smooth.matches(self._names(module)) for smooth, _ in self._mappings):
            self._refused.setdefault(
                pattern, f"modifiers: {module} cannot be smoothed: {why}; leave it out of mappings"
            )
        elif self._given is None:
            notes.setdefault(f"{pattern} {why}", f"modifiers: {pattern} is not smoothed: {why}")

    def problems(self, found: list[Smoothed]) -> list[str]:
        """Why the mappings cannot be followed."""
        idle = [
            f"modifiers: mappings.{number}: {self._given[number].smooth_layer!r} and its balance_layers match no layers that "
            "read each other here; names are spelled as in the source or in transformers"
            for number, (smooth, readers) in enumerate(self._mappings)
            if self._given is not None
            and not any(
                smooth.matches(self._names(site.smooth))
                and any(entry.matches(self._names(reader)) for entry in readers for reader in site.readers)
                for site in found
            )
        ]
        return [*self._refused.values()] or idle

    def _names(self, module: str) -> tuple[str, ...]:
        model_name = self._family.model_name(module)
        return (module,) if model_name in (None, module) else (module, str(model_name))


class _Entry:
    """A name, or a regular expression after `re:`."""

    def __init__(self, text: str, limit: TimeLimit) -> None:
        self._text = text
        self._pattern = Pattern(text.removeprefix("re:"), limit) if text.startswith("re:") else None

    def matches(self, names: tuple[str, ...]) -> bool:
        """Whether one of a module's names matches. Raises RecipeError for a pattern that takes too long."""
        if self._pattern is None:
            return self._text in names
        try:
            return any(self._pattern.match(name) for name in names)
        except PatternError as error:
            raise RecipeError(f"modifiers: {self._text!r} {error}") from None


def _blocks(formats: Formats, family: Family) -> Iterator[_Block]:
    blocks: dict[int, dict[str, str]] = defaultdict(dict)
    for tensor in formats.checkpoint.tensors:
        module, place = module_of(tensor), family.place(tensor)
        name = family.model_name(module)
        if place.block is not None and name is not None and tensor not in formats.companions:
            blocks[place.block].setdefault(re.sub(r"^.*?\.\d+\.", "", name, count=1), module)
    config = language_config(formats.checkpoint.config)
    heads = int(config.get("num_attention_heads") or 0)
    head = int(config.get("head_dim") or (int(config.get("hidden_size") or 0) // heads if heads else 0))
    for _, modules in sorted(blocks.items()):
        yield _Block(modules, formats, head)


def _step(formats: Formats, steps: Mapping[str, Step], module: str) -> Step:
    return steps[next(n for n in (f"{module}.weight", f"{module}.weight_packed") if n in steps)]


def _rounds_coarsely(recipe: Recipe, step: Step) -> bool:
    """Whether a step quantizes to four bits: eight lose little that smoothing could bring back."""
    groups = recipe.quantization_modifier.config_groups
    return step.action == "quantize" and groups[str(step.group)].preset != "FP8_BLOCK"


def _stays(recipe: Recipe, formats: Formats, steps: Mapping[str, Step], site: Smoothed) -> str | None:
    """Why one of the layers cannot change its weight; None if all can."""
    for module in (site.smooth, *site.readers):
        step = _step(formats, steps, module)
        stored = formats.of(step.source)
        if step.group == KEPT_FP8 or step.action not in ("copy", "cast", "quantize"):
            return f"{without_numbers(module)} keeps its stored FP8 codes (export.kept: plain would change that)"
        if step.action == "copy" and stored.kind != "plain":
            return f"{without_numbers(module)} is copied as {stored.label}"
        if step.action == "quantize" and stored.kind == "mxfp4" and recipe.export.mxfp4 == "lossless":
            return f"{without_numbers(module)} keeps its MXFP4 values (export.mxfp4: requantize would change that)"
    return None


@dataclass(frozen=True)
class _Block:
    """The modules of one block, by their names in transformers' tree below it."""

    modules: Mapping[str, str]
    formats: Formats
    #: Channels of an attention head's values.
    head: int

    def sites(self, left_out: _LeftOut) -> Iterator[Smoothed]:
        """Yields the sites; calls `left_out` with the norm and the reason for those that cannot be made."""
        norms = {name for name in self.modules if "." not in name and name.endswith("norm")}
        reads = _MLP_NORM.get(frozenset(norms))
        if reads is None:
            for norm in sorted(norms):
                left_out(self.modules[norm], f"what reads it is not known in a block with {', '.join(sorted(norms))}")
        else:
            yield from self._below_norm(
                "input_layernorm", "self_attn.", _READS_ATTENTION_NORM, _INSIDE_ATTENTION, left_out
            )
            yield from self._below_norm(reads, "mlp.", _READS_MLP_NORM, _INSIDE_MLP, left_out)
        yield from self._values(left_out)
        for name, module in self.modules.items():
            down = name.removesuffix("up_proj") + "down_proj"
            if name.endswith("up_proj") and not name.endswith("gate_up_proj") and down in self.modules:
                yield Smoothed(module, (self.modules[down],))

    def _below_norm(self, norm: str, below: str, readers: str, known: str, left_out: _LeftOut) -> Iterator[Smoothed]:
        inside = [name for name in self.modules if name.startswith(below)]
        elsewhere = [name for name in self.modules if "." in name and not name.startswith(("self_attn.", "mlp."))]
        strangers = elsewhere + [name for name in inside if not re.fullmatch(f"{readers}|{known}", name)]
        found = tuple(self.modules[name] for name in inside if re.fullmatch(readers, name))
        if strangers or not found:
            reads = f"{without_numbers(strangers[0])} may read it too" if strangers else "nothing reads it"
            left_out(self.modules[norm], reads)
        else:
            yield Smoothed(self.modules[norm], tuple(sorted(found)))

    def _values(self, left_out: _LeftOut) -> Iterator[Smoothed]:
        if not {_VALUES, _OUTPUT} <= self.modules.keys():
            return
        if any(f"{self.modules[name]}.weight" not in self.formats.checkpoint.tensors for name in (_VALUES, _OUTPUT)):
            return left_out(self.modules[_VALUES], "it is stored packed")
        rows, columns = (
            self.formats.of(f"{self.modules[name]}.weight").shape[axis] for name, axis in ((_VALUES, 0), (_OUTPUT, 1))
        )
        strangers = [
            name
            for name in self.modules
            if name.startswith("self_attn.") and not re.fullmatch(f"{_READS_ATTENTION_NORM}|{_INSIDE_ATTENTION}", name)
        ]
        if strangers or columns % rows or not self.head or rows % self.head:
            left_out(
                self.modules[_VALUES], f"{strangers[0]} may change it" if strangers else "its heads do not fit o_proj"
            )
        else:
            yield Smoothed(self.modules[_VALUES], (self.modules[_OUTPUT],), self.head)
