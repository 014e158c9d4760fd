"""Runs tasks of lm-eval on a model that vLLM has loaded, in the same process.

As a command, `python accuracy.py REQUEST RESULT`, it makes the tasks without a model: whether their names, data and templates
are there is known before a long run. Both are JSON; REQUEST is `{tasks: [{name, config, rows}], limit, fewshot, chat}`, RESULT
`{"version", "tasks": {name: samples}}` or `{"error"}`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def allow_downloads(asked: dict[str, Any]) -> None:
    """Lets huggingface_hub reach the hub if a task's data lies there; before anything imports it."""
    if any(task["config"] is None for task in asked["tasks"]):
        os.environ["HF_HUB_OFFLINE"] = "0"


def task_objects(asked: dict[str, Any]) -> tuple[list[Any], Any]:
    """lm-eval's task arguments and its manager, for the tasks of a request. Templates run in a sandbox from here on."""
    from datasets import Dataset, DatasetDict
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import tasks, utils

    # lm-eval renders the templates of task files without one.
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox

    def made(task: dict[str, Any]) -> Any:
        if task["config"] is None:
            return task["name"]
        rows = task["rows"]
        return {**task["config"], "custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_list(rows)})}

    manager = tasks.TaskManager(include_defaults=any(task["config"] is None for task in asked["tasks"]))
    return [made(task) for task in asked["tasks"]], manager


def run_tasks(llm: Any, asked: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """`{"version", "tasks": {name: {metric, value, scores, chance, samples}}}`: scores are those of each sample in order,
    chance is what guessing scores, samples a digest of the samples by which two runs are known to have had the same.
    engine: `{checkpoint, dtype, max_model_len, trust_remote_code, seed}`."""
    import lm_eval

    backend = vllm_backend()
    arguments, manager = task_objects(asked)
    backend.LLM = lambda **_: llm  # the model is loaded already
    model = backend.VLLM(
        pretrained=engine["checkpoint"], dtype=engine["dtype"], max_model_len=engine["max_model_len"],
        trust_remote_code=engine["trust_remote_code"], seed=engine["seed"], batch_size=8,
    )  # fmt: skip
    found = lm_eval.simple_evaluate(
        model=model, tasks=arguments, num_fewshot=asked["fewshot"], limit=asked["limit"], log_samples=True,
        bootstrap_iters=0, apply_chat_template=asked["chat"], task_manager=manager,
    )  # fmt: skip
    names = [task["name"] for task in asked["tasks"]]
    return {"version": lm_eval.__version__, "tasks": {name: _scored(found, name) for name in names}}


def vllm_backend() -> Any:
    """lm-eval's module for vLLM. It asks for the version of a package `vllm`, which vLLM for CPUs is not called."""
    import importlib.metadata as metadata

    import vllm

    known = metadata.version

    def version(name: str) -> str:
        return str(vllm.__version__) if name == "vllm" else known(name)

    metadata.version = version
    try:
        import lm_eval.models.vllm_causallms as backend
    finally:
        metadata.version = known
    backend.version = version
    return backend


def _scored(found: dict[str, Any], name: str) -> dict[str, Any]:
    """One task, or all tasks of a group together."""
    parts = _leaves(found, name)
    metric = _metric(found, parts)
    scores, guesses, digest = [], [], hashlib.sha256()
    for part in parts:
        for sample in sorted(found["samples"][part], key=lambda sample: sample["doc_id"]):
            if sample["filter"] != found["samples"][part][0]["filter"]:
                continue
            scores.append(float(sample[metric]))
            choices = len(sample["arguments"])
            guesses.append(1 / choices if choices > 1 else 0.0)
            digest.update(json.dumps([part, sample["doc_hash"], sample["prompt_hash"]]).encode())
    mean = sum(scores) / len(scores)
    chance = sum(guesses) / len(guesses)
    return {"metric": metric, "value": mean, "scores": scores, "chance": chance, "samples": digest.hexdigest()}


def _leaves(found: dict[str, Any], name: str) -> list[str]:
    below = found.get("group_subtasks", {}).get(name) or []
    return [leaf for part in below for leaf in _leaves(found, part)] or [name]


def _metric(found: dict[str, Any], parts: list[str]) -> str:
    """The first metric that each sample has, that all parts have and of which more is better."""
    first = found["samples"][parts[0]][0]
    for metric in first["metrics"]:
        better = all(found["higher_is_better"].get(part, {}).get(metric) for part in parts)
        if better and isinstance(first.get(metric), int | float):
            return str(metric)
    raise ValueError(
        f"{parts[0]}: lm-eval has no score for each sample of which more is better; it has {first['metrics']}"
    )


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Makes the tasks and renders their samples, without a model."""
    import lm_eval
    from lm_eval.tasks import get_task_dict

    arguments, manager = task_objects(request)
    counts: dict[str, int] = {}

    def count(tasks: dict[Any, Any]) -> None:
        for name, task in tasks.items():
            if isinstance(task, dict):
                count(task)
                continue
            docs = list(task.eval_docs)
            for doc in docs[: request["limit"]]:
                task.doc_to_text(doc)
                task.doc_to_target(doc)
            counts[str(name)] = len(docs)

    count(get_task_dict(arguments, manager))
    return {"version": lm_eval.__version__, "tasks": counts}


def main(request_path: str, result_path: str) -> int:
    request = json.loads(Path(request_path).read_text())
    allow_downloads(request)
    try:
        result = check(request)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(result_path).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2]))
