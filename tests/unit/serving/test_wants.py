"""The plan against what the engine's class made of its tensors; the class itself is asked in tests/integration/test_wants.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.plan.task import Task
from recipes.checks import Serving
from recipes.errors import RecipeError
from recipes.schema import Recipe
from tests.exported import recipe, task_of
from tests.models import standard
from verify.serving import wants as asking
from verify.serving.wants import Layer, Wants, differences
from workflows.run import rehearse

EXPERT, ROUTER = "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.gate.weight"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    source = tmp_path_factory.mktemp("wants") / "source"
    standard.write(source, "qwen3_moe")
    made = recipe(source, source.parent / "output", ["Linear"], ignore=["lm_head"])
    return task_of(Recipe.model_validate(made.model_dump() | {"verify": {"serving": {}}}))


def served(task: Task) -> Wants:
    """What a class that agrees with the plan says: q, k, v in one matrix, gate and up of all experts in one parameter."""
    written: dict[str, list[str]] = {}
    for step in task.plan.steps.values():
        for tensor in (output.name for output in step.outputs):
            module, _, leaf = tensor.rpartition(".")
            parent, _, projection = module.rpartition(".")
            layer = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}.get(projection, projection)
            if ".experts." in parent:
                parent, layer = parent.rpartition(".")[0], "w2" if projection == "down_proj" else "w13"
            written[tensor] = [f"{parent}.{layer}.{leaf}"]
    low_bit = {t for step in task.plan.quantized.values() for output in step.outputs for t in written[output.name]}
    layers = {
        parameter.rpartition(".")[0]: Layer("", "W4A4", "nvfp4" if parameter in low_bit else "", "linear")
        for parameters in written.values()
        for parameter in parameters
    }
    return Wants("0", "Class", written, layers)


def test_a_class_that_agrees_with_the_plan_leaves_nothing_to_say(task: Task) -> None:
    assert differences(task.plan, served(task)) == ([], [])


def refused(found: Wants) -> Wants:
    return replace(found, refused={f"{EXPERT}.weight_packed": "KeyError: up_proj"})


def not_read(found: Wants) -> Wants:
    written = {name: to for name, to in found.written.items() if not name.startswith(f"{EXPERT}.")}
    return replace(found, written=written)


def run_plain(found: Wants) -> Wants:
    layer = found.written[f"{EXPERT}.weight_packed"][0].rpartition(".")[0]
    return replace(found, layers=found.layers | {layer: Layer("", "Unquantized", "", "experts")})


def fused_otherwise(found: Wants) -> Wants:
    output = [name for name in found.written if name.startswith("model.layers.0.self_attn.o_proj.weight_packed")]
    return replace(found, written=found.written | {output[0]: found.written[f"{QUERY}.weight_packed"]})


def scale_missing(found: Wants) -> Wants:
    return replace(found, unwritten=(found.written[f"{QUERY}.weight_packed"][0].replace("packed", "zero_point"),))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (refused, f"{EXPERT}: planned as NVFP4, and vLLM 0 refuses {EXPERT}.weight_packed: KeyError: up_proj; add"),
        (not_read, f"{EXPERT}: planned as NVFP4, and vLLM 0 has no parameter for {EXPERT}.weight_packed; add"),
        (run_plain, "up_proj: planned as NVFP4, and vLLM 0 runs that layer as plain"),
        (fused_otherwise, "vLLM 0 runs them as one matrix, and the plan scales them apart"),
        (
            scale_missing,
            "model.layers.0.self_attn.qkv_proj.weight_zero_point: vLLM 0 has this parameter, and the plan no",
        ),
    ],
)
def test_each_way_to_disagree_is_a_problem_and_the_rehearsal_ends_the_run(
    change: Callable[[Wants], Wants], said: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems, _ = differences(task.plan, change(served(task)))
    assert len([problem for problem in problems if said in problem]) == 1, problems
    monkeypatch.setattr(rehearse, "ask_server", lambda *rest: change(served(task)))
    with pytest.raises(RecipeError, match="vLLM 0"):
        rehearse._ask_server(Stub(task))  # type: ignore[arg-type]


def test_what_is_no_low_bit_weight_only_raises_doubts(task: Task) -> None:
    found = served(task)
    written = {name: to for name, to in found.written.items() if name != ROUTER}
    problems, doubts = differences(task.plan, replace(found, written=written, unwritten=("model.norm.bias",)))
    assert problems == []
    assert doubts == [
        f"vLLM 0 has no parameter for {ROUTER}",
        "model.norm.bias: vLLM 0 has this parameter, and the plan no tensor for it",
    ]


def test_what_only_fails_for_want_of_data_or_memory_ends_no_run(task: Task) -> None:
    problems, doubts = differences(task.plan, Wants("0", unproven="ValueError: no such scheme", at_fault=True))
    assert problems == []
    assert doubts == [
        "quantization_config: vLLM 0 builds the model without it, and with it raises ValueError: no such scheme"
    ]
    tensor = f"{EXPERT}.weight_packed"
    looked = replace(scale_missing(served(task)), refused={tensor: "NotImplementedError: no data in a meta tensor"})
    problems, doubts = differences(task.plan, looked)
    assert problems == [] and doubts[0] == f"vLLM 0 refuses {tensor}: {looked.refused[tensor]}"


def test_a_class_that_cannot_be_built_proves_nothing_and_says_so(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    unproven = Wants("0", unproven="NotImplementedError: not on a CPU\nlog")
    assert differences(task.plan, unproven) == ([], [])
    monkeypatch.setattr(rehearse, "ask_server", lambda *rest: unproven)
    proof = rehearse._ask_server(Stub(task))  # type: ignore[arg-type]
    assert proof is not None and proof["verdict"] == "UNCHECKED"
    assert proof["figure"].endswith("unproven: NotImplementedError: not on a CPU")


def test_the_class_is_built_without_quantization_only_to_find_what_is_at_fault(
    task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []

    def engine(request: dict[str, Any], options: Serving, logs: Path, name: str, **rest: Any) -> dict[str, Any]:
        assert (Path(request["checkpoint"]) / "config.json").is_file()
        asked.append(request)
        broken = {"ok": False, "stage": "build", "error": {"type": "ValueError", "message": "no"}, "version": "0"}
        whole = {
            "ok": True,
            "version": "0",
            "architecture": "A",
            "packed": [],
            "written": {},
            "layers": {},
            "refused": [],
            "unwritten": [],
        }
        return broken if request["tensors"] else whole

    monkeypatch.setattr(asking, "run_engine", engine)
    found = asking.ask_server(task, Serving(), tmp_path)
    assert (found.at_fault, found.unproven, len(asked)) == (True, "stage build: ValueError: no", 2)


class Stub:
    """The parts of a run that asking the server touches."""

    def __init__(self, task: Task) -> None:
        self.task, self.recipe, self.plan = task, task.recipe, task.plan
        self.restart = self.overwrite = False
        self.side_files = self.directory = self.reporter = self
        self.copied: list[Path] = []
        self.path = task.output.parent

    def facts(self, *names: str) -> list[dict[str, Any]]:
        return []

    def say(self, text: str, level: str = "info") -> None: ...
