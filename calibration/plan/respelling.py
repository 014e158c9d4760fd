"""The plan of a respelling: a finished NVFP4 checkpoint in the other dialect.

Packed codes, group scales, FP8 codes and everything plain keep their bytes. Global scales become their inverse, tile scales
of kept FP8 their other dtype. Nothing is dequantized, and no two scales are made equal.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from calibration.checkpoint.dialect import DIALECTS, NVIDIA, Dialect
from calibration.checkpoint.formats import Formats, module_of
from calibration.checkpoint.header import OutputTensor, TensorHeader
from calibration.checkpoint.index import CONFIG_NAME
from calibration.families.family import Family, Place
from calibration.families.registry import family_of
from calibration.plan.draft_head import draft_head_doubts
from calibration.plan.nvidia_config import nvidia_config, nvidia_problems
from calibration.plan.plan import Action, Plan, PlannedShard, Step
from calibration.plan.schemes import FP8_BLOCK, NVFP4, NVFP4A16, Scheme
from calibration.plan.source_check import contradictions
from recipes.errors import RecipeError, SourceError, collapsed
from recipes.fields import KEPT_FP8

#: Words of a quantization_config that the other dialect would lose.
_UNTRANSLATED = ("kv_cache_scheme", "kv_cache_quant_algo", "transform_config", "sparsity_config")


def make_respelling(formats: Formats, to: Dialect) -> Plan:
    """The plan that writes the checkpoint behind `formats` in `to`; shards keep names and contents. Raises RecipeError if it
    is in that dialect already, SourceError, all problems at once, for a checkpoint that is no whole NVFP4 one, is in both
    dialects, or holds what `to` cannot say."""
    return _Respelling(formats, to).plan()


def respelled_steps(formats: Formats, name: str, group: str, scheme: Scheme, dialect: Dialect) -> dict[str, Step]:
    """The steps of one NVFP4 weight `name` that becomes `dialect`: packed codes and group scales keep their bytes, global
    scales are inverted, or copied where it is in that dialect already."""
    stored, companions = formats.of(name), dict(formats.of(name).companions)
    scalar: Action = "copy" if stored.kind == dialect.kind else "invert"
    packed, group_scale, global_scale, *input_scale = (
        OutputTensor(*output) for output in scheme.outputs(module_of(name), stored.shape, dialect)
    )
    scale, double = companions.pop("group_scale"), companions.pop("global_scale")
    steps = {
        name: Step(name, "copy", (packed,), f"target of {group} ({scheme.name}): NVFP4 already, respelled", group),
        scale: Step(scale, "copy", (group_scale,), f"group scales of {name}"),
        double: Step(double, scalar, (global_scale,), f"1 / global scale of {name}"),
    }
    if input_scale:
        inputs = companions.pop("input_scale")
        steps[inputs] = Step(inputs, scalar, tuple(input_scale), f"1 / input scale of {name}")
    return steps | {left: Step(left, "consume", (), f"used up by {name}") for left in companions.values()}


def tile_scale_step(weight: str, scale: TensorHeader, family: Family, dialect: Dialect) -> Step:
    """The step of the scale of the FP8 tiles of `weight`, whose codes are kept: the same values in the name and dtype in which
    an engine looks for them in `dialect`. `require_exact_scales` refuses values that the dtype does not hold."""
    native = dialect is NVIDIA and family.fp8_dialect is not None
    leaf, dtype = ("scale", "F8_E8M0") if native else ("weight_scale", "F32")
    output = OutputTensor(f"{module_of(weight)}.{leaf}", dtype, scale.shape)
    action: Action = "copy" if native and scale.dtype == dtype else "cast"
    return Step(scale.name, action, (output,), f"tile scale of {weight}, exact in {dtype}")


def draft_head_warnings(formats: Formats, plan: Plan) -> list[str]:
    """What vLLM would misread of the draft head that `plan` copies."""
    said = nvidia_config(plan, {})[0]["quantization_config"] if plan.dialect == NVIDIA.name else {}
    doubts = draft_head_doubts(formats, plan.family, DIALECTS[plan.dialect], said.get("ignore", ()))
    return [f"draft head: {doubt}" for doubt in doubts]


def require_exact_scales(plan: Plan, formats: Formats) -> None:
    """Raises SourceError for FP8 tile scales that `plan` respells as E8M0 and that are no powers of two in its reach."""
    problems = []
    for step in plan.steps.values():
        if step.action == "cast" and step.outputs[0].dtype == "F8_E8M0":
            scale = formats.checkpoint.read(step.source).to(torch.float32)
            kept = scale.to(torch.float8_e8m0fnu).to(torch.float32)
            if not bool(((scale > 0) & (kept == scale)).all()):
                problems.append(
                    f"{formats.checkpoint.path(step.source)}: {step.source}: holds tile scales that are no powers of two, and "
                    f"under NVIDIA's dialect of {plan.family.name} an engine reads each as one: keep compressed_tensors"
                )
    if problems:
        raise SourceError(collapsed(problems))


class _Respelling:
    def __init__(self, formats: Formats, to: Dialect) -> None:
        self.formats, self.checkpoint, self.to = formats, formats.checkpoint, to
        self.where = str(self.checkpoint.directory)
        self.family = family_of(
            self.checkpoint.config, str(self.checkpoint.directory / CONFIG_NAME), self.checkpoint.tensors
        )
        self.groups: dict[str, Scheme] = {}
        self.problems: list[str] = []

    def plan(self) -> Plan:
        self._require_one_dialect()
        misnamed, differing = contradictions(self.formats, self.family)
        self.problems += [*misnamed, *differing, *self._untranslated()]
        steps: dict[str, Step] = {}
        for name in self.checkpoint.tensors:
            if name not in self.formats.companions:
                steps |= self._steps(name)
        steps = {name: steps[name] for name in self.checkpoint.tensors if name in steps}
        weights = [module_of(name) for name, step in steps.items() if step.group is not None]
        plan = Plan(
            family=self.family,
            steps=steps,
            shards=tuple(self._shards(steps)),
            groups=self.groups,
            fused=tuple(self.family.fused(weights)),
            warnings=(),
            parameters=self.formats.parameters,
            input_global_scale="as_stored",
            dialect=self.to.name,
        )
        if self.to is NVIDIA:
            self.problems += [f"{self.where}: {problem}" for problem in nvidia_problems(plan)]
        if self.problems:
            raise SourceError(collapsed(self.problems))
        return replace(plan, warnings=tuple(draft_head_warnings(self.formats, plan)))

    def _require_one_dialect(self) -> None:
        found: dict[str, list[str]] = {}
        for name in self.checkpoint.tensors:
            if name not in self.formats.companions and not self.family.place(name).mtp:
                found.setdefault(self.formats.of(name).kind, []).append(name)
        spelled = {d.name: found[d.kind] for d in DIALECTS.values() if d.kind in found}
        if not spelled:
            raise SourceError(
                f"{self.where}: holds no NVFP4 weight outside the draft head: there is nothing to respell"
            )
        if len(spelled) > 1:
            both = "; ".join(f"{len(names)} weights in {dialect} ({names[0]})" for dialect, names in spelled.items())
            raise SourceError(f"{self.where}: is in both dialects: {both}; make it again, or get a whole copy")
        if self.to.name in spelled:
            raise RecipeError(f"{self.where}: is in the dialect {self.to.name} already ({spelled[self.to.name][0]})")

    def _untranslated(self) -> list[str]:
        declared = self.checkpoint.config.get("quantization_config") or {}
        return [
            f"{self.checkpoint.directory / CONFIG_NAME}: quantization_config.{key}: {declared[key]!r:.80} is not respelled "
            "here; the output would lose it"
            for key in _UNTRANSLATED
            if declared.get(key)
        ]

    def _steps(self, name: str) -> dict[str, Step]:
        stored, place = self.formats.of(name), self.family.place(name)
        if stored.kind == "plain" or place.mtp or place.part in self.family.native_parts:
            return self._copied(name, "the draft head is copied byte for byte" if place.mtp else place.part)
        if stored.kind in {dialect.kind for dialect in DIALECTS.values()}:
            scheme = NVFP4 if "input_scale" in stored.companions else NVFP4A16
            return respelled_steps(self.formats, name, self._group(scheme.name.lower(), scheme), scheme, self.to)
        if stored.kind == "fp8_tiles" and stored.tile == tuple(FP8_BLOCK.weights["block_structure"]):
            return self._tiles(name, place)
        self.problems.append(
            f"{self.checkpoint.path(name)}: {name}: {stored.label} beside NVFP4 is not respelled here: keep the dialect"
        )
        return {}

    def _tiles(self, name: str, place: Place) -> dict[str, Step]:
        """FP8 tiles under the scale's other name; its values stay, or `require_exact_scales` refuses them."""
        header, scale = self.checkpoint.tensors[name], self.formats.of(name).companions["tile_scale"]
        weight = OutputTensor(name, header.dtype, header.shape)
        return {
            name: Step(name, "copy", (weight,), f"{place.part}: FP8 codes kept", self._group(KEPT_FP8, FP8_BLOCK)),
            scale: tile_scale_step(name, self.checkpoint.tensors[scale], self.family, self.to),
        }

    def _copied(self, name: str, reason: str) -> dict[str, Step]:
        headers = [self.checkpoint.tensors[n] for n in (name, *self.formats.of(name).companions.values())]
        return {h.name: Step(h.name, "copy", (OutputTensor(h.name, h.dtype, h.shape),), reason) for h in headers}

    def _group(self, name: str, scheme: Scheme) -> str:
        self.groups.setdefault(name, scheme)
        return name

    def _shards(self, steps: dict[str, Step]) -> list[PlannedShard]:
        sources: dict[str, list[str]] = {shard: [] for shard in self.checkpoint.shards}
        for name in steps:
            sources[self.checkpoint.tensors[name].shard].append(name)
        return [PlannedShard(shard, None, tuple(names)) for shard, names in sources.items() if names]
