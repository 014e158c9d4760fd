"""The stages of a run in their order: inspect, rehearse, calibrate, export, verify. Each can be run again on its own."""

from __future__ import annotations

import json
from typing import Any

from calibration.checkpoint.files import read_json_or_none, write_json, write_text
from calibration.checkpoint.index import INDEX_NAME, Checkpoint, changed_shards
from calibration.forecast.cost import needs
from calibration.plan.versions import versions
from calibration.runs.finish import CARD_NAME, finish_output
from calibration.runs.output import start_over
from recipes.errors import EnvironmentProblem, RecipeError, SourceError
from recipes.loader import dump_recipe, recipe_digest
from recipes.schema import Recipe
from verify.checks import Check, to_json
from verify.known import Known
from verify.levels import Settings, samples_of, verify_levels
from verify.proof.statistics import PROVENANCE_NAME
from workflows.inspect_checkpoint import describe_checkpoint, describe_plan
from workflows.run import rehearse as rehearsal
from workflows.run.card import model_card
from workflows.run.dress_rehearsal import dress_rehearsal, remove_remains
from workflows.run.judged import record_judged
from workflows.run.output_state import last_checks, read_output_state
from workflows.run.plain_copy import source_to_serve
from workflows.run.proofs import PROOFS, one_line, proofs
from workflows.run.provenance import write_provenance
from workflows.run.report import verdict_facts
from workflows.run.state import STAGES, Run


def describe_run(run: Run) -> dict[str, Any]:
    """The plan and its predictions, as JSON."""
    return {
        "checkpoint": describe_checkpoint(run.source, run.formats),
        "plan": describe_plan(run.plan, run.source),
        "predicted": needs(run.task),
        "side_files": {
            "copied": [str(path.relative_to(run.source.directory)) for path in run.side_files.copied],
            "left_out": run.side_files.left_out,
        },
    }


def judged_before(run: Run, stages: list[str]) -> list[Check] | None:
    """The checks of a complete earlier run of this command with all stages; None if there is something to do. The
    source must be unchanged, and the output's headers must be intact."""
    whole = [name for name in STAGES if name in stages or name == "rehearse"] == list(STAGES)
    if not whole or run.overwrite or run.restart:
        return None
    found = read_output_state(run.output, run.directory, run.plan.digest, recipe_digest(run.recipe), lambda: run.recipe)
    if not found.judged:
        return None
    begun = [fact["source"] for fact in run.directory.facts() if fact.get("fact") in ("fingerprint", "started")]
    # Early versions recorded no state of the source.
    if begun and begun[-1] and (changed := changed_shards(begun[-1], run.source.state)):
        run.reporter.say(f"the source changed since {run.output} was made: {changed[0]}", "warning")
        return None
    try:
        Checkpoint.open(run.output)
    except SourceError as error:
        run.reporter.say(f"{run.output}: was finished and is damaged: {error.problems[0]}", "warning")
        return None
    verdicts = ", ".join(f"{level} {verdict}" for level, verdict in found.verdicts)
    run.reporter.say(
        f"{run.output}: done and verified before by this recipe and plan ({verdicts}): nothing to do; --from verify verifies it "
        "again, --overwrite makes it again"
    )
    return last_checks(run.directory, found)


def inspect(run: Run, stages: list[str]) -> None:
    """Checks first what would otherwise fail at the end: output directory, disk, vLLM environment. Then writes the plan
    and the recipe into the run directory."""
    problems = rehearsal.early_problems(run, stages)
    if problems and "rehearse" in stages:
        run.reporter.say(
            f"problems so far: {len(problems)}; the rehearsal looks for more before it reports them", "warning"
        )
        rehearsal.rehearse(run, problems)
    if problems:
        raise EnvironmentProblem(problems)
    run.directory.open()
    remove_remains(run)
    run.reporter.directory = run.directory
    run.reporter.watch = run.page.update
    write_text(run.directory.path / "recipe.yaml", dump_recipe(run.recipe))
    described = describe_run(run)
    write_json(run.directory.path / "plan.json", described)
    facts = described["plan"]
    run.reporter.event(
        "plan", digest=run.plan.digest, recipe=recipe_digest(run.recipe), versions=versions(), actions=facts["actions"]
    )
    groups = ", ".join(f"{name}: {g['scheme']} x {g['modules']}" for name, g in facts["groups"].items())
    run.reporter.say(
        f"plan {run.plan.digest[:12]}: {groups}; output {facts['output_bytes']:,} bytes, "
        f"{facts['bits_per_parameter']} bits per parameter"
    )


def rehearse(run: Run) -> None:
    """Tries everything that could fail later (`workflows.run.rehearse`), and then, before a long run, the whole way in
    miniature (`workflows.run.dress_rehearsal`)."""
    rehearsal.rehearse(run)
    dress_rehearsal(run, (calibrate, export))


def require_shareable(recipe: Recipe) -> None:
    """Raises RecipeError if several ranks would not write what a single one writes."""
    if recipe.method != "calibrate":
        raise RecipeError(f"method: {recipe.method} uses all processors from one process; start it without torchrun")
    from calibration.engine.oneshot import require_divisible

    require_divisible(recipe)


def calibrate(run: Run) -> None:
    """Calibrates block by block and writes each finished block's shards, or, for the methods without calibration,
    converts shard by shard; resumes an earlier run."""
    if run.recipe.method != "calibrate":
        return _convert(run)
    # Imported late: torch and llm-compressor take seconds to import, and earlier stages must not wait for them.
    from workflows.run.calibrate import calibrate_blocks

    calibrate_blocks(run)


