"""Asks the serving engine's own model class, before anything is calibrated, what it would make of the planned output.

vLLM builds the class from the planned config.json on torch's meta device, and its own loading takes the planned tensors
without their data (`verify/inside_vllm/wants.py`). So vLLM itself says which parameter takes a tensor, which layers run
as NVFP4 and what it runs as one matrix. Nothing here knows vLLM's names.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import write_json
from calibration.checkpoint.formats import module_of
from calibration.checkpoint.index import CONFIG_NAME
from calibration.plan.plan import Plan
from calibration.plan.quantization_config import output_config
from calibration.plan.task import Task
from recipes.checks import Serving
from recipes.errors import collapsed
from verify.serving.engine import WORKER, failure, platform_refusal, run_engine

_SCRIPT = WORKER.with_name("wants.py")
_MOST_REFUSED = 100
"""MOST_REFUSED of the script: after so many refused tensors it tries no other."""

_NO_DATA = "meta tensor"
"""In what torch raises if a loader looks into a tensor without data, which says nothing about the plan."""


@dataclass(frozen=True)
class Layer:
    """A layer of the engine's model: the name under which it looked up its quantization ("" if it never did), the class
    of its scheme, its stored format (nvfp4, fp8 or ""), its kind (linear, experts, embedding, attention or ""), and the rows
    of every part that its matrix is made of."""

    looked_up: str
    scheme: str
    format: str
    kind: str
    rows: Sequence[int] = ()


@dataclass(frozen=True)
class Wants:
    """What the engine's class did with planned tensors."""

    version: str = ""
    architecture: str = ""
    #: Tensor -> the parameters that took it.
    written: dict[str, list[str]] = field(default_factory=dict)
    #: The layers that took a tensor, by their names in the engine's tree.
    layers: dict[str, Layer] = field(default_factory=dict)
    #: Tensor -> the engine's error.
    refused: dict[str, str] = field(default_factory=dict)
    #: Parameters that no tensor wrote, or not whole.
    unwritten: tuple[str, ...] = ()
    #: Names of layers that the class says are several of the hub's.
    packed: tuple[str, ...] = ()
    #: Why the class could not be built, else empty; `at_fault`: it can be built without quantization_config.
    unproven: str = ""
    at_fault: bool = False

    @property
    def described(self) -> str:
        """What was asked and what of it is proven, in one line."""
        if self.unproven:
            first = self.unproven.splitlines()[0]
            return f"vLLM {self.version} cannot build its class without memory here, so its names are unproven: {first}"
        counts = Counter(layer.scheme for layer in self.layers.values() if layer.format)
        layers = ", ".join(f"{count} x {scheme}" for scheme, count in counts.items())
        return f"{self.architecture} of vLLM {self.version} takes {len(self.written):,} planned tensors; {layers}"

    def layers_of(self, tensor: str) -> list[Layer]:
        """The layers whose parameters took the tensor."""
        return [self.layers[parameter.rpartition(".")[0]] for parameter in self.written.get(tensor, ())]

    def read(self, tensor: str) -> bool:
        """Whether a parameter took the tensor, or it was not tried."""
        return tensor in self.written or len(self.refused) >= _MOST_REFUSED

    def fused(self, tensors: Iterable[str], expert: Callable[[str], int | None]) -> list[tuple[str, ...]]:
        """Groups of the modules of these tensors that the engine runs as one matrix: one parameter takes their tensors,
        and `expert` gives them the same number."""
        takers: dict[tuple[str, int | None], dict[str, None]] = defaultdict(dict)
        for tensor in tensors:
            for parameter in self.written.get(tensor, ()):
                takers[parameter, expert(tensor)][module_of(tensor)] = None
        return list(dict.fromkeys(tuple(modules) for modules in takers.values() if len(modules) > 1))


