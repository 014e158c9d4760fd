"""A miniature of a task: the first block of every kind with all that stands outside the blocks, renumbered, as a source and a
task of its own. Everything that works on a task works on it.

The miniature reads the source's own shards through links. Its plan does to each of its tensors what the task's plan does to
the same tensor; a source for which that cannot be shown has no miniature.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import write_json, write_safely
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.checkpoint.side_files import side_files
from calibration.families.cut import block_traits, cut_config
from calibration.families.registry import expected_tensors
from calibration.plan.plan import Plan, Step
from calibration.plan.task import Task
from recipes.checks import Verify
from recipes.errors import WorkflowError
from recipes.modifiers import ModifierEntry, QuantizationArguments
from recipes.schema import Offload, Recipe

#: modelopt's description of a source, which tells its stored format (calibration.checkpoint.foreign).
_DESCRIPTION = "hf_quant_config.json"
#: Tokens of a sample and number of samples: enough for windows of attention, and few.
SAMPLES, TOKENS = 4, 160


class NoMiniature(Exception):
    """Why a task has no miniature. It says nothing against the task."""


@dataclass(frozen=True)
class Cut:
    """The blocks of a source that its miniature keeps, in their order; the numbers of all blocks of each kind; the config.json
    of the miniature, and its tensors: name in the source -> name in the miniature."""

    kept: tuple[int, ...]
    kinds: tuple[tuple[int, ...], ...]
    config: dict[str, Any]
    names: dict[str, str]

    def output_bytes(self, plan: Plan) -> int:
        """Bytes that `plan` writes for these tensors."""
        return sum(tensor.nbytes for name in self.names if name in plan.steps for tensor in plan.steps[name].outputs)


def kinds_of_blocks(task: Task) -> list[tuple[int, ...]]:
    """The numbers of equal blocks, kind by kind in the order of their first block. Equal are blocks with the same tensors (names,
    stored dtypes, shapes), planned alike, of which config.json says the same."""
    plan = task.plan
    content: dict[int, set[object]] = {number: set() for number in plan.block_numbers}
    for name, step in plan.steps.items():
        if (number := task.family.place(name).block) is not None:
            scheme = plan.groups[step.group].name if step.group in plan.groups else step.group
            header = task.source.header(name)
            own = _renumbered(task.family.block, name, 0)
            content[number].add((own, header.dtype, header.shape, step.action, step.group, scheme))
    traits = block_traits(task.source.config, len(content), task.family.language)
    found: dict[object, list[int]] = {}
    for number, inside in content.items():
        found.setdefault((frozenset(inside), traits[number]), []).append(number)
    return [tuple(numbers) for numbers in found.values()]


def find_cut(task: Task) -> Cut:
    """The cut of a task's source to the first block of every kind, or, if config.json cannot say that, to the blocks before and
    up to the last of these. Raises NoMiniature."""
    numbers = task.plan.block_numbers
    if not numbers or numbers != list(range(len(numbers))):
        raise NoMiniature(
            f"its blocks are numbered {numbers[:3]} ..., not from 0 on" if numbers else "it has no blocks"
        )
    kinds = kinds_of_blocks(task)
    first = tuple(kind[0] for kind in kinds)
    for kept in dict.fromkeys((first, tuple(range(max(first) + 1)))):
        cut = Cut(kept, tuple(kinds), _config(task, kept), _names(task, kept))
        if _is_proven(task, cut):
            return cut
    raise NoMiniature(
        f"config.json cannot be cut to blocks {', '.join(map(str, first))} in a way that promises exactly their tensors"
    )


def make_miniature(task: Task, cut: Cut, directory: Path) -> Task:
    """The task of the miniature: its source is written to `<directory>/source` (config and side files; links instead of
    shards), its output will be `<directory>/output`. Raises NoMiniature if the recipe plans these tensors otherwise there than
    in the whole source, and OSError."""
    where = directory / "source"
    where.mkdir(parents=True)
    source = task.source
    write_json(where / CONFIG_NAME, cut.config)
    beside = [source.directory / _DESCRIPTION] if (source.directory / _DESCRIPTION).is_file() else []
    for path in (*side_files(source.directory).copied, *beside):
        target = where / path.relative_to(source.directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_safely(target, functools.partial(shutil.copyfile, path), path.stat().st_size)
    headers = {new: replace(source.tensors[old], name=new) for old, new in cut.names.items() if old in source.tensors}
    used = {header.shard for header in headers.values()}
    shards = [shard for shard in source.shards if shard in used]
    for shard in shards:
        (where / shard).symlink_to(os.path.realpath(source.directory / shard))
    state = {shard: source.state[shard] for shard in shards}
    view = Checkpoint(where, cut.config, headers, shards, state)
    view.whole = {cut.names[old]: whole.renamed(cut.names) for old, whole in source.whole.items() if old in cut.names}
    try:
        small = Task.of(_recipe(task, cut, directory), Formats(view))
    except WorkflowError as error:
        raise NoMiniature(f"the recipe cannot be applied to it: {error.problems[0]}") from None
    if differing := _planned_otherwise(task.plan, small.plan, cut.names):
        raise NoMiniature(f"{differing} would be treated otherwise in it than in the whole source")
    return small


def _renumbered(block: str, name: str, number: int) -> str:
    found = re.search(block, name)
    return name if found is None else f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"


def _names(task: Task, kept: Sequence[int]) -> dict[str, str]:
    names = {}
    undone = [whole.undone.name for whole in task.source.whole.values() if whole.undone is not None]
    for name in (*task.source.tensors, *task.source.whole, *undone):
        place = task.family.place(name)
        if place.mtp or (place.block is not None and place.block not in kept):
            continue
        position = None if place.block is None else kept.index(place.block)
        names[name] = name if position is None else _renumbered(task.family.block, name, position)
    return names


def _config(task: Task, kept: Sequence[int]) -> dict[str, Any]:
    return cut_config(task.source.config, kept, len(task.plan.block_numbers), task.family.language)


def _is_proven(task: Task, cut: Cut) -> bool:
    """Whether the cut config promises the tensors that the source's config promises for the same blocks, and says of every
    block what the source's says."""
    try:
        whole, problems = expected_tensors(task.source.config, task.source.tensors)
        small, others = expected_tensors(cut.config, cut.names.values())
    except WorkflowError:
        return False
    wanted = {}
    for name, tensor in whole.items():
        place = task.family.place(name)
        if not place.mtp and (place.block is None or place.block in cut.kept):
            at = 0 if place.block is None else cut.kept.index(place.block)
            wanted[_renumbered(task.family.block, name, at)] = tensor
    before = block_traits(task.source.config, len(task.plan.block_numbers), task.family.language)
    traits = block_traits(cut.config, len(cut.kept), task.family.language)
    # Fewer blocks may leave a trait with one value; two blocks that differed must still differ.
    apart = all(
        traits[a] != traits[b]
        for a, one in enumerate(cut.kept)
        for b, other in enumerate(cut.kept[:a])
        if before[one] != before[other]
    )
    return not problems and not others and wanted == small and apart