def _convert(run: Run) -> None:
    # Imported late: uses threads and a compiled kernel, which the other stages do not need.
    from calibration.convert.pipeline import convert

    if run.overwrite or run.restart:
        start_over(run.directory, run.output, "replaced")
    # Until the export stage has run, shards of two runs must not look like a checkpoint.
    (run.output / INDEX_NAME).unlink(missing_ok=True)
    with run.reporter.transfer(run.recipe.method) as progress:
        done = convert(run.task, run.directory, progress)
    run.reporter.event("converted", level=done.level, workers=done.workers, seconds=round(done.seconds, 3))
    if done.inverted:
        run.reporter.say(
            f"modelopt's NVFP4 respelled: packed bytes and group scales as they were, {done.inverted} global scales inverted; "
            f"float32 rounds {done.inexact} of the reciprocals, by {done.worst:.1e} at most; {done.widened} input scales took "
            "the largest of those that share one"
        )
    run.reporter.say(
        f"{done.quantized} weights quantized ({done.lossless} MXFP4 without loss, {done.requantized} requantized), "
        f"{done.cast} cast, {done.copied} copied, {done.consumed} scales used up; {done.resumed} of {done.shards} shards "
        f"were finished before; {done.bytes_read / 1e6:,.1f} MB read, {done.bytes_written / 1e6:,.1f} MB written in "
        f"{done.seconds:.1f} s, kernel {done.level}, {done.workers} workers"
    )


def export(run: Run) -> None:
    """Writes side files, config and, last, the index; needs every shard of the calibrate stage."""
    done = {
        name for fact in run.directory.facts("shards") if fact["plan"] == run.plan.digest for name in fact["shards"]
    }
    missing = [
        shard.name for shard in run.plan.shards if shard.name not in done or not (run.output / shard.name).is_file()
    ]
    if missing:
        raise EnvironmentProblem(
            f"{run.output}: {len(missing)} of {len(run.plan.shards)} shards of this plan are not there (first: {missing[0]}); "
            "run the calibrate stage first (--from calibrate)"
        )
    files = finish_output(run.task, dump_recipe(run.recipe))
    write_provenance(run)
    _write_card(run)
    run.directory.record("exported", plan=run.plan.digest, files=[*files, PROVENANCE_NAME, CARD_NAME])
    run.reporter.say(f"output: {run.output} ({run.plan.output_bytes:,} bytes in {len(run.plan.shards)} shards)")


def verify(run: Run) -> None:
    """Runs the levels that the recipe asks for; writes verify.json and the model card with the verdicts."""
    options = run.recipe.verify
    if not (run.output / INDEX_NAME).is_file():
        raise EnvironmentProblem(
            f"{run.output}: no finished checkpoint there; run the export stage first (--from export)"
        )
    asked = {
        "structure": options.structure,
        "fidelity": options.fidelity is not None,
        "serving": options.serving is not None,
    }
    with source_to_serve(run.task, run.directory.path) as served_source:
        settings = Settings(
            [level for level, wanted in asked.items() if wanted],
            run.directory.path / "logs",
            fidelity=options.fidelity,
            text=run.recipe.calibration,
            serving=options.serving,
            accuracy=options.accuracy,
            source_to_serve=served_source,
            trust_remote_code=run.recipe.source.trust_remote_code,
        )
        run.checks, result = verify_levels(
            run.output,
            Known(run.plan, run.formats, _written(run)),
            settings,
            run.reporter.say,
            # Not write_json, because one number per line would turn 70,000 rows into a million lines.
            on_fidelity=lambda data: write_text(run.directory.path / "fidelity.json", json.dumps(data)),
        )
    run.samples = result.get("samples", [])
    if result:
        write_json(run.directory.path / "serving.json", result)
    write_json(run.directory.path / "verify.json", to_json(run.checks))
    _write_card(run)
    record_judged(run.directory, run.output)
    run.reporter.say(f"family {run.plan.family.described}: {one_line(proofs(run.task, run.directory, run.checks))}")
    run.directory.record("verified", **to_json(run.checks)["verdicts"])


def _written(run: Run) -> dict[str, str]:
    """Shard -> digest in the journal, so that the verification can check that it reads what was written."""
    facts = [fact for fact in run.directory.facts("shards") if fact["plan"] == run.plan.digest]
    return {shard: digest for fact in facts for shard, digest in fact["shards"].items()}


def _write_card(run: Run) -> None:
    found = proofs(run.task, run.directory, run.checks)
    write_json(run.directory.path / PROOFS, found)
    facts = {"proven": one_line(found)}
    summary = run.directory.facts("calibrated")
    if summary:
        facts |= {"calibration": summary[-1]["data"], "tokens per expert": summary[-1]["tokens_per_expert"]}
    if run.budget is not None:
        asked = run.budget.budget.bits_per_parameter
        facts["budget"] = (
            f"{asked:g} bits per parameter; each module's scheme is chosen by the KL divergence that it causes"
        )
    machines = [f"{fact['device']} (products {fact['digest']})" for fact in run.directory.facts("products")]
    if len(machines) > 1:
        facts["calculated on"] = f"{', then '.join(machines)}, which round differently"
    write_text(run.output / CARD_NAME, model_card(run.task, run.checks, facts, verdict_facts(run.output)))


def read_samples(run: Run) -> list[dict[str, Any]]:
    """The generated samples of the last serving verification, for the summary."""
    return run.samples or samples_of(read_json_or_none(run.directory.path / "serving.json"))
