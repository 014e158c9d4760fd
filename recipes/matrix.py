"""A matrix: one base recipe and lists of overrides that expand to named runs. Also the resources of a run on a
cluster."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, JsonValue, ValidationError, ValidationInfo, field_validator

from recipes.errors import RecipeError
from recipes.fields import Bytes, PathText, Section, Text
from recipes.loader import load_section, parse_value

#: Runs of one matrix.
MAX_RUNS = 10_000
_LONGEST = 100
_UNSAFE = re.compile(r"[^A-Za-z0-9._=-]+")


class Resources(Section):
    """What one run asks of a cluster."""

    nodes: int = Field(default=1, ge=1)
    """Nodes of one run; with several, torchrun joins them."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs per node; with several, torchrun starts one process on each."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Processor cores per node; the cluster's default when left out."""
    memory: Bytes | None = None
    """Host memory per node, for example 500GiB; the cluster's default when left out."""
    hours: float = Field(default=24, gt=0, allow_inf_nan=False)
    """Time limit of one job. A run that needs longer is requeued and resumes at its first unfinished block."""
    partition: Text | None = None
    """Slurm partition."""
    account: Text | None = None
    """Slurm account."""
    qos: Text | None = None
    """Slurm quality of service."""
    constraint: Text | None = None
    """Slurm node features."""
    grace_seconds: int = Field(default=600, ge=10, validate_default=True)
    """Seconds before the time limit at which the run is asked to finish its block; longer than a block takes."""
    requeues: int = Field(default=100, ge=0)
    """Times that a run may be requeued after its time limit."""
    parallel: int = Field(default=256, ge=1)
    """Jobs of the batch that may run at the same time."""
    setup: list[Text] = Field(default=[])
    """Shell lines that each job runs first, for example module load cuda."""
    extra: dict[Text, JsonValue] = Field(default={})
    """Further sbatch options by their long names, for example {mail-type: FAIL}."""

    @field_validator("grace_seconds")
    @classmethod
    def _leaves_time_to_work(cls, grace: int, info: ValidationInfo) -> int:
        hours = info.data.get("hours")
        if hours is not None and grace > hours * 1800:
            raise ValueError(f"must be at most half of the time limit, {hours:g} hours, or nothing is ever finished")
        return grace


class Matrix(Section):
    """One recipe in many variants: the product of all entries of `vary`."""

    base: PathText
    """Recipe file on which every run is based; relative to the current directory, like every path."""
    vary: dict[Text, JsonValue] = Field(min_length=1)
    """Recipe key -> list of its values; or a word of your choice -> named sets of `key: value` overrides."""
    set: dict[Text, JsonValue] = Field(default={})
    """Overrides of every run."""
    output: Text | None = None
    """Output directory that contains `{name}`; default: the base recipe's output and the variant's name."""
    resources: Resources = Resources()
    """Cluster resources of each run; a plain batch on one machine ignores them."""

    @field_validator("vary")
    @classmethod
    def _lists_or_named_sets(cls, vary: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for axis, choices in vary.items():
            named = isinstance(choices, dict) and all(isinstance(overrides, dict) for overrides in choices.values())
            if not choices or not (named or isinstance(choices, list)):
                raise ValueError(
                    f"{axis}: must be a list of values of that recipe key, [64, 256], or named sets of overrides, "
                    "{small: {calibration.num_samples: 64}}"
                )
        return vary

    @field_validator("output")
    @classmethod
    def _names_apart(cls, output: str | None) -> str | None:
        if output is not None and "{name}" not in output:
            raise ValueError("must contain {name}, or all runs would write to one directory")
        return output


def load_matrix(path: Path) -> Matrix:
    """Read a matrix file. Raises RecipeError with every problem."""
    return load_section(Matrix, path)


def variants(matrix: Matrix) -> list[tuple[str, list[str]]]:
    """(name of the variant, its overrides for `load_recipe`), in the order of the file; the last entry of `vary`
    changes fastest. Raises RecipeError for more than 10,000."""
    axes = [list(_choices(axis, choices)) for axis, choices in matrix.vary.items()]
    if (count := math.prod(map(len, axes))) > MAX_RUNS:
        raise RecipeError(f"vary: makes {count:,} runs, at most {MAX_RUNS:,} are taken; split the matrix")
    common = list(matrix.set.items())
    found = []
    for chosen in itertools.product(*axes):
        name = _short("-".join(part for part, _ in chosen))
        pairs = common + [pair for _, overrides in chosen for pair in overrides]
        found.append((name, [f"{key}={_as_yaml(value)}" for key, value in pairs]))
    return found


def parse_resources(pairs: Sequence[str], base: Resources) -> Resources:
    """`base`, updated by `key=value` pairs of the command line, whose values are YAML. Raises RecipeError with every
    problem."""
    data: dict[str, Any] = base.model_dump(exclude_unset=True)
    problems = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            problems.append(f"--resource {pair}: must be key=value, for example hours=8")
            continue
        try:
            data[key.strip()] = parse_value(text)
        except ValueError as error:
            problems.append(f"--resource {pair}: {error}")
    if not problems:
        try:
            return Resources.model_validate(data)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                known = ", ".join(Resources.model_fields)
                problems.append(f"--resource {'.'.join(map(str, detail['loc']))}: {detail['msg']}; keys are {known}")
    raise RecipeError(problems)


def _choices(axis: str, choices: JsonValue) -> Iterator[tuple[str, list[tuple[str, JsonValue]]]]:
    if isinstance(choices, dict):
        for name, overrides in choices.items():
            yield _safe(name), list(overrides.items()) if isinstance(overrides, dict) else []
    elif isinstance(choices, list):
        for value in choices:
            yield _safe(f"{axis.rpartition('.')[2]}_{_word(value)}"), [(axis, value)]


def _as_yaml(value: JsonValue) -> str:
    """The value as one line of YAML for an override. Not JSON, which writes 1e+30, which YAML reads as text."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _short(name: str) -> str:
    """A name for a directory; a long name is cut and ends in a digest of the whole."""
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _word(value: JsonValue) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "+".join(_word(entry) for entry in value) or "none"
    return json.dumps(value)


def _safe(name: str) -> str:
    return _UNSAFE.sub("_", name).strip("_.") or "_"
