"""A recipe's `budget`: measures once what each candidate costs, chooses, and makes the run one of the recipe written out.

The measurement and the choice are in `<output>.run/budget.json`; the same command finds them there. Other settings measure again,
another size only chooses again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter, ValidationError

from calibration.checkpoint.files import read_json_or_none, write_json
from calibration.plan.budget import BudgetTask
from calibration.plan.versions import versions
from calibration.runs.fingerprint import source_digest
from calibration.runs.journal import RunDirectory
from recipes.errors import EnvironmentProblem, Interrupted, RecipeError, SourceError, WorkflowError
from recipes.loader import load_recipe
from recipes.schema import Recipe
from workflows.inspect_checkpoint import describe_budget
from workflows.run import prediction as estimate
from workflows.run import rehearse as rehearsal
from workflows.run.state import Run

FILE, STATE, HEAD = "budget.json", "budget.safetensors", "budget-head.json"
#: Unit -> candidate -> KL divergence that it causes alone, in nats a token.
Errors = dict[str, dict[str, float]]


def choose_schemes(run: Run, stages: Sequence[str], dry_run: bool = False) -> None:
    """Settles the run's recipe with the choice that an earlier process of it made, or else measures and chooses; a dry run and
    several ranks never measure. Raises the errors of the early checks, of the data and of the measurement, and RecipeError."""
    budget, ranks = run.budget, run.ranks
    if budget is None:
        return
    errors, choice = _known(run.directory.path, budget) if ranks.writes else (None, None)
    if choice is None and errors is not None:
        choice = budget.choose(errors)[0] if dry_run else _write_choice(run, budget, errors)
    if ranks.size > 1:
        choice = ranks.all_gather("budget", choice)[0]
    if choice is None and dry_run:
        return
    if choice is None:
        if ranks.size > 1:
            raise RecipeError(
                "budget: one process measures: run the same recipe once without torchrun and with --stages inspect"
            )
        if not {"inspect", "rehearse", "calibrate"} & set(stages):
            raise EnvironmentProblem(f"{run.directory.path}: no choice for this budget is there; run all stages")
        if problems := rehearsal.early_problems(run, stages):
            raise EnvironmentProblem(problems)
        run.directory.open()
        run.reporter.directory = run.directory
        with run.reporter.stage("budget"):
            _predict(run, budget)
            with estimate.measured(run.took, "budget"):
                choice = _write_choice(run, budget, _measure(run, budget))
    run.settle(choice)


def known_choice(directory: Path, budget: BudgetTask) -> dict[str, str] | None:
    """The choice for this size that is in a run directory; None if the run has to measure or to choose first."""
    return _known(directory, budget)[1]


def asked(budget: BudgetTask) -> str:
    """What a choice is for, in a few letters: what was measured, and the size."""
    return f"{measurement_key(budget)}:{budget.budget.bits_per_parameter:g}"


def settled(run: RunDirectory, wanted: str, recipe: Recipe) -> tuple[str, Recipe] | None:
    """The digest of the plan that a run chose for `wanted` (see `asked`), and `recipe` with that choice written out; None before
    it chose. Reads the run directory alone."""
    found = read_json_or_none(run.path / FILE) or {}
    try:
        modifiers = load_recipe(run.path / "recipe.yaml").modifiers
    except WorkflowError:
        return None
    if found.get("asked") != wanted or not isinstance(found.get("plan"), str):
        return None
    return found["plan"], recipe.model_copy(update={"modifiers": modifiers, "budget": None})


def _predict(run: Run, budget: BudgetTask) -> None:
    """Predicts the measurement; the prediction is saved for --status until the rehearsal's joins it."""
    from calibration.forecast.measuring import predict_measuring  # imported late: needs torch
    from calibration.forecast.speed import Machine

    measuring = predict_measuring(budget, Machine(run.task, run.ranks.device))
    run.prediction = {"from": "micro-benchmark", "stages": {"budget": measuring}, "notes": []}
    write_json(run.directory.path / estimate.FILE, run.prediction)
    run.reporter.event("predicted", **run.prediction)
    for line in estimate.render(run.prediction):
        run.reporter.say(line)


