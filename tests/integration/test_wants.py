"""vLLM's own class, built without memory, is asked what it makes of a planned output."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.families.family import ROUTED
from calibration.families.served import rows
from calibration.plan.task import Task
from recipes.checks import Serving
from tests import served
from tests.exported import recipe, task_of
from tests.models import any_family, mamba, merged, standard
from tests.reference.engine import FORKED_PYTHON
from verify.serving.wants import Wants, ask_server, differences

TABLE = ("llama", "mistral", "qwen3", "qwen3_moe", "mixtral", "glm4_moe")


def planned(family: str, directory: Path) -> Task:
    (standard if family in TABLE else any_family).write(directory / "source", family)
    return task_of(recipe(directory / "source", directory / "output", ["Linear"], ignore=["lm_head"]))


def ask(task: Task) -> Wants:
    return ask_server(task, Serving(python=FORKED_PYTHON), task.output.parent / "logs")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "qwen2_moe" else pytest.mark.slow) for f in rows()]
)
def test_the_kept_rows_are_what_the_installed_vllm_says(family: str, tmp_path: Path) -> None:
    with served.nothing_kept():
        task = served.planned(family, tmp_path)
        said = served.row(task, served.ask(task, tmp_path / "logs"))
    assert said == rows()[family].model_dump(mode="json")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("phi3", "nemotron_h") else pytest.mark.slow)
        for name in (*rows(), *mamba.FAMILIES, *merged.FAMILIES)
    ],
)
def test_the_rows_of_every_part_of_a_matrix_are_those_of_vllms_class(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of merged weights too: they are planned as FP8_BLOCK by these rows."""
    for made in (mamba, merged):
        if family in made.FAMILIES:
            made.write(tmp_path / family, monkeypatch, family)
    task = served.planned(family, tmp_path)
    wants = served.ask(task, tmp_path / "logs")
    assert wants.unproven == ""
    plan, shapes = (
        task.plan,
        {module: task.formats.of(step.source).shape for module, step in task.plan.quantized.items()},
    )
    groups = {module: group for group in plan.fused for module in group}
    judged = Counter[int]()
    for module in plan.quantized:
        for layer in wants.layers_of(plan.quantized[module].outputs[0].name):
            if layer.kind == "linear" and plan.family.place(module).part != ROUTED:
                parts = [plan.family.merged_rows(m, shapes[m][0]) for m in groups.get(module, (module,))]
                assert list(layer.rows) == [rows for part in parts for rows in part.values()], module
                judged[len(layer.rows)] += 1
    assert judged[1] and sum(judged[several] for several in judged if several > 1)


def moved(task: Task) -> Task:
    """The task with a family that does not know under which parent vLLM looks up its experts."""
    return replace(task, plan=replace(task.plan, family=replace(task.family, serving_parents=())))


def test_vllm_itself_says_which_modules_it_would_not_run_as_planned(tmp_path: Path) -> None:
    task = moved(planned("minimax_m2", tmp_path))
    problems, _ = differences(task.plan, ask(task))
    assert problems != []
    assert all(
        re.match(r"model\.layers\.\d\.block_sparse_moe\.experts\.\d\.w[123]: planned as NVFP4", p) for p in problems
    )


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "mixtral" else pytest.mark.slow) for name in TABLE]
)
def test_the_written_serving_names_and_fused_groups_are_those_of_vllms_class(family: str, tmp_path: Path) -> None:
    task = planned(family, tmp_path)
    wants = ask(task)
    assert wants.unproven == ""
    assert differences(task.plan, wants) == ([], [])
    packed = [output.name for step in task.plan.quantized.values() for output in step.outputs]
    fused = wants.fused(packed, lambda tensor: task.family.place(tensor).expert)
    assert {frozenset(group) for group in fused} == {frozenset(group) for group in task.plan.fused}
    for module in task.plan.quantized:
        names = {
            layer.looked_up for output in task.plan.quantized[module].outputs for layer in wants.layers_of(output.name)
        }
        assert len(names) == 1
        (name,) = names
        written = task.family.serving_names(module)[0]
        experts = written.find(".experts.")
        assert name.rpartition(".")[0] == (written if experts < 0 else written[: experts + 1] + "e").rpartition(".")[0]
