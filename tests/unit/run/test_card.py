"""The card of an output: metadata that the hub takes, the command that serves it, what was not proven, and no stranger's text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from calibration.families.serving import gpus, serve_arguments
from calibration.plan.task import Task
from recipes.portable import hub_id, portable_recipe, revision
from recipes.schema import Recipe, Source
from tests.exported import recipe, task_of
from tests.models import deepseek_v4, standard
from verify.accuracy.recovery import recoveries
from verify.checks import Check
from verify.report.facts import Facts
from workflows.run.card import model_card
from workflows.run.card_metadata import license_of, metadata, pipeline_tag

SERVED = {
    "perplexity": 12.5,
    "source": {
        "perplexity": 10.0,
        "nll_difference": 0.2231,
        "nll_error": 0.01,
        "agreement": {"kl": 0.05, "top1": 0.91},
    },
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    source = standard.write(tmp_path_factory.mktemp("card") / "source", "qwen3_moe")
    return task_of(recipe(source, Path("/nowhere/out"), "Linear"))


def from_hub(task: Task, **sections: Any) -> Task:
    """The task as if the recipe named a repository of the hub."""
    made = task.recipe.model_copy(update={"source": Source(checkpoint="some-org/Some-Model"), **sections})
    return replace(task, recipe=made)


def test_the_metadata_is_what_the_hub_has_fields_for(task: Task) -> None:
    calibration = task.recipe.calibration.model_copy(update={"dataset": "HuggingFaceH4/ultrachat_200k"})
    made = metadata(from_hub(task, calibration=calibration))
    (task.source.directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
    made |= license_of(task.source.directory)
    assert made == {
        "base_model": "some-org/Some-Model", "base_model_relation": "quantized", "library_name": "vllm",
        "pipeline_tag": "text-generation", "license": "apache-2.0",
        "tags": ["nvfp4", "compressed-tensors", "vllm", "llm-compressor"], "datasets": ["HuggingFaceH4/ultrachat_200k"],
    }  # fmt: skip
    read = ModelCard(model_card(from_hub(task, calibration=calibration), [], {}))
    assert read.data.to_dict() == ModelCardData(**made).to_dict() == made
    (task.source.directory / "README.md").unlink()


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ("---\nlicense: other\nlicense_name: deepseek\nlicense_link: LICENSE\n---\n",
         {"license": "other", "license_name": "deepseek", "license_link": "LICENSE"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: mit\nlicense_link: javascript:alert(1)\n---\n", {"license": "mit"}),
        ("---\nlicense: 'mit\\n---\\n# owned'\n---\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\nlicense: &a [*a]\n---\n", {}),
        ("---\nlicense_name: alone\n---\n", {}),
        ("---\n" + "a: &a [" * 3000 + "\n---\n", {}),
        ("---\nlicense: !!python/object:os.system x\n---\n", {}),
        ("no front matter", {}),
        ("---\nlicense: mit\nbase_model: <script>\ntags: [x]\n---\n", {"license": "mit"}),
    ],
)  # fmt: skip
def test_of_a_strangers_card_only_a_license_is_taken(card: str, wanted: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert license_of(tmp_path) == wanted


def test_towers_decide_what_the_hub_calls_the_task() -> None:
    assert pipeline_tag({"vision_config": {}}) == "image-text-to-text"
    assert pipeline_tag({"vision_config": {}, "audio_config": {}}) == "any-to-any"
    assert pipeline_tag({"vision_config": None}) == "text-generation"


def test_the_command_is_that_of_the_model(task: Task, tmp_path: Path) -> None:
    command = serve_command(model_card(task, [], {}))
    assert command == [
        "OWNER/NAME", "--tensor-parallel-size", "1", "--kv-cache-dtype", "auto", "--max-model-len", "2048",
        "--reasoning-parser", "qwen3", "--tool-call-parser", "hermes", "--enable-auto-tool-choice",
    ]  # fmt: skip
    heads = {"model_type": "qwen3_moe", "num_attention_heads": 12}
    assert (gpus(heads, 40 * 10**9), gpus(heads, 10**11), gpus(heads, 10**12), gpus({}, 1)) == (1, 2, None, None)
    assert "--enable-expert-parallel" in serve_arguments(heads, 10**11, chats=False, experts=True)
    v4 = task_of(recipe(deepseek_v4.write(tmp_path / "v4", "bf16"), tmp_path / "out"))
    assert {"--reasoning-parser", "deepseek_v4", "--kv-cache-dtype", "fp8"} <= set(
        serve_command(model_card(v4, [], {}))
    )


def serve_command(card: str) -> list[str]:
    found = re.search(r"```sh\nvllm serve (.*?)\n```", card, re.S)
    assert found is not None
    return found[1].replace("\\\n", " ").split()


def test_what_was_measured_and_what_was_not_proven_stand_in_it(task: Task) -> None:
    checks = [
        Check("serving.load", "PASS", "w", "f", "t", "h"), Check("serving.w4a4", "UNCHECKED", "w", "no | GPU", "t", "h"),
        Check("structure.zeros", "WARN", "w", "a doubt", "t", "h"),
    ]  # fmt: skip
    card = model_card(task, checks, {}, Facts(served=SERVED))
    assert "| perplexity | 10.000 | 12.500 |" in card and "| KL(source, output), nats |  | 0.0500 |" in card
    assert "Quality: reduced." in card
    limits = card.partition("## Limits")[2].partition("##")[0]
    assert "- UNCHECKED serving.w4a4: no \\| GPU" in limits and "- WARN structure.zeros: a doubt" in limits
    assert "- UNCHECKED fidelity: it was not run" in limits and "serving.load" not in limits
    assert "## Measured" not in model_card(task, checks[2:], {}, Facts(served=SERVED)), "an earlier serving.json"


def test_scores_of_lm_eval_stand_in_table_and_model_index(task: Task) -> None:
    def scores(*values: float) -> dict[str, Any]:
        return {"tasks": {"cloze <b>": {"metric": "acc", "chance": 0.0, "scores": list(values), "samples": "x"}}}

    served = {"accuracy": scores(*[1, 1, 0, 1] * 10), "source": {"accuracy": scores(*[1.0] * 40)}}
    found = recoveries(served)
    assert [(one.output, one.source) for one in found] == [(0.75, 1.0)]
    card = model_card(task, [Check("serving.load", "PASS", "w", "f", "t", "h")], {}, Facts(served=served))
    assert "| cloze &lt;b&gt; (acc) | 1.000 | 0.750 | 75.0% +- " in card
    (result,) = ModelCard(card).data.eval_results or []
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("cloze-b-", "acc", 0.75)
    assert "model-index" not in metadata(task) and "## Accuracy" not in model_card(task, [], {}, Facts(served=served))


def test_no_path_of_the_machine_stands_in_the_card_and_its_recipe_loads(task: Task, tmp_path: Path) -> None:
    rows = tmp_path / "private" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("{}\n")
    body = task.recipe.model_dump(mode="json")
    body["calibration"]["dataset"], body["offload"]["directory"] = str(rows), str(tmp_path / "scratch")
    made = replace(task, recipe=Recipe.model_validate(body))
    card = model_card(made, [], {"calibration": f"{rows} (train, in order); 8 samples"})
    assert str(tmp_path) not in card and str(task.source.directory.parent) not in card
    assert "| calibration | rows.jsonl (train, in order); 8 samples |" in card
    shown = card.partition("## Recipe")[2].partition("```yaml\n")[2].partition("```")[0]
    assert portable_recipe(Recipe.model_validate(yaml.safe_load(shown))) == portable_recipe(made.recipe)


def test_the_hubs_cache_gives_a_source_its_name_and_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--some-org--Some-Model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    source = Source(checkpoint=str(snapshot))
    assert (hub_id(source), revision(source)) == ("some-org/Some-Model", commit)
    assert hub_id(Source(checkpoint=str(tmp_path))) is None


def test_the_card_says_what_became_of_tensors_that_are_not_quantized(task: Task) -> None:
    def said(task: Task) -> str:
        return next(line for line in model_card(task, [], {}).splitlines() if line.startswith("Tensor names"))

    assert said(task).endswith("What is not quantized is byte-identical to the source.")
    norms = {name: replace(step, action="rescale") for name, step in task.plan.steps.items() if "layernorm" in name}
    smoothed = replace(task, plan=replace(task.plan, steps=task.plan.steps | norms))
    wanted = f"byte-identical to the source, but for {len(norms)} tensors that smoothing multiplied by powers of two."
    assert norms and said(smoothed).endswith(wanted)