def _known(directory: Path, budget: BudgetTask) -> tuple[Errors | None, dict[str, str] | None]:
    """What was measured with these settings and is in the run directory, and what was chosen for this size; None for what is
    not there."""
    found = read_json_or_none(directory / FILE)
    if found is None or found.get("key") != measurement_key(budget):
        return None, None
    try:
        errors = TypeAdapter(Errors).validate_python(found.get("errors"))
        chosen = TypeAdapter(dict[str, str]).validate_python(found.get("choice"))
    except ValidationError:
        return None, None
    if any(errors.get(unit.name, {}).keys() != unit.sizes.keys() for unit in budget.units):
        return None, None
    same = found.get("bits_per_parameter") == budget.budget.bits_per_parameter
    fits = all(chosen.get(unit.name) in unit.sizes for unit in budget.units) and budget.nbytes(chosen) <= budget.limit
    return errors, chosen if same and fits else None


def measurement_key(budget: BudgetTask) -> str:
    """What the measurement depends on."""
    calibration = budget.recipe.calibration
    assert calibration is not None, "a budget needs method calibrate"
    try:
        source = source_digest(budget.formats.checkpoint)
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read: {error.strerror}; is the source whole?") from None
    body = {
        "plan": budget.plan.digest,
        "source": source,
        "calibration": calibration.model_dump(mode="json"),
        "tokens": budget.budget.tokens,
        "units": {unit.name: unit.sizes for unit in budget.units},
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _measure(run: Run, budget: BudgetTask) -> Errors:
    """Measures; resumes a measurement that was stopped."""
    # Imported late: torch's models take seconds to import.
    from calibration.data.batches import embedding_rows, load_batches, load_tokenizer
    from calibration.engine.oneshot import quiet
    from calibration.engine.sensitivity import Saved, measure
    from calibration.model.skeleton import build_skeleton

    recipe, source, reporter = budget.recipe, budget.formats.checkpoint, run.reporter
    assert recipe.calibration is not None, "a budget needs method calibrate"
    trusted, (samples, length) = recipe.source.trust_remote_code, budget.text
    shown = {"num_samples": samples, "max_seq_length": length, "batch_size": samples, "exact": False}
    data = load_batches(
        recipe.calibration.model_copy(update=shown),
        load_tokenizer(source.directory, trusted),
        source_directory=source.directory,
        embedding=embedding_rows(source),
    )
    reporter.say(f"measuring {len(budget.units):,} units on {data.num_tokens:,} tokens: {data.description}")
    key = hashlib.sha256(
        json.dumps([measurement_key(budget), data.digest, versions()], sort_keys=True).encode()
    ).hexdigest()
    saved = Saved(run.directory.path / STATE, run.directory.path / HEAD, key)
    with TemporaryDirectory() as work, run.interrupts.deferring():
        with quiet(lambda event: None):
            model = build_skeleton(budget.formats, Path(work), trusted, run.ranks.device)
        return measure(budget.units, model, list(data.batches), saved, partial(_report_step, run))


def _report_step(run: Run, what: str, finished: int, number: int) -> None:
    run.reporter.event("measured", **{what: finished - 1, f"{what}s": number})
    if finished % max(1, number // 8) == 0:
        run.reporter.say(f"measured {what if what == 'block' else 'the head on sample'} {finished}/{number}")
    if run.interrupts.requested:
        at = (
            f"measuring block {finished} of {number}"
            if what == "block"
            else f"sample {finished} of {number} at the head"
        )
        raise Interrupted(f"stopped after {at}; the same command resumes")


def _write_choice(run: Run, budget: BudgetTask, errors: Errors) -> dict[str, str]:
    """Chooses, writes budget.json, and says what was chosen."""
    choice, found = budget.choose(errors)
    nbytes = budget.nbytes(choice)
    smallest = sum(errors[unit.name][unit.smallest] for unit in budget.units)
    facts = {
        "key": measurement_key(budget),
        "asked": asked(budget),
        "plan": budget.task_of(choice).plan.digest,
        **describe_budget(budget),
        "chosen": {"bytes": nbytes, "bits_per_parameter": round(budget.bits(nbytes), 3)},
        "kl_smallest": smallest,
        "kl_chosen": found.error,
        "kl_bound": found.bound,
        "choice": choice,
        "errors": errors,
    }
    run.directory.open()
    write_json(run.directory.path / FILE, facts)
    for name in (STATE, HEAD):
        (run.directory.path / name).unlink(missing_ok=True)
    counts = ", ".join(f"{name}: {count} units" for name, count in Counter(choice.values()).most_common())
    run.reporter.say(
        f"budget: chose {budget.bits(nbytes):.3f} of {budget.budget.bits_per_parameter:g} bits per parameter ({counts}); the "
        f"units' KL divergences add up to {found.error:.4f} nats, the smallest's to {smallest:.4f}; no choice is below "
        f"{found.bound:.4f}"
    )
    return choice
