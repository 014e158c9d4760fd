"""Makes the plan from headers, the recipe and the family's grammar, without reading a tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

from calibration.checkpoint.collector import collector_paused
from calibration.checkpoint.dequantize import StoredFormat
from calibration.checkpoint.dialect import COMPRESSED_TENSORS, DIALECTS, NVIDIA
from calibration.checkpoint.formats import Formats, module_of
from calibration.checkpoint.header import OutputTensor
from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.families.family import BESIDE, NOT_LINEAR, ROUTED, Place
from calibration.families.registry import family_of
from calibration.plan.matching import PART, Matcher
from calibration.plan.nvidia_config import nvidia_problems
from calibration.plan.plan import Plan, PlannedShard, Step
from calibration.plan.respelling import draft_head_warnings, respelled_steps, tile_scale_step
from calibration.plan.schemes import FP8_BLOCK, SCHEMES, Scheme
from calibration.plan.smoothing import rescaled_steps, smoothed_sites
from calibration.plan.source_check import contradictions, is_carried, is_left_out
from calibration.plan.tiled import stacked_heights, tiled_input_problem, tiled_rows_problem
from recipes.errors import RecipeError, SourceError, collapsed, without_numbers
from recipes.fields import KEPT_FP8
from recipes.schema import Recipe

#: Stored formats that the output never keeps: weights that are no target are written plain, with a warning.
_NOT_KEPT = frozenset({"fp8_tensor", "fp8_channel", "int4"})
_SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@collector_paused()
def make_plan(checkpoint: Checkpoint, formats: Formats, recipe: Recipe) -> Plan:
    """Makes the plan. Raises RecipeError with all problems at once: a target that matches nothing, a module in two
    groups, a shape that does not fit its scheme, a fused group or a block's routed experts matched only in part, an
    unsupported scheme, a stored format that cannot be kept. Raises SourceError if tensors contradict the source's own
    config.json (see `contradictions`)."""
    if recipe.budget is not None:
        raise RecipeError(
            "budget: a run chooses for it: `python -m workflows.run RECIPE --stages inspect` measures and writes the choice out "
            "in <output>.run/recipe.yaml; name that recipe here"
        )
    return _Planner(checkpoint, formats, recipe).plan()


class _Planner:
    def __init__(self, checkpoint: Checkpoint, formats: Formats, recipe: Recipe) -> None:
        self.checkpoint, self.formats, self.recipe = checkpoint, formats, recipe
        self.family = family_of(checkpoint.config, str(checkpoint.directory / CONFIG_NAME), checkpoint.tensors)
        self.dialect = DIALECTS[recipe.export.dialect]
        native = self.family.fp8_dialect if self.dialect is NVIDIA else None
        #: The FP8 tile that the output can keep.
        self.tile = native.tile if native is not None else tuple(FP8_BLOCK.weights["block_structure"])
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._undone_unasked: dict[str, list[str]] = defaultdict(list)
        self.weights = {
            module_of(name): name
            for name in checkpoint.tensors
            if name.endswith((".weight", ".weight_packed")) and name not in formats.companions
        }
        self.places = {module: self.family.place(self.weights[module]) for module in self.weights}
        #: Projections that the engine serves as one matrix, in its order.
        self.fused = tuple(self.family.fused(module for module in self.weights if not self.places[module].mtp))
        self.heights = stacked_heights(
            self.family, {module: formats.of(name).shape for module, name in self.weights.items()}, self.fused
        )

    def plan(self) -> Plan:
        misnamed, differing = contradictions(self.formats, self.family)
        if misnamed:  # no target can be right
            raise SourceError([*misnamed, *differing])
        if self.recipe.method == "calibrate" and self.family.not_calibrated:
            self.problems.append(
                f"method: calibrate: {self.checkpoint.directory}: {self.family.not_calibrated}; use method: convert, which "
                "keeps MXFP4 values bit for bit and needs no forward pass (input scales from convert.input_amax, none with "
                "scheme: NVFP4A16)"
            )
        plain = self.recipe.method == "plain"
        groups: dict[str, Scheme] = {}
        if not plain:
            config_groups = self.recipe.quantization_modifier.config_groups
            groups = {name: SCHEMES[group.preset] for name, group in config_groups.items()}
        assigned = {} if plain else self._assign(groups)
        self._check_whole_groups(assigned)
        steps = self._steps(assigned, groups)
        self._check_kept_tiles(steps, groups)
        if self.problems:
            raise RecipeError(collapsed([*self.problems, *differing]))
        if differing:
            raise SourceError(differing)
        smoothed, notes = smoothed_sites(self.recipe, self.formats, self.family, steps)
        steps = rescaled_steps(steps, smoothed)
        self.warnings += notes
        plan = Plan(
            family=self.family,
            steps=steps,
            shards=tuple(self._shards(steps)),
            groups=groups,
            fused=self.fused,
            warnings=(),
            parameters=self.formats.parameters,
            input_global_scale=self.recipe.export.input_global_scale,
            dialect=COMPRESSED_TENSORS.name if plain else self.dialect.name,
            input_headroom=self._input_headroom(groups),
            smoothed=smoothed,
        )
        if plan.dialect == NVIDIA.name:
            if problems := nvidia_problems(plan):
                raise RecipeError(collapsed(f"export.dialect: nvidia: {problem}" for problem in problems))
            self.warnings += draft_head_warnings(self.formats, plan)
        self._warn(plan)
        object.__setattr__(plan, "warnings", tuple(collapsed(self.warnings)))
        return plan

    def _input_headroom(self, groups: dict[str, Scheme]) -> float | None:
        calibration = self.recipe.calibration if self.recipe.method == "calibrate" else None
        scaled = any(scheme.input_scale for scheme in groups.values())
        return calibration.input_headroom if calibration is not None and scaled else None

    def _assign(self, groups: dict[str, Scheme]) -> dict[str, str]:
        """Module -> config group, after ignore."""
        modifier = self.recipe.quantization_modifier
        matcher = Matcher(self.places, self.problems, self.warnings)
        ignored: set[str] = set()
        for entry in modifier.ignore:
            ignored.update(matcher.ignored(entry))
        assigned: dict[str, str] = {}
        for name, scheme in groups.items():
            found = 0
            for target in modifier.config_groups[name].targets:
                hits = matcher.targeted(f"config_groups.{name}.targets", target)
                found += len(hits)
                left = {m: why for m in hits if m not in ignored and (why := self._why_left_out(m, target, scheme))}
                self._note_left_out(target, left)
                wanted = [m for m in hits if m not in ignored and m not in left]
                if hits and not wanted:
                    why = left.get(hits[0], self.places[hits[0]].part)
                    self.problems.append(
                        f"config_groups.{name}.targets: {target!r} matches {len(hits)} modules and none of them can be "
                        f"quantized, for example {hits[0]} ({why})"
                    )
                for module in wanted:
                    shape_problem = self._shape_problem(module, scheme)
                    if shape_problem:
                        self.problems.append(
                            f"config_groups.{name}: {self.weights[module]}: {scheme.name} {shape_problem}; "
                            "add the module to ignore"
                        )
                    if assigned.setdefault(module, name) != name:
                        self.problems.append(
                            f"config_groups: {module} is a target of both {assigned[module]} and {name}; "
                            "narrow one of the regexes"
                        )
            if not found and not self.problems:
                self.problems.append(
                    f"config_groups.{name}.targets: none of them is in this source; nothing would be quantized"
                )
        return assigned

    def _why_left_out(self, module: str, target: str, scheme: Scheme) -> str | None:
        """Why a module that a target matches stays unchanged; None if it is quantized."""
        place, stored = self.places[module], self.formats.of(self.weights[module])
        if place.mtp:
            return "MTP modules are copied byte for byte"
        if place.part in BESIDE:
            return f"a {place.part} is copied byte for byte: the language model alone is quantized"
        if never := next((why for pattern, why in self.family.never_quantized if re.search(pattern, module)), None):
            return never
        if place.part in NOT_LINEAR or len(stored.shape) != 2:
            return f"it is not a linear layer ({place.part})"
        if not self._keeps_tiles(scheme, stored):
            if re.search(self.family.not_observed, module):
                return "transformers does not run it as one matrix product, no observer would see its input"
            if self.recipe.method == "calibrate" and place.block is None and place.part != "head":
                return "calibration takes the blocks and the head alone; method: convert quantizes it"
        # A name or a regex asks for exactly these modules; `Linear` and a part ask for all that can be quantized.
        return self._whole_problem(module, scheme) if target == "Linear" or target.startswith(PART) else None

    def _shape_problem(self, module: str, scheme: Scheme) -> str | None:
        """Why a module's shape cannot have a scheme; tiles that the source stores already are judged where they are kept."""
        stored = self.formats.of(self.weights[module])
        return None if self._keeps_tiles(scheme, stored) else scheme.problem(stored.shape, self.heights.get(module, {}))

    def _whole_problem(self, module: str, scheme: Scheme) -> str | None:
        """The same for a module and those that must be quantized with it."""
        for member in (module, *self._together.get(module, ())):
            if problem := self._shape_problem(member, scheme):
                return problem if member == module else f"{member.rpartition('.')[2]}, served with it, {problem}"
        return None

    def _note_left_out(self, target: str, left: dict[str, str]) -> None:
        """Adds one warning per pattern of names; for `Linear` only one."""
        patterns: dict[str, list[str]] = defaultdict(list)
        for module, reason in left.items():
            if (pattern := without_numbers(module)) not in patterns[reason]:
                patterns[reason].append(pattern)
        if target == "Linear":
            notes = [f"{_some(names)} ({reason})" for reason, names in patterns.items()]
            warnings = [f"target 'Linear' leaves out {'; '.join(notes)}"] if notes else []
        else:
            warnings = [
                f"target {target!r} also matches {name}: stays as it is, {reason}"
                for reason, names in patterns.items()
                for name in names
            ]
        self.warnings += [warning for warning in warnings if warning not in self.warnings]

    @cached_property
    def _routed(self) -> dict[int, list[str]]:
        """Block -> its routed experts' modules."""
        experts: dict[int, list[str]] = defaultdict(list)
        for module, place in self.places.items():
            if place.part == ROUTED and place.block is not None:
                experts[place.block].append(module)
        return experts

    @cached_property
    def _together(self) -> dict[str, Sequence[str]]:
        """Module -> those that must be quantized alike; of a block's routed experts one of each shape stands for all."""
        found: dict[str, Sequence[str]] = {module: group for group in self.fused for module in group}
        for modules in self._routed.values():
            shapes = {self.formats.of(self.weights[module]).shape: module for module in modules}
            found |= dict.fromkeys(modules, tuple(shapes.values()))
        return found

    def _check_whole_groups(self, assigned: dict[str, str]) -> None:
        wholes: Iterable[tuple[str, Iterable[str]]] = [
            *(("projections that are served as one matrix", group) for group in self.fused),
            *((f"routed experts of block {block}", modules) for block, modules in self._routed.items()),
        ]
        for what, whole in wholes:
            by_group = defaultdict(list)
            kinds = set()
            for module in whole:
                by_group[assigned.get(module)].append(module)
                kinds.add(self.formats.of(self.weights[module]).kind)
            if len(kinds) > 1 and "modelopt_nvfp4" in kinds and None not in by_group and what.startswith("projections"):
                self.problems.append(
                    f"config_groups: {what} must be stored alike to be respelled: {_some(sorted(by_group.popitem()[1]))}; "
                    "write BF16 with method: plain and quantize that"
                )
                continue
            if len(by_group) > 1:
                shares = "; ".join(
                    f"{group or 'not quantized'}: {_some(modules)}"
                    for group, modules in sorted(by_group.items(), key=str)
                )
                self.problems.append(
                    f"config_groups: {what} must be quantized alike or not at all: {shares}; widen or narrow the targets"
                )

    def _check_kept_tiles(self, steps: dict[str, Step], groups: dict[str, Scheme]) -> None:
        """Adds a problem for FP8 tiles of the source that are kept and that vLLM does not load in compressed-tensors' form, and a
        warning for those that its GPU kernels do not run, in the source neither."""
        narrow: list[str] = []
        for step in steps.values():
            if (
                not step.group
                or groups[step.group] is not FP8_BLOCK
                or step.action != "copy"
                or step.module not in self.weights
            ):
                continue
            columns = self.formats.of(step.source).shape[1]
            if problem := tiled_rows_problem(self.heights.get(step.module, {}), self.tile[0]):
                self.problems.append(
                    f"{step.source}: keeps its FP8 tiles, and FP8_BLOCK {problem}; set export.kept: plain, or quantize it "
                    "otherwise"
                )
            if problem := tiled_input_problem(columns, self.tile[1]):
                narrow.append(f"{step.source} keeps its FP8 tiles, and FP8_BLOCK {problem}")
        if narrow:
            more = f" (and {len(narrow) - 1} more)" if narrow[1:] else ""
            self.warnings.append(f"{narrow[0]}, on a GPU, in the source too{more}; export.kept: plain undoes them")

    def _steps(self, assigned: dict[str, str], groups: dict[str, Scheme]) -> dict[str, Step]:
        scheme_names: dict[str, list[str]] = defaultdict(list)
        steps: dict[str, Step] = {}
        for name in self.checkpoint.tensors:
            if name not in self.formats.companions:
                steps.update(self._step(name, assigned, groups, scheme_names))
        return self._rejoined({name: steps[name] for name in self.checkpoint.tensors if name in steps})

    def _rejoined(self, steps: dict[str, Step]) -> dict[str, Step]:
        """The steps with one of each stored stack of experts instead of one for each part, where no expert of that block is
        quantized: engines read those in the source's own form, some in no other."""
        blocks = {name: self.family.place(whole.parts[0]).block for name, whole in self.checkpoint.whole.items()}
        changed = {
            blocks[name]
            for name, whole in self.checkpoint.whole.items()
            if any(part in steps and steps[part].action == "quantize" for part in whole.parts)
        }
        joined: dict[str, Step] = {}
        stack_of = {part: name for name, whole in self.checkpoint.whole.items() for part in whole.parts}
        for source, step in steps.items():
            name = stack_of.get(source)
            if name is None or blocks[name] in changed:
                joined[source] = step
            elif name not in joined:
                joined[name] = replace(step, source=name, outputs=self._joined(name, step))
        return joined

    def _joined(self, name: str, step: Step) -> tuple[OutputTensor, ...]:
        """The outputs of a stack whose parts all have steps like this one."""
        header, undone = self.checkpoint.header(name), self.checkpoint.whole[name].undone
        if step.action == "copy":
            return (OutputTensor(name, header.dtype, header.shape),)
        return (OutputTensor(undone.name, step.outputs[0].dtype, undone.shape),) if undone is not None else ()

    def _step(
        self, name: str, assigned: dict[str, str], groups: dict[str, Scheme], kinds: dict[str, list[str]]
    ) -> dict[str, Step]:
        """The steps of one tensor and its scale companions."""
        stored = self.formats.of(name)
        module, place = module_of(name), self.family.place(name)
        if is_left_out(name):
            return _consumed([name], "rotary table: every loader computes it")
        if is_carried(name):
            return self._copied(name, "scale of the KV cache")
        if place.part in self.family.native_parts:
            return self._copied(name, f"{place.part}: engines read it in its stored form alone")
        if self.recipe.method == "plain":
            return self._copied(name, place.part) if stored.kind == "plain" else self._undone(name, place.part)
        group = assigned.get(module) if self.weights.get(module) == name else None
        respells = stored.kind == "modelopt_nvfp4" and self.recipe.method == "convert"
        if stored.kind in ("nvfp4", "modelopt_nvfp4") and not place.mtp and not respells:
            if stored.kind not in kinds:
                remedy = ", or have method: convert respell it" if stored.kind == "modelopt_nvfp4" else ""
                self.problems.append(
                    f"{self.checkpoint.path(name)}: {name}: the source is already quantized ({stored.label}); "
                    f"start from the original checkpoint{remedy}"
                )
            kinds[stored.kind].append(name)
        if group is None or place.mtp:
            return self._kept(name, place, groups)
        scheme = groups[group]
        if self._keeps_tiles(scheme, stored):
            return self._keep_tiles(
                name, group, "FP8 tiles of the source are FP8_BLOCK already: codes kept, scale respelled"
            )
        if respells and scheme is not FP8_BLOCK:
            return self._respelled(name, group, scheme)
        outputs = tuple(OutputTensor(*output) for output in scheme.outputs(module, stored.shape, self.dialect))
        steps = {name: Step(name, "quantize", outputs, f"target of {group} ({scheme.name})", group)}
        return steps | _consumed(list(stored.companions.values()), f"used up by {name}")

    def _kept(self, name: str, place: Place, groups: dict[str, Scheme]) -> dict[str, Step]:
        stored = self.formats.of(name)
        if place.mtp:
            reason = "MTP is copied byte for byte"
        elif stored.kind == "plain":
            reason = f"{place.part}: not a target" if self.weights.get(module_of(name)) == name else place.part
        elif self.recipe.export.kept == "plain":
            return self._undone(name, place.part)
        elif stored.kind in _NOT_KEPT or place.part in BESIDE:  # engines build what lies beside the blocks plain
            self._undone_unasked[stored.label].append(name)
            return self._undone(name, place.part)
        elif self._keeps_tiles(FP8_BLOCK, stored):
            groups.setdefault(KEPT_FP8, FP8_BLOCK)
            return self._keep_tiles(name, KEPT_FP8, f"{place.part}: not a target, native FP8 codes kept")
        else:
            self.problems.append(
                f"{self.checkpoint.path(name)}: {name} is stored as {stored.label} and is no target; compressed-tensors "
                "checkpoints cannot keep that form: quantize it or set export.kept: plain"
            )
            return {}
        return self._copied(name, reason)

    def _copied(self, name: str, reason: str) -> dict[str, Step]:
        """Steps that copy a tensor and its scale companions byte for byte."""
        copies: dict[str, Step] = {}
        for source in (name, *self.formats.of(name).companions.values()):
            header = self.checkpoint.tensors[source]
            copies[source] = Step(source, "copy", (OutputTensor(source, header.dtype, header.shape),), reason)
        return copies

    def _keeps_tiles(self, scheme: Scheme, stored: StoredFormat) -> bool:
        """Whether the stored FP8 tiles have the form of the scheme already, so that codes can be kept."""
        return scheme is FP8_BLOCK and stored.kind == "fp8_tiles" and stored.tile == self.tile

    def _undone(self, name: str, part: str) -> dict[str, Step]:
        """Steps that write a weight in the recipe's plain dtype under its plain name and consume its scale
        companions."""
        stored, dtype = self.formats.of(name), _SAFETENSORS_DTYPE[self.recipe.export.plain_dtype]
        output = OutputTensor(f"{module_of(name)}.weight", dtype, stored.shape)
        consumed = _consumed(list(stored.companions.values()), f"used up by {name}")
        return {name: Step(name, "cast", (output,), f"{part}: {stored.label} undone")} | consumed

    def _keep_tiles(self, name: str, group: str, reason: str) -> dict[str, Step]:
        header, stored = self.checkpoint.tensors[name], self.formats.of(name)
        scale = stored.companions["tile_scale"]
        weight = Step(name, "copy", (OutputTensor(name, header.dtype, header.shape),), reason, group)
        return {name: weight, scale: tile_scale_step(name, self.checkpoint.tensors[scale], self.family, self.dialect)}

    def _respelled(self, name: str, group: str, scheme: Scheme) -> dict[str, Step]:
        """Steps that respell modelopt's NVFP4 in the output's dialect: packed bytes and group scales are unchanged;
        global scales are inverted if the dialect is compressed-tensors'."""
        if scheme.input_scale and "input_scale" not in self.formats.of(name).companions:
            self.problems.append(
                f"{self.checkpoint.path(name)}: {name} has no input_scale, {scheme.name} of {group} needs one; use NVFP4A16"
            )
            return {}
        return respelled_steps(self.formats, name, group, scheme, self.dialect)

    def _shards(self, steps: dict[str, Step]) -> list[PlannedShard]:
        """Shards in the order: outside the blocks, block by block, MTP; split if they exceed max_shard_size."""
        bins: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name in steps:
            place = self.family.place(name)
            bins[(2, 0) if place.mtp else (0, 0) if place.block is None else (1, place.block)].append(name)
        limit = self.recipe.export.max_shard_size
        pieces: list[tuple[int | None, list[str]]] = []
        for (kind, number), names in sorted(bins.items()):
            size = limit + 1
            for name in names:
                nbytes = sum(output.nbytes for output in steps[name].outputs)
                if size + nbytes > limit:
                    pieces.append((number if kind == 1 else None, []))
                    size = 0
                pieces[-1][1].append(name)
                size += nbytes
        kept = [piece for piece in pieces if any(steps[name].outputs for name in piece[1])]
        return [
            PlannedShard(f"model-{i:05d}-of-{len(kept):05d}.safetensors", block, tuple(names))
            for i, (block, names) in enumerate(kept, 1)
        ]

    def _warn(self, plan: Plan) -> None:
        sources = [s for step in plan.quantized.values() for s in
                   (step.source, *self.formats.of(step.source).companions.values())]  # fmt: skip
        before = sum(self.checkpoint.tensors[name].nbytes for name in sources)
        after = sum(output.nbytes for step in plan.quantized.values() for output in step.outputs)
        for label, names in self._undone_unasked.items():
            self.warnings.append(
                f"{len(names)} weights stored as {label} are no targets and are written in "
                f"{self.recipe.export.plain_dtype} ({names[0]}): the output cannot keep that form beside NVFP4"
            )
        left_out = sum(map(is_left_out, plan.steps))
        if left_out:
            self.warnings.append(f"{left_out} rotary tables of the source are left out: every loader computes them")
        if plan.quantized and after >= before:
            self.warnings.append(
                f"no disk is saved: the quantized modules take {after:,} bytes in the output and {before:,} in the source"
            )


def _consumed(companions: list[str], reason: str) -> dict[str, Step]:
    return {companion: Step(companion, "consume", (), reason) for companion in companions}


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
