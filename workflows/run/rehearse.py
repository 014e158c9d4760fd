"""The rehearsal: tries in the first minutes everything that can fail in the night, and reports all failures at once.

It leaves no journal line, and no file in the output or the scratch directory.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from calibration.checkpoint.files import read_json, write_json
from calibration.families.registry import language_config
from calibration.forecast.cost import boundary_bytes, hessian_bytes, hidden_width, scratch_bytes
from calibration.runs.disk import Need, probe_write, space_problems
from calibration.runs.memory import available_memory
from calibration.runs.output import BEGUN, entries, overwrite_problems
from calibration.runs.resume import activations_directory, finished_blocks
from recipes.errors import EnvironmentProblem, RecipeError, SourceError, WorkflowError
from verify.serving.serving import check_serving, prompt_problems
from verify.serving.wants import ask_server, differences
from workflows.run.prediction import FILE, render
from workflows.run.proofs import SERVER
from workflows.run.state import STAGES, Run

if TYPE_CHECKING:
    from calibration.data.batches import CalibrationData
    from calibration.forecast.rehearsal import Rehearsal

#: The probe file is this fraction of what will be written, within these bounds in bytes.
_PROBE_SHARE, _PROBE_LEAST, _PROBE_MOST = 64, 1 << 20, 64 << 20

#: Number of files: of the output besides shards and side files, of a run directory with its logs, of a batch's
#: activations.
OWN_FILES, RUN_FILES, FILES_PER_BATCH = 5, 32, 2

T = TypeVar("T")


def early_problems(run: Run, stages: Sequence[str]) -> list[str]:
    """The problems that can be found without reading a tensor: vLLM environment, output directory, free disk."""
    problems: list[str] = []
    if run.recipe.verify.serving is not None and "verify" in stages:
        try:
            run.engine_version = check_serving(
                run.recipe.verify.serving, run.recipe.verify.accuracy, run.source.directory
            )
        except WorkflowError as error:
            problems += error.problems
    if {"rehearse", "calibrate"} & set(stages):
        problems += _output_problems(run, stages) + space_problems(_output_needs(run))
    return problems


def rehearse(run: Run, early: Sequence[str] = ()) -> None:
    """Tries the disks, the data, the modifiers, a block of every kind, and compares memory with the machine's.

    If blocks are already finished, runs only the cheap checks. Raises the type of the first error with all problems,
    those of the `early` checks first.
    """
    attempts = _Attempts([EnvironmentProblem(early)] if early else [])
    speed = attempts.of(lambda: _probe_disks(run))
    attempts.of(lambda: _read_side_files(run))
    facts: dict[str, Any] = {"write_bytes_per_second": speed}
    attempts.of(lambda: _check_prompts(run))
    if not early:  # which may say that there is no vLLM
        facts["server"] = attempts.of(lambda: _ask_server(run))
    if run.recipe.method == "calibrate":
        facts |= _calibration(run, attempts)
    attempts.end()
    _estimate(run, facts.get("boundary_bytes"))
    run.reporter.event("rehearsed", **facts)


class _Attempts:
    """Collects the errors of consecutive attempts."""

    def __init__(self, errors: list[WorkflowError]) -> None:
        self.errors = errors

    def of(self, attempt: Callable[[], T]) -> T | None:
        """The result of `attempt`, or None if it raised a WorkflowError, which is collected."""
        try:
            return attempt()
        except WorkflowError as error:
            self.errors.append(error)
            return None

    def end(self) -> None:
        """Raises the collected errors as one error."""
        if self.errors:
            raise type(self.errors[0])([problem for error in self.errors for problem in error.problems])


def _read_side_files(run: Run) -> None:
    """Raises SourceError for JSON files beside the shards that cannot be parsed: they are copied, and transformers and vLLM pass
    over a broken one without a word. The tokenizer's are loaded anyway."""
    problems = list[str]()
    for path in run.side_files.copied:
        if path.suffix == ".json" and not path.name.startswith(("tokenizer", "vocab")):
            try:
                read_json(path, constants=True)
            except SourceError as error:
                problems += [f"{problem}; download it again, or remove it" for problem in error.problems]
    if problems:
        raise SourceError(problems)


def scratch_of(run: Run) -> Path:
    """The directory of this run's activations."""
    return activations_directory(run.task.scratch, run.directory.path, run.output)


def _finished(run: Run) -> set[int]:
    discarded = run.restart or (run.overwrite and run.directory.facts("verified"))
    return set() if discarded else finished_blocks(run.directory, run.plan)


