"""The plan: for every source tensor exactly one action, for every output tensor its name, dtype, shape and shard.

Derived from headers, the recipe and the family's grammar, without reading a tensor. Inspect prints it, calibration and
conversion execute it, and verification compares the output with it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from calibration.checkpoint.dialect import COMPRESSED_TENSORS, DIALECTS, DialectName
from calibration.checkpoint.formats import module_of
from calibration.checkpoint.header import OutputTensor
from calibration.families.family import ROUTED, Family
from calibration.plan.schemes import Scheme

Action = Literal["copy", "cast", "quantize", "rescale", "invert", "consume"]


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one source tensor, the reason, and the resulting output tensors. `group` names the config group,
    if any."""

    source: str
    action: Action
    outputs: tuple[OutputTensor, ...]
    reason: str
    group: str | None = None

    @property
    def module(self) -> str:
        return module_of(self.source)


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A module whose output channels are divided by factors, and the modules that read them, whose columns are multiplied
    by the same factors. `head` is the number of channels of an attention head if `smooth` makes values that several query
    heads share; 0 if channel c of `smooth` is column c of each reader."""

    smooth: str
    readers: tuple[str, ...]
    head: int = 0

    def channels(self, columns: int, width: int) -> list[int]:
        """The channel of `smooth`, of `width`, that each of a reader's `columns` reads."""
        shared = columns // width
        return [c // (shared * self.head) * self.head + c % self.head if self.head else c for c in range(columns)]


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One output shard: its file name, the block it belongs to (None outside the blocks) and its steps' sources."""

    name: str
    block: int | None
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Every step, by source tensor, and every output shard. `groups` maps a config group's name to its scheme."""

    family: Family
    steps: dict[str, Step]
    shards: tuple[PlannedShard, ...]
    groups: dict[str, Scheme]
    fused: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]
    parameters: int
    #: shared or per_expert, as in the recipe, or as_stored: scales stay as they are.
    input_global_scale: str
    #: The spelling of the output's NVFP4 weights and of its `quantization_config`.
    dialect: DialectName = "compressed_tensors"
    #: The largest input that an input global scale admits, as a multiple of the largest calibrated one; None if no
    #: input scale is calibrated.
    input_headroom: float | None = None
    #: The layers that the recipe smooths; the factors are found in the run.
    smoothed: tuple[Smoothed, ...] = ()

    @cached_property
    def quantized(self) -> dict[str, Step]:
        """Module name -> step, of every module that calibration quantizes."""
        return {step.module: step for step in self.steps.values() if step.action == "quantize"}

    @cached_property
    def outputs(self) -> dict[str, OutputTensor]:
        """Every tensor of the output checkpoint by name."""
        return {output.name: output for step in self.steps.values() for output in step.outputs}

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Output tensor -> shard file name."""
        return {
            output.name: shard.name
            for shard in self.shards
            for source in shard.sources
            for output in self.steps[source].outputs
        }

    @property
    def output_bytes(self) -> int:
        return sum(output.nbytes for output in self.outputs.values())

    @property
    def bits_per_parameter(self) -> float:
        return self.output_bytes * 8 / self.parameters if self.parameters else 0.0

    @property
    def block_numbers(self) -> list[int]:
        return sorted({shard.block for shard in self.shards if shard.block is not None})

    def modules(self, group: str) -> list[str]:
        """Source modules of a config group, including those that keep FP8 tiles, in the order of the source."""
        return [step.module for step in self.steps.values() if step.group == group and step.action != "consume"]

    def shared_input_scales(self) -> list[tuple[str, ...]]:
        """Groups of modules that must have equal input global scales: gate/up and the other fused projections, and,
        unless the recipe says per_expert, w1/w3 and w2 across all routed experts of a block."""
        if self.input_global_scale == "as_stored":
            return []
        leaf = f".{DIALECTS[self.dialect].input_scale}"
        calibrated = [
            module_of(output.name)
            for step in self.steps.values()
            for output in step.outputs
            if step.action in ("quantize", "invert") and output.name.endswith(leaf)
        ]
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        fused_with = {module: group[0] for group in self.fused for module in group}
        for module in calibrated:
            place = self.family.place(module)
            if place.part == ROUTED and self.input_global_scale == "shared":
                projection = fused_with.get(module, module).rpartition(".")[2]
                groups[(str(place.block), projection)].append(module)
            elif module in fused_with:
                groups[(fused_with[module],)].append(module)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    @cached_property
    def digest(self) -> str:
        """sha256 of the whole plan, as hex."""
        body: dict[str, Any] = {
            "family": self.family.name,
            "steps": list(self.steps.values()),
            "shards": self.shards,
            "groups": {name: scheme.name for name, scheme in self.groups.items()},
            "input_global_scale": self.input_global_scale,
        }
        if self.dialect != COMPRESSED_TENSORS.name:  # keeps the digests of plans from before there were two dialects
            body["dialect"] = self.dialect
        if self.input_headroom not in (None, 1.0):
            body["input_headroom"] = self.input_headroom
        if self.smoothed:
            body["smoothed"] = self.smoothed
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=_fields).encode()).hexdigest()


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, by name. For the 430,000 of a large plan `asdict` takes 3 CPU-s: it copies what they hold."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
