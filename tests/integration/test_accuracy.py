"""The accuracy gate in the real vLLM with the real lm-eval, on tasks whose outcome is known for any model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.whole_runs import LINEAR, run, write_recipe
from tests.models import smollm2, standard
from tests.reference.engine import FORKED_PYTHON, VLLM_PYTHON


def write_task(folder: Path, name: str, right: str, wrong: str) -> str:
    rows = [
        {"q": f"Number {n}:", "c": [right, wrong] if n % 2 else [wrong, right], "a": 0 if n % 2 else 1}
        for n in range(12)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}",
        "doc_to_target": "a", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return str(folder / f"{name}.yaml")


def accuracy_check(output: Path) -> dict[str, str]:
    checks = json.loads((Path(f"{output}.run") / "verify.json").read_text())["checks"]
    found: dict[str, str] = next(check for check in checks if check["id"] == "serving.accuracy")
    return found


def test_a_task_is_scored_on_output_and_source_in_the_engines_that_serve_them(tmp_path: Path) -> None:
    """A model with random weights finds one word likelier than ten: it is always right in one task, never in the other."""
    source = standard.write(tmp_path / "source", "llama")
    short = write_task(tmp_path, "short", "yes", "no " * 10)
    recipe = write_recipe(
        tmp_path, source, [], method="plain", modifiers=[], calibration=None,
        verify={
            "serving": {"python": FORKED_PYTHON, "max_tokens": 2, "windows": 1}, "accuracy": {"tasks": [short], "limit": 8}
        },
    )  # fmt: skip
    done = run(recipe, "--json")
    assert done.returncode == 0, done.stderr
    found = accuracy_check(Path(json.loads(done.stdout)["output"]))
    assert found["verdict"] == "PASS"
    assert found["figure"] == "short acc 1.000 -> 1.000, 100.0% +- 0.0% recovered over 8 samples"
    # Scored again, with a task that says nothing and a template that reaches for what is no data.
    long = write_task(tmp_path, "long", "no " * 10, "yes")
    text = Path(short).read_text().replace("{{q}}", "{{q.__class__.__mro__[1].__subclasses__()}}")
    (tmp_path / "short.yaml").write_text(text)
    refused = run(recipe, "--stages", "verify", "--set", f"verify.serving.python={VLLM_PYTHON}")
    assert refused.returncode == 4 and "SecurityError" in refused.stderr, refused.stderr
    done = run(recipe, "--json", "--stages", "verify", "--set", f"verify.accuracy.tasks=[{long}]")
    found = accuracy_check(Path(json.loads(done.stdout)["output"]))
    assert found["verdict"] == "UNCHECKED" and "the source scores 0.000" in found["figure"]


@pytest.mark.slow
def test_smollm2_answers_bundled_tasks_and_round_to_nearest_does_not_keep_them(tmp_path: Path) -> None:
    source = smollm2.write(tmp_path / "source")
    recipe = write_recipe(
        tmp_path, source, LINEAR, calibration={"dataset": "bundled", "num_samples": 8, "max_seq_length": 256},
        verify={
            "fidelity": False, "serving": {"python": VLLM_PYTHON, "max_tokens": 8, "windows": 1},
            "accuracy": {"tasks": ["bundled/cloze", "bundled/choices"], "limit": 100},
        },
    )  # fmt: skip
    done = run(recipe, "--json")
    assert done.returncode == 5, done.stderr
    found = accuracy_check(Path(json.loads(done.stdout)["output"]))
    print(found["figure"])
    assert found["verdict"] == "FAIL"
    scored = json.loads((Path(json.loads(done.stdout)["run_directory"]) / "serving.json").read_text())["source"][
        "accuracy"
    ]
    assert scored["tasks"]["cloze"]["value"] > 0.2 and scored["tasks"]["choices"]["value"] > 0.6
