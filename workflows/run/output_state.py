"""Reads the state of an output with respect to one recipe: whether a batch skips it, and whether the same command has
anything to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from calibration.checkpoint.files import is_file, read_json_object
from calibration.checkpoint.index import INDEX_NAME
from calibration.runs.journal import RunDirectory
from calibration.runs.output import entries
from recipes.checks import Verify
from recipes.errors import EnvironmentProblem, SourceError, WorkflowError
from recipes.loader import load_recipe, recipe_digest
from recipes.schema import Recipe
from verify.checks import SEVERITY, Check, to_json

_FAILED = "verification failed"


@dataclass(frozen=True)
class OutputState:
    """`kind`: `done` (verified, no FAIL, nothing to do), `verify` (finished, to be verified again), `open` (nothing, or an
    unfinished run of this recipe) or `foreign` (something else, see `why`). `verdicts`: the last verification's."""

    kind: str
    why: str = ""
    verdicts: tuple[tuple[str, str], ...] = ()

    @property
    def judged(self) -> bool:
        """Whether a run of this recipe reached its end, with any verdict."""
        return self.kind == "done" or (self.kind == "verify" and self.why == _FAILED)


def read_output_state(
    output: Path, run: RunDirectory, plan_digest: str, digest: str, recipe: Callable[[], Recipe]
) -> OutputState:
    """Reads only the journal, the events and the names of the shards. `digest` is the recipe's; `recipe` is called only
    if the output is another recipe's."""
    facts, events = run.facts(), run.events()
    try:
        there = bool(entries(output))
    except EnvironmentProblem as problem:
        return OutputState("foreign", problem.problems[0].removeprefix(f"{output}: ").partition(";")[0])
    plan = next((fact["plan"] for fact in reversed(facts) if fact.get("plan")), None)
    verified = next((fact for fact in reversed(facts) if fact.get("fact") == "verified"), None)
    if verified is None:
        if there and not facts:
            return OutputState("foreign", "output is not empty")
        if plan not in (None, plan_digest):
            return OutputState("foreign", "an unfinished run of another plan is there")
        return OutputState("open")
    shards = {name for fact in facts if fact.get("fact") == "shards" for name in fact.get("shards", ())}
    if not all(is_file(output / name) for name in (*shards, INDEX_NAME)):
        return OutputState("foreign", "a finished checkpoint is there that has lost files")
    planned = [event for event in events if event["event"] == "plan" and event["time"] <= verified["time"]]
    if plan != plan_digest or not planned:
        return OutputState("foreign", "the checkpoint of another recipe is there")
    verdicts = tuple((level, str(value)) for level, value in verified.items() if level not in ("fact", "time"))
    if planned[-1].get("recipe") == digest:
        failed = "FAIL" in dict(verdicts).values()
        return OutputState("verify", _FAILED, verdicts) if failed else OutputState("done", "", verdicts)
    if _differ_in_verify_alone(run, recipe):
        return OutputState("verify", "the recipe asks for other checks", verdicts)
    return OutputState("foreign", "the checkpoint of another recipe is there")


def last_checks(run: RunDirectory, found: OutputState) -> list[Check]:
    """The checks of the last verification, from verify.json; if that file belongs to another verification, only the
    verdicts of the levels."""
    try:
        listed: Any = read_json_object(run.path / "verify.json").get("checks")
        checks = TypeAdapter(list[Check]).validate_python(listed)
        if to_json(checks)["verdicts"] == dict(found.verdicts):
            return checks
    except (SourceError, ValidationError):
        pass
    what, how = "the verdict of the last verification", "journal.jsonl"
    return [
        Check(f"{level}.verdict", next((v for v in SEVERITY if v == value), "UNCHECKED"), what, "", "", how)
        for level, value in found.verdicts
    ]


def _differ_in_verify_alone(run: RunDirectory, recipe: Callable[[], Recipe]) -> bool:
    try:
        there, ours = load_recipe(run.path / "recipe.yaml"), recipe()
    except WorkflowError:
        return False
    alike = [recipe_digest(recipe.model_copy(update={"verify": Verify()})) for recipe in (there, ours)]
    return alike[0] == alike[1]
