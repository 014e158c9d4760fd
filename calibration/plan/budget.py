"""A size budget: which modules must be alike, what each may become at which size, and the recipe of a choice.

The recipe without `budget` is the plan that everything starts from. The modules that it quantizes are divided into units, which
vLLM gives one scheme each: projections that it fuses, all routed experts of a block, or a single module. The rest of the output
(embedding, head, routers, norms, MTP, what is ignored) counts as it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from calibration.checkpoint.dequantize import StoredFormat
from calibration.checkpoint.formats import Formats, module_of
from calibration.checkpoint.header import OutputTensor
from calibration.families.family import ROUTED
from calibration.plan.knapsack import Choice, choose
from calibration.plan.matching import resolved_targets
from calibration.plan.plan import Plan, Step
from calibration.plan.planner import make_plan
from calibration.plan.schemes import SCHEMES
from calibration.plan.task import Task
from calibration.plan.tiled import Heights, stacked_heights
from recipes.budget import UNQUANTIZED, Budget
from recipes.errors import RecipeError, WorkflowError, collapsed
from recipes.modifiers import ModifierEntry
from recipes.schema import Recipe

#: Tokens of a sample: several short texts say more about a module than one long one.
_SAMPLE = 128
_PLAIN_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Unit:
    """Modules (source names) of a block that get one scheme: `sizes` maps each candidate that they may become to their bytes
    in the output."""

    name: str
    block: int
    modules: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def smallest(self) -> str:
        """The candidate with the fewest bytes."""
        return min(self.sizes, key=self.sizes.__getitem__)


@dataclass(frozen=True)
class BudgetTask:
    """A recipe with a budget on a source: the `plan` of the recipe without it, and the units with more than one candidate."""

    recipe: Recipe
    formats: Formats
    plan: Plan
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, recipe: Recipe, formats: Formats) -> BudgetTask:
        """The units of `recipe`, which has a budget. Raises as `make_plan`; RecipeError if the budget is smaller than
        the smallest choice or leaves nothing to choose, or if its candidates cannot be written together."""
        base = recipe.model_copy(update={"budget": None})
        plan = make_plan(formats.checkpoint, formats, base)
        found = cls(recipe, formats, plan, tuple(_units(plan, formats, recipe)))
        if problems := found._problems():
            raise RecipeError(problems)
        return found

    @property
    def budget(self) -> Budget:
        """The recipe's budget."""
        assert self.recipe.budget is not None, "BudgetTask.of requires it"
        return self.recipe.budget

    @property
    def limit(self) -> int:
        """The largest output in bytes."""
        return int(self.budget.bits_per_parameter * self.plan.parameters / 8)

    @property
    def text(self) -> tuple[int, int]:
        """Samples of calibration text on which the units are measured, and the most tokens of each."""
        calibration = self.recipe.calibration
        assert calibration is not None, "a budget needs method calibrate"
        length = min(_SAMPLE, calibration.max_seq_length, self.budget.tokens)
        return min(-(-self.budget.tokens // length), calibration.num_samples), length

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of everything that no choice changes."""
        chosen = {module for unit in self.units for module in unit.modules}
        return self.plan.output_bytes - sum(_written(step) for step in _weights(self.plan) if step.module in chosen)

    def nbytes(self, choice: Mapping[str, str]) -> int:
        """Bytes of the output with this choice, unit -> candidate."""
        return self.fixed_bytes + sum(unit.sizes[choice[unit.name]] for unit in self.units)

    def bits(self, nbytes: int) -> float:
        """Bits per parameter of an output of so many bytes, as the plan counts them."""
        return nbytes * 8 / self.plan.parameters

    @cached_property
    def smallest(self) -> dict[str, str]:
        """The choice of the smallest output."""
        return {unit.name: unit.smallest for unit in self.units}

    @cached_property
    def largest(self) -> dict[str, str]:
        """The choice of the largest output."""
        return {unit.name: max(unit.sizes, key=unit.sizes.__getitem__) for unit in self.units}

    def choose(self, errors: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, str], Choice]:
        """The choice within the budget with the least sum of `errors` (unit -> candidate -> error)."""
        items = [[(size, errors[unit.name][name]) for name, size in unit.sizes.items()] for unit in self.units]
        found = choose(items, self.limit - self.fixed_bytes)
        names = [list(unit.sizes)[option] for unit, option in zip(self.units, found.options, strict=True)]
        return {unit.name: name for unit, name in zip(self.units, names, strict=True)}, found

    def recipe_of(self, choice: Mapping[str, str]) -> Recipe:
        """The recipe with the choice written out as config groups, without the budget."""
        wanted: dict[str, list[str]] = defaultdict(list)
        chosen = {module: unit.name for unit in self.units for module in unit.modules}
        for step in _weights(self.plan):
            name = chosen.get(step.module)
            scheme = self.plan.groups[str(step.group)].name if name is None else choice[name]
            if step.group in self._own_groups and scheme != UNQUANTIZED:
                wanted[scheme].append(step.module)
        entry = self.recipe.quantization_modifier
        everything = [
            module_of(name)
            for name in self.formats.checkpoint.tensors
            if name.endswith((".weight", ".weight_packed")) and name not in self.formats.companions
        ]
        groups = {
            scheme.lower(): {"targets": resolved_targets(wanted[scheme], everything), "scheme": scheme}
            for scheme in SCHEMES
            if scheme in wanted
        }
        arguments = {**entry.arguments, "config_groups": groups, "ignore": entry.ignore}
        modifiers = list(self.recipe.modifiers)
        modifiers[entry.position] = ModifierEntry.model_validate({entry.name: arguments})
        return self.recipe.model_copy(update={"modifiers": modifiers, "budget": None})

    def task_of(self, choice: Mapping[str, str]) -> Task:
        """The task of `recipe_of`. Raises as `make_plan`, and WorkflowError if the plan has another size than the choice."""
        task, predicted = Task.of(self.recipe_of(choice), self.formats), self.nbytes(choice)
        if task.plan.output_bytes != predicted:
            raise WorkflowError(
                f"budget: a choice of {predicted:,} bytes is planned as {task.plan.output_bytes:,}: a defect here; report the "
                "model type, and write the config groups without budget"
            )
        return task

    @property
    def _own_groups(self) -> set[str]:
        return set(self.recipe.quantization_modifier.config_groups)

    def _problems(self) -> list[str]:
        asked, where = self.budget.bits_per_parameter, "budget.bits_per_parameter"
        if not self.units:
            return [
                f"budget.candidates: no module that the targets match can be more than one of "
                f"{', '.join(self.budget.candidates)}; add a candidate, or remove budget (FP8 tiles of the source stay FP8_BLOCK "
                "unless export.kept: plain, and MXFP4 weights NVFP4)"
            ]
        least, most = (self.bits(self.nbytes(choice)) for choice in (self.smallest, self.largest))
        if self.nbytes(self.smallest) > self.limit:
            fixed = self.bits(self.fixed_bytes)
            return [
                f"{where}: {asked:g} is too small: the least that these targets and candidates give is {least:.3f} "
                f"({fixed:.3f} of them are what is no choice: embedding, head, routers, norms, ignored modules); ask for more, "
                "or name more targets"
            ]
        if self.nbytes(self.largest) <= self.limit:
            return [
                f"{where}: {asked:g} leaves nothing to choose: all modules as their largest candidate have {most:.3f}; "
                "ask for less, or write the scheme without budget"
            ]
        # Every candidate beside every other: what cannot be written together must not be found out after the measurement.
        spread = {u.name: list(u.sizes)[at % len(u.sizes)] for at, u in enumerate(self.units)}
        problems: list[str] = []
        for choice in (self.smallest, spread):
            try:
                self.task_of(choice)
            except RecipeError as error:
                problems += [f"budget.candidates: {problem}" for problem in error.problems]
        return collapsed(dict.fromkeys(problems))


def _units(plan: Plan, formats: Formats, recipe: Recipe) -> list[Unit]:
    """The units with more than one candidate, in the order of the source."""
    together: dict[str, tuple[str, ...]] = {}
    steps = {step.module: step for step in _weights(plan)}
    places = {module: plan.family.place(step.source) for module, step in steps.items()}
    experts: dict[int, list[str]] = defaultdict(list)
    for module, place in places.items():
        if place.part == ROUTED and place.block is not None:
            experts[place.block].append(module)
    for group in plan.fused:
        together.update(dict.fromkeys(group, group))
    for members in experts.values():
        together.update(dict.fromkeys(members, tuple(members)))
    shapes = {module: formats.of(step.source).shape for module, step in steps.items()}
    heights = stacked_heights(plan.family, shapes, plan.fused)
    own, units, seen = set(recipe.quantization_modifier.config_groups), list[Unit](), set[str]()
    assert recipe.budget is not None
    for module, step in steps.items():
        block = places[module].block
        if module in seen or step.group not in own or step.action != "quantize" or block is None:
            continue
        modules = together.get(module, (module,))
        seen.update(modules)
        parts, part = [steps[m] for m in modules], places[module].part
        found = {name: _size(name, parts, formats, recipe, heights) for name in recipe.budget.candidates}
        sizes = {name: size for name, size in found.items() if size is not None}
        if len(sizes) > 1:
            units.append(Unit(_name(modules, part), block, modules, sizes))
    return units


def _name(modules: tuple[str, ...], part: str) -> str:
    """What messages and tables call a unit: `model.layers.3.self_attn.q_proj+k_proj+v_proj`, `model.layers.3.mlp.experts.*`."""
    parent = modules[0].rpartition(".")[0]
    if part == ROUTED:
        return f"{parent.rpartition('.')[0]}.*"
    return f"{parent}.{'+'.join(module.rpartition('.')[2] for module in modules)}" if parent else modules[0]


def _weights(plan: Plan) -> list[Step]:
    """The steps that make the weights of config groups."""
    return [step for step in plan.steps.values() if step.group is not None and step.action != "consume"]


def _written(step: Step) -> int:
    return sum(output.nbytes for output in step.outputs)


def _size(
    candidate: str, steps: list[Step], formats: Formats, recipe: Recipe, heights: Mapping[str, Heights]
) -> int | None:
    """Bytes of a unit as `candidate`; None if it cannot become that."""
    total = 0
    for step in steps:
        stored = formats.of(step.source)
        # Its values are kept exactly in NVFP4, and in no other form is there a reason to store them.
        if stored.kind == "mxfp4":
            return None
        size = (
            _unquantized(step, stored, formats, recipe)
            if candidate == UNQUANTIZED
            else _as_scheme(candidate, step, stored, heights.get(step.module, {}))
        )
        if size is None:
            return None
        total += size
    return total


def _unquantized(step: Step, stored: StoredFormat, formats: Formats, recipe: Recipe) -> int | None:
    if stored.kind == "plain":
        return formats.checkpoint.tensors[step.source].nbytes
    if stored.kind == "fp8_tiles" and recipe.export.kept == "native":
        return None  # what is no target keeps its tiles
    return math.prod(stored.shape) * _PLAIN_BYTES[recipe.export.plain_dtype]


def _as_scheme(candidate: str, step: Step, stored: StoredFormat, heights: Heights) -> int | None:
    """Bytes of one weight as a scheme, if vLLM serves it so. `heights` of the weight as in `stacked_heights`."""
    scheme = SCHEMES[candidate]
    if scheme.problem(stored.shape, heights) is not None:
        return None
    return sum(OutputTensor(*output).nbytes for output in scheme.outputs(step.module, stored.shape))