def _mappings(task: Task, names: dict[str, str]) -> list[dict[str, Any]]:
    """The sites that the plan smooths in the miniature's blocks, by their names there."""
    modules = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in names.items()}
    return [
        {"smooth_layer": modules[site.smooth], "balance_layers": [modules[reader] for reader in site.readers]}
        for site in task.plan.smoothed
        if site.smooth in modules
    ]


def _recipe(task: Task, cut: Cut, directory: Path) -> Recipe:
    """The recipe for the miniature: targets by the names of the modules that the plan quantizes, because an expression may name
    block numbers; nothing is ignored; no checks of its own."""
    recipe, position = task.recipe, {old: new for old, new in cut.names.items() if old in task.plan.steps}
    targets: dict[str, list[str]] = {}
    for old, new in position.items():
        step = task.plan.steps[old]
        if step.group is not None and step.action != "consume":
            targets.setdefault(step.group, []).append(new.rpartition(".")[0])
    modifiers = []
    for entry in recipe.modifiers:
        value, arguments = getattr(entry, entry.name), dict(entry.arguments)
        if isinstance(value, QuantizationArguments) and (groups := value.groups()):
            for key in ("targets", "scheme", "ignore"):
                arguments.pop(key, None)
            arguments["config_groups"] = {
                name: group.model_dump(mode="json", exclude_unset=True) | {"targets": targets[name]}
                for name, group in groups.items()
                if name in targets
            }
        if entry.smoothing is not None and (entry.smoothing.mappings or entry.smoothing.ignore):
            arguments |= {"mappings": _mappings(task, position), "ignore": []}
        if entry.smoothing is None or arguments.get("mappings") != []:
            modifiers.append(ModifierEntry.model_validate({entry.name: arguments}))
    data = recipe.calibration
    if data is not None:
        least = min(data.min_tokens_per_expert, SAMPLES)
        data = data.model_copy(update={"num_samples": SAMPLES, "exact": False, "min_tokens_per_expert": least})
    changes = {
        "source": recipe.source.model_copy(update={"checkpoint": str(directory / "source"), "revision": None}),
        "output": str(directory / "output"),
        "modifiers": modifiers,
        "calibration": data,
        "offload": Offload(max_host_memory=recipe.offload.max_host_memory),
        "verify": Verify(fidelity=None),
    }
    return recipe.model_copy(update=changes)


def _planned_otherwise(whole: Plan, small: Plan, names: dict[str, str]) -> str | None:
    """The first tensor of the miniature with another step than in the whole plan; None if there is none."""

    def essence(step: Step, new: str | None) -> tuple[object, ...]:
        outputs = [(tensor.dtype, tensor.shape) for tensor in step.outputs]
        return step.action, step.group, outputs, new

    for old, new in names.items():
        step = small.steps.get(new)
        if (old in whole.steps) != (step is not None):
            return old
        if step is not None and essence(whole.steps[old], new) != essence(step, step.source):
            return old
    return None