def ask_server(
    task: Task, options: Serving, logs: Path, side_files: Iterable[Path] = (), config: dict[str, Any] | None = None
) -> Wants:
    """What vLLM in `options.python` wants of the planned output of `task`. `side_files` of the source are linked beside
    `config`, the planned config.json if None. Takes 8 s (DeepSeek-V4-Pro: 38 s); leaves request, result and log in `logs`. Raises
    EnvironmentProblem if there is no vLLM."""
    config = config or output_config(task.plan, task.source.config)
    tensors = {output.name: [output.dtype, list(output.shape)] for output in task.plan.outputs.values()}

    def ask(name: str, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Wants:
        with tempfile.TemporaryDirectory(prefix="planned-") as folder:
            write_json(Path(folder) / CONFIG_NAME, config)
            for path in side_files:
                if path.parent == task.source.directory and path.name != CONFIG_NAME:
                    (Path(folder) / path.name).symlink_to(path.resolve())
            request = {
                "checkpoint": folder, "tensors": tensors, "trust_remote_code": task.recipe.source.trust_remote_code,
                "processor": {}, "dtype": options.dtype, "moe_input_scales": "stored",
            }  # fmt: skip
            return read_wants(run_engine(request, options, logs, name, script=_SCRIPT))

    found = ask("wants", config, tensors)
    if not found.unproven or "quantization_config" not in config:
        return found
    plain = ask("wants-unquantized", {key: config[key] for key in config if key != "quantization_config"}, {})
    return replace(found, at_fault=not plain.unproven)


def read_wants(result: dict[str, Any]) -> Wants:
    """The result of `verify/inside_vllm/wants.py`, as `run_engine` returns it."""
    version = str(result.get("version") or "")
    if unproven := platform_refusal(result) or failure(result):
        return Wants(version, unproven=unproven)
    return Wants(
        version,
        result["architecture"],
        result["written"],
        {name: Layer(**layer) for name, layer in result["layers"].items()},
        {refused["tensor"]: refused["message"] for refused in result["refused"]},
        tuple(result["unwritten"]),
        tuple(result["packed"]),
    )


def differences(plan: Plan, wants: Wants) -> tuple[list[str], list[str]]:
    """What the engine would do otherwise than planned. Problems: a low-bit weight that it refuses, does not read or runs
    in another form, a part of an NVFP4 layer that nothing writes, projections that it runs as one matrix and that the
    plan scales apart. Doubts: other tensors that it does not read, other parameters that nothing writes. Draft heads are
    not judged: the engine's class of the model has none."""
    engine = f"vLLM {wants.version}"
    if wants.at_fault:
        # What cannot be built without memory may still be served, so that this alone ends no run.
        return [], [f"quantization_config: {engine} builds the model without it, and with it raises {wants.unproven}"]
    if wants.unproven:
        return [], []
    problems, doubts, judged = dict[str, str](), list[str](), list[str]()
    for step in plan.steps.values():
        scheme = plan.groups[step.group] if step.group is not None else None
        form = "" if scheme is None else "nvfp4" if scheme.name.startswith("NVFP4") else "fp8"
        for tensor in (output.name for output in step.outputs if not plan.family.place(output.name).mtp):
            found = {layer.format or "plain" for layer in wants.layers_of(tensor)}
            if tensor in wants.refused:
                wrong = f"refuses {tensor}: {wants.refused[tensor]}"
            elif not wants.read(tensor):
                wrong = f"has no parameter for {tensor}"
            elif scheme is not None and found - {form}:
                wrong = f"runs that layer as {' and '.join(sorted(found))}"
            else:
                wrong = ""
            if scheme is None or _NO_DATA in wrong:
                doubts += [f"{engine} {wrong}"] if wrong else []
                continue
            judged.append(tensor)
            if wrong:  # once a module
                module = module_of(tensor)
                said = f"{module}: planned as {scheme.name}, and {engine} {wrong}; add the module to ignore"
                problems.setdefault(module, said)
    together = {module: group for group in plan.fused for module in group}
    for group in wants.fused(judged, lambda tensor: plan.family.place(tensor).expert):
        if any(together.get(module) != together.get(group[0], ()) for module in group):
            apart = f"{', '.join(group)}: {engine} runs them as one matrix, and the plan scales them apart"
            problems.setdefault(apart, apart)
    for parameter in wants.unwritten if len(wants.refused) < _MOST_REFUSED else ():
        layer = wants.layers.get(parameter.rpartition(".")[0])
        wrong = f"{parameter}: {engine} has this parameter, and the plan no tensor for it"
        if layer is not None and layer.format == "nvfp4" and not any(_NO_DATA in why for why in wants.refused.values()):
            problems.setdefault(parameter, wrong)
        else:
            doubts.append(wrong)
    return collapsed(problems.values()), collapsed(doubts)