def _probe_disks(run: Run) -> dict[str, float]:
    size = min(max(run.plan.output_bytes // _PROBE_SHARE, _PROBE_LEAST), _PROBE_MOST)
    places = {"output": run.output}
    if run.recipe.method == "calibrate" and run.task.scratch is not None:
        places["scratch"] = run.task.scratch
    attempts, speeds = _Attempts([]), dict[str, float]()
    for what, place in places.items():
        speed = attempts.of(lambda place=place: probe_write(place, run.output.name, size))  # type: ignore[misc]
        if speed is not None:
            speeds[what] = round(speed)
            run.reporter.say(f"{what}: {size / 1e6:.0f} MB written, fsynced and renamed at {speed / 1e6:,.0f} MB/s")
    attempts.end()
    return speeds


def _check_prompts(run: Run) -> None:
    """Raises RecipeError for prompts of the recipe that do not fit the context that the verify stage serves."""
    serving = run.recipe.verify.serving
    if serving is None:
        return

    def count(text: str) -> int:
        from calibration.data.batches import load_tokenizer  # imported late: transformers takes seconds

        try:
            return len(load_tokenizer(run.source.directory, run.recipe.source.trust_remote_code).encode(text))
        except SourceError:  # reported where calibration needs it; without one, the engine takes a word as a token
            return len(text.split())

    if problems := prompt_problems(serving, language_config(run.source.config), run.recipe.verify.accuracy, count):
        raise RecipeError(problems)


def _ask_server(run: Run) -> dict[str, str] | None:
    """Compares the plan with what vLLM's own class makes of it, if the recipe serves; writes the proof into the run
    directory. Raises RecipeError with every module that vLLM would not run as planned."""
    options = run.recipe.verify.serving
    if options is None or not run.plan.groups or _finished(run):
        return None
    wants = ask_server(run.task, options, run.directory.path / "logs", run.side_files.copied)
    problems, doubts = differences(run.plan, wants)
    for doubt in doubts:
        run.reporter.say(doubt, "warning")
    if problems:
        raise RecipeError(problems)
    verdict = "UNCHECKED" if wants.unproven else "PASS"
    proof = {"plan": run.plan.digest, "verdict": verdict, "figure": wants.described}
    write_json(run.directory.path / SERVER, proof)
    run.reporter.say(f"server: {proof['verdict']}: {proof['figure']}")
    return proof


def _calibration(run: Run, attempts: _Attempts) -> dict[str, Any]:
    # Imported late: torch and llm-compressor take seconds to import, and earlier checks must not wait for them.
    from calibration.data.batches import embedding_rows, load_batches, load_tokenizer
    from calibration.engine.oneshot import build_modifiers, quiet
    from calibration.forecast.rehearsal import rehearse_blocks
    from calibration.model.skeleton import build_skeleton

    recipe, source, prepared = run.recipe, run.source, run.prepared
    options = recipe.calibration
    assert options is not None, "the schema requires it"

    def load() -> CalibrationData:
        tokenizer = load_tokenizer(source.directory, recipe.source.trust_remote_code)
        return load_batches(options, tokenizer, source_directory=source.directory, embedding=embedding_rows(source))

    prepared.data = attempts.of(load)
    if prepared.data is not None and prepared.data.warning:
        run.reporter.say(prepared.data.warning, "warning")
    finished = _finished(run)
    if finished:
        run.reporter.say(f"{len(finished)} blocks are finished: no block is rehearsed again")
    else:
        logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
        with quiet(lambda event: None), tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            # If an early check failed, there is no run directory, and none is created.
            place = Path(folder) if run.reporter.directory is None else run.directory.path
            model = attempts.of(
                lambda: build_skeleton(run.task.formats, place, recipe.source.trust_remote_code, run.ranks.device)
            )
            if model is not None:
                attempts.of(lambda: build_modifiers(run.task, model))
            data = prepared.data
            if model is not None and data is not None:
                prepared.rehearsal = attempts.of(
                    lambda: rehearse_blocks(model, data.batches, options.experts == "all", Path(folder))
                )
                prepared.model = model
    if prepared.data is None:
        return {}
    shapes = prepared.shapes or []
    width = hidden_width(source.config)
    boundary = boundary_bytes(width, shapes)
    if prepared.rehearsal is not None:
        largest = max(shapes, key=lambda shape: shape[0] * shape[1])
        boundary = round(boundary * prepared.rehearsal.boundary_bytes / boundary_bytes(width, [largest]))
    attempts.of(lambda: _space(run, boundary))
    rehearsal = prepared.rehearsal
    if rehearsal is None:
        return {"boundary_bytes": boundary}
    _say(run, rehearsal, boundary)
    attempts.of(lambda: _memory(run, rehearsal, boundary))
    return asdict(rehearsal) | {"boundary_bytes": boundary}


def _estimate(run: Run, boundary: int | None) -> None:
    """Predicts the run from the rehearsal; saves the prediction in the run directory for --status."""
    from calibration.forecast.predict import Seen, predict
    from calibration.forecast.speed import Machine

    machine, prepared = Machine(run.task, run.ranks.device), run.prepared
    seen = Seen(prepared.shapes, boundary, prepared.rehearsal)
    measured = (run.prediction or {}).get("stages", {})  # a size budget's candidates, by this process
    run.prediction = predict(run.task, machine, seen, _finished(run), run.ranks.size)
    run.prediction["stages"] = measured | run.prediction["stages"]
    write_json(run.directory.path / FILE, run.prediction)
    run.reporter.event("predicted", **run.prediction)
    for line in render(run.prediction):
        run.reporter.say(line)


def _say(run: Run, rehearsal: Rehearsal, boundary: int) -> None:
    blocks = ", ".join(
        f"{block.block} ({block.load.clock:.2f} s to load, {block.forward.clock:.2f} s a batch)"
        for block in rehearsal.blocks
    )
    left = f"; for blocks {rehearsal.left_out} there was no time" if rehearsal.left_out else ""
    run.reporter.say(
        f"rehearsed on {rehearsal.tokens} tokens: blocks {blocks}: finite, equal to the model's own forward{left}; "
        f"peak memory {rehearsal.peak_memory / 1e9:.2f} GB; activations between blocks {boundary / 1e6:,.1f} MB"
    )


def _space(run: Run, boundary: int) -> None:
    scratch = scratch_of(run)
    wanted = scratch_bytes(boundary, len(run.plan.block_numbers), run.recipe.offload.max_host_memory)
    there = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    files = FILES_PER_BATCH * (0 if run.prepared.data is None else len(run.prepared.data.batches))
    problems = space_problems([*_output_needs(run), Need("activations", scratch, max(wanted - there, 0), files)])
    # The early checks have already reported this if the output alone does not fit.
    if problems and not space_problems(_output_needs(run)):
        raise EnvironmentProblem(problems)


def _memory(run: Run, rehearsal: Rehearsal, boundary: int) -> None:
    held = min(boundary, run.recipe.offload.max_host_memory or 0)
    # Hessians lie beside the block's weights.
    hessians = 0 if torch.accelerator.is_available() else hessian_bytes(run.task, run.ranks.size) * run.ranks.local
    wanted, there = rehearsal.peak_memory * run.ranks.local + held + hessians, available_memory()
    if wanted > there:
        also = f", a block's Hessians take {hessians:,}" if hessians else ""
        raise EnvironmentProblem(
            f"memory: the rehearsal took {rehearsal.peak_memory:,} bytes and offload.max_host_memory lets activations take "
            f"{held:,}{also}, together more than the {there:,} that this process can have; lower offload.max_host_memory, "
            "calibration.batch_size or calibration.max_seq_length"
        )


def _output_needs(run: Run) -> list[Need]:
    # Shards of an earlier run are kept, or removed before anything is written.
    there = [path.stat().st_size for path in run.output.glob("*.safetensors")]
    files = max(len(run.plan.shards) - len(there), 0) + len(run.side_files.copied) + OWN_FILES
    return [
        Need("output", run.output, max(run.plan.output_bytes - sum(there), 0), files),
        Need("run directory", run.directory.path, 0, RUN_FILES),
    ]


def _output_problems(run: Run, stages: Sequence[str]) -> list[str]:
    try:
        if not entries(run.output):
            return []
    except EnvironmentProblem as problem:
        return problem.problems
    if run.overwrite:
        return overwrite_problems(run.directory, run.output)
    facts = {fact.get("fact") for fact in run.directory.facts()}
    begun, complete = bool(facts & BEGUN), "verified" in facts
    whole = [name for name in STAGES if name in stages or name == "rehearse"] == list(STAGES)
    if begun and (run.restart or not complete or not whole):
        if not run.restart and not complete:
            run.reporter.say(f"{run.output}: an unfinished run is there; this one resumes it")
        return []
    return [
        f"{run.output}: output is not empty; name another, pass --overwrite, or verify what is there with --from verify"
    ]
