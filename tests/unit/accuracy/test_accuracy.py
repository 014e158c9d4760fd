"""The accuracy gate without an engine: which task files are taken, and what recovered scores say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.checks import Accuracy
from recipes.errors import RecipeError, WorkflowError
from recipes.loader import load_recipe
from verify.accuracy.recovery import judge_accuracy, recoveries
from verify.accuracy.tasks import BUNDLED, request

TASK = {
    "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}}, "test_split": "test",
    "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": "a",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def write(
    folder: Path, text: str | None = None, rows: str = '{"q": "1+1=", "c": ["2", "3"], "a": 0}\n', **changes: Any
) -> str:
    (folder / "mine.jsonl").write_text(rows)
    (folder / "mine.yaml").write_text(json.dumps(TASK | changes) if text is None else text)
    return str(folder / "mine.yaml")


def test_bundled_tasks_and_own_files_are_read_and_names_are_left_to_lm_eval(tmp_path: Path) -> None:
    asked = request(Accuracy(tasks=["bundled/cloze", "bundled/choices", write(tmp_path), "arc_easy"], limit=5))
    names = [(task["name"], task["rows"] and len(task["rows"])) for task in asked["tasks"]]
    assert names == [("cloze", 272), ("choices", 300), ("mine", 1), ("arc_easy", None)]
    assert asked["limit"] == 5 and asked["tasks"][2]["config"]["metric_list"][0]["metric"] == "acc"
    for path in BUNDLED.glob("*.jsonl"):
        assert all(set(json.loads(line)) >= {"text"} for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"text": "task: x\ndoc_to_text: !function utils.steal\n"}, "functions of lm-eval's files are not run"),
        ({"process_docs": "utils.steal"}, "process_docs: Extra inputs are not permitted"),
        ({"include": "/etc/passwd"}, "include: Extra inputs"),
        ({"dataset_path": "somebody/script"}, "dataset_path: Input should be 'json'"),
        ({"output_type": "loglikelihood_rolling"}, "output_type: Input should be"),
        ({"metric_list": [{"metric": "perplexity"}]}, "metric_list.0.metric"),
        ({"task": "../x"}, "task: String should match"),
        ({"text": "- a\n"}, "the file: Input should be"),
        ({"rows": "[1]\n"}, "mine.jsonl: line 1: [1]; every line is one JSON object"),
        ({"rows": "\n"}, "holds no sample"),
        ({"rows": "{\n"}, "mine.jsonl: line 1"),
    ],
)
def test_what_no_task_is_is_refused_by_key_and_line(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkflowError) as error:
        request(Accuracy(tasks=[write(tmp_path, **wrong)]))
    assert said in str(error.value)


def test_missing_files_unknown_names_and_repeats_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        request(Accuracy(tasks=["bundled/nothing", "absent.yaml", "arc_easy", "arc_easy"]))
    problems = error.value.problems
    assert (
        len(problems) == 3
        and "bundled are bundled/choices, bundled/cloze" in problems[0]
        and "named twice" in problems[2]
    )


def test_a_gate_without_an_engine_is_refused_by_the_loader(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "source: {checkpoint: /a}\noutput: /b\nmethod: plain\nverify: {accuracy: {tasks: [bundled/cloze]}}\n"
    )
    with pytest.raises(RecipeError, match=r"add `serving: \{\}`"):
        load_recipe(path)


def result(ours: list[float], source: list[float] | None, chance: float = 0.0, **changes: Any) -> dict[str, Any]:
    def task(scores: list[float], digest: str) -> dict[str, Any]:
        return {"tasks": {"t": {"metric": "acc", "scores": scores, "chance": chance, "samples": digest}}}

    beside = {} if source is None else {"source": {"accuracy": task(source, changes.get("digest", "d"))}}
    return {"accuracy": task(ours, "d"), **beside}


RIGHT, WRONG = 1.0, 0.0


@pytest.mark.parametrize(
    ("ours", "source", "verdict", "said"),
    [
        (
            [RIGHT] * 60 + [WRONG] * 40,
            [RIGHT] * 61 + [WRONG] * 39,
            "PASS",
            "t acc 0.610 -> 0.600, 98.4% +- 1.6% recovered",
        ),
        ([RIGHT] * 30 + [WRONG] * 70, [RIGHT] * 60 + [WRONG] * 40, "FAIL", "50.0%"),
        # 95 % of it, but two of four hundred samples more would turn it.
        ([RIGHT] * 38 + [WRONG] * 62, [RIGHT] * 40 + [WRONG] * 60, "UNCHECKED", "within noise"),
        ([RIGHT] * 60 + [WRONG] * 40, None, "UNCHECKED", "the source was not scored"),
        ([RIGHT] * 60, [RIGHT] * 61, "UNCHECKED", "on other samples"),
        ([], [], "UNCHECKED", "on other samples"),
        ([RIGHT], [RIGHT], "UNCHECKED", "the task says nothing"),
    ],
)
def test_a_verdict_needs_more_than_noise(
    ours: list[float], source: list[float] | None, verdict: str, said: str
) -> None:
    found, figure = judge_accuracy(result(ours, source), Accuracy(tasks=["t"]))
    assert found == verdict and said in figure


def test_the_error_is_that_of_the_pairs() -> None:
    """Both are wrong in the same samples: the spread of the scores themselves says nothing."""
    same = [RIGHT, WRONG] * 50
    (pair,) = recoveries(result(same, same))
    assert pair.recovered == 1.0 and pair.error == 0.0
    (other,) = recoveries(result(same, same[::-1]))
    assert other.recovered == 1.0 and other.error is not None and other.error > 0.1


def test_a_source_that_guesses_and_other_samples_decide_nothing() -> None:
    quarter = [RIGHT, WRONG, WRONG, WRONG] * 25
    assert judge_accuracy(result(quarter, quarter, chance=0.25), Accuracy(tasks=["t"]))[0] == "UNCHECKED"
    assert judge_accuracy(result(quarter, quarter), Accuracy(tasks=["t"]))[0] == "PASS"
    assert judge_accuracy(result(quarter, quarter, digest="e"), Accuracy(tasks=["t"]))[0] == "UNCHECKED"


def test_what_lm_eval_could_not_do_says_nothing_about_the_checkpoint() -> None:
    asked = Accuracy(tasks=["t"])
    assert judge_accuracy({"accuracy": {"error": "ConnectionError: x"}}, asked) == (
        "UNCHECKED",
        "lm-eval: ConnectionError: x",
    )
    assert judge_accuracy({"accuracy": {"tasks": []}}, asked)[0] == "UNCHECKED"
    source = {"accuracy": {"error": "E"}}
    assert "lm-eval on the source: E" in judge_accuracy(result([1.0] * 9, None) | {"source": source}, asked)[1]
