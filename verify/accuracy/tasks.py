"""The tasks of an accuracy gate: names that lm-eval knows, or files of the user's own (YAML in lm-eval's words, and JSONL).

A file is data: its keys are those of `LocalTask`, YAML tags such as lm-eval's `!function` are refused, and its templates are
rendered in a sandbox (verify/inside_vllm/accuracy.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calibration.checkpoint.files import parse_json, read_bytes, read_text
from recipes.checks import Accuracy
from recipes.errors import RecipeError, SourceError

BUNDLED = Path(__file__).parent / "bundled"
#: What a recipe writes before the name of a bundled task.
_PREFIX = "bundled/"
#: Largest data file of a task, in bytes.
_MOST_BYTES = 100_000_000


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Files(_Closed):
    test: str
    """JSONL file, relative to the task's file."""


class _DatasetKwargs(_Closed):
    data_files: _Files


class _Metric(_Closed):
    metric: Literal["acc", "acc_norm", "exact_match"]
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None


class _Generation(_Closed):
    until: list[str] = ["\n"]
    max_gen_toks: int = Field(default=64, ge=1, le=4096)
    do_sample: Literal[False] = False


class LocalTask(_Closed):
    """The keys of lm-eval's task files that a file of the user's own may have; see lm-eval's guide to new tasks."""

    task: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    dataset_path: Literal["json"]
    dataset_kwargs: _DatasetKwargs
    test_split: Literal["test"]
    output_type: Literal["loglikelihood", "multiple_choice", "generate_until"]
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: str | list[str] | None = None
    description: str = ""
    target_delimiter: str = " "
    generation_kwargs: _Generation | None = None
    metric_list: list[_Metric] = Field(min_length=1)


def request(options: Accuracy) -> dict[str, Any]:
    """What the worker is asked: `{tasks: [{name, config: null | {...}, rows: null | [...]}], limit, fewshot, chat}`. Raises
    RecipeError for a file that is no task."""
    tasks, problems = [], []
    for name in options.tasks:
        try:
            tasks.append(_task(name))
        except (RecipeError, SourceError) as error:
            problems += error.problems
    names = [task["name"] for task in tasks]
    problems += [
        f"verify.accuracy.tasks: {name}: named twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if problems:
        raise RecipeError(problems)
    return {"tasks": tasks, "limit": options.limit, "fewshot": options.fewshot, "chat": options.chat}


def _task(name: str) -> dict[str, Any]:
    path = BUNDLED / f"{name.removeprefix(_PREFIX)}.yaml" if name.startswith(_PREFIX) else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return {"name": name, "config": None, "rows": None}
    where = f"verify.accuracy.tasks: {path}"
    if name.startswith(_PREFIX) and not path.is_file():
        known = ", ".join(_PREFIX + found.stem for found in sorted(BUNDLED.glob("*.yaml")))
        raise RecipeError(f"verify.accuracy.tasks: {name}: unknown; bundled are {known}")
    try:
        task = LocalTask.model_validate(yaml.safe_load(read_text(path)))
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise RecipeError(
            f"{where}: {said}; plain YAML only, functions of lm-eval's files are not run: name a task that lm-eval has"
        ) from None
    except ValidationError as error:
        raise RecipeError(
            [
                f"{where}: {'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}; keys and values are those of "
                "docs/verification.md, section Accuracy"
                for problem in error.errors()[:10]
            ]
        ) from None
    rows = _rows(path.parent / task.dataset_kwargs.data_files.test)
    # lm-eval's own reader of files keeps a copy in a cache of the user's; rows are handed over instead.
    config = task.model_dump(exclude_none=True, exclude={"dataset_path", "dataset_kwargs"})
    return {"name": task.task, "config": config, "rows": rows}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_bytes(path, max_bytes=_MOST_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}: line {number}")
        if not isinstance(row, dict):
            raise RecipeError(f"{path}: line {number}: {json.dumps(row)[:80]}; every line is one JSON object")
        rows.append(row)
    if not rows:
        raise RecipeError(f"{path}: holds no sample; one JSON object per line")
    return rows
