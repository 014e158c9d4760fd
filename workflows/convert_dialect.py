"""`python -m workflows.convert_dialect SOURCE OUTPUT --to nvidia|compressed_tensors`: converts a finished NVFP4
checkpoint to the other dialect.

Packed codes, group scales, FP8 codes and all plain tensors keep their bytes; global scales are inverted. After a kill,
run the same command to resume. Exit codes as in workflows.run.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from pathlib import Path

from calibration.checkpoint.dialect import DIALECTS, Dialect
from calibration.checkpoint.files import is_file, write_json, write_safely
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import INDEX_NAME, Checkpoint
from calibration.checkpoint.side_files import side_files
from calibration.convert.pipeline import Conversion, convert
from calibration.plan.plan import Plan
from calibration.plan.respelling import make_respelling, require_exact_scales
from calibration.plan.task import Task
from calibration.runs.finish import CARD_NAME, finish_output
from calibration.runs.journal import RunDirectory
from calibration.runs.output import entries, overwrite_problems, start_over
from recipes.errors import EnvironmentProblem, Interrupted, RecipeError, WorkflowError, collapsed
from recipes.loader import dump_recipe, load_recipe, read_yaml
from recipes.places import place_problems
from recipes.schema import Recipe
from recipes.streams import exit_with, parse_arguments, print_result, printed

#: Number of one-way scales to print; the run directory lists all.
_SHOWN = 5


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workflows.convert_dialect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a finished NVFP4 checkpoint; it is only read")
    parser.add_argument("output", type=Path, help="directory of the new checkpoint")
    parser.add_argument("--to", choices=tuple(DIALECTS), required=True, help="the dialect to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in the output")
    options = parse_arguments(parser, arguments)
    try:
        respell(options.source, options.output, DIALECTS[options.to], options.overwrite)
    except KeyboardInterrupt:
        return _report_error(Interrupted())
    except WorkflowError as error:
        return _report_error(error)
    return printed()


def _report_error(error: WorkflowError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def respell(source: Path, output: Path, to: Dialect, overwrite: bool) -> Conversion:
    """Writes the checkpoint in `source` into `output` in the dialect `to` and prints what was done. Raises
    WorkflowError; problems visible in headers and scales are raised before anything is written."""
    problems = place_problems(source, output, None)
    if problems:
        raise RecipeError(problems)
    formats = Formats(Checkpoint.open(source))
    plan = make_respelling(formats, to)
    require_exact_scales(plan, formats)
    side_files(source)  # reports an unreadable one before the hours of copying
    recipe_text = _recipe(source, to)
    directory = RunDirectory(output)
    _require_free(directory, output, plan, overwrite)
    directory.open()
    try:
        if overwrite:
            start_over(directory, output, "replaced")
        (output / INDEX_NAME).unlink(missing_ok=True)  # shards of two dialects must not look like a checkpoint
        recipe = Recipe.model_validate(
            {"source": {"checkpoint": str(source)}, "output": str(output), "method": "plain"}
        )
        task = Task(recipe, formats, plan)
        done = convert(task, directory)
        write_json(directory.path / "one_way.json", list(done.one_way))
        directory.record("exported", plan=plan.digest, files=_finish(task, recipe_text))
    finally:
        directory.close()
    _report(plan, done, output, directory)
    return done


def _require_free(directory: RunDirectory, output: Path, plan: Plan, overwrite: bool) -> None:
    """Raises EnvironmentProblem if the output contains something that this command may not replace."""
    if overwrite:
        problems = overwrite_problems(directory, output)
    else:
        begun = directory.facts("started")
        own = bool(begun) and begun[-1]["plan"] == plan.digest
        there = entries(output)
        problems = (
            [f"{output}: is not empty (first: {there[0]}): name another output, or pass --overwrite to replace it"]
            if there and not own
            else []
        )
    if problems:
        raise EnvironmentProblem(problems)


def _recipe(source: Path, to: Dialect) -> str | None:
    """The recipe in a checkpoint of this project, with the dialect set to `to`; it still makes the plan of the original
    source. None if the checkpoint has no recipe of this project."""
    path = source / "recipe.yaml"
    try:
        if not is_file(path) or not {"source", "output"} <= read_yaml(path)[1].keys():
            return None
        made = load_recipe(path)
    except WorkflowError:
        return None
    return dump_recipe(made.model_copy(update={"export": made.export.model_copy(update={"dialect": to.name})}))


def _finish(task: Task, recipe_text: str | None) -> list[str]:
    """Writes everything except the shards, including the source's model card, and returns the names."""
    card = task.source.directory / CARD_NAME
    if is_file(card):
        write_safely(task.output / CARD_NAME, functools.partial(shutil.copyfile, card), card.stat().st_size)
    return [*([CARD_NAME] if is_file(card) else []), *finish_output(task, recipe_text)]


def _report(plan: Plan, done: Conversion, output: Path, directory: RunDirectory) -> None:
    for warning in plan.warnings:
        print_result(f"warning: {warning}")
    print_result(
        f"{output}: {plan.dialect}, {plan.output_bytes:,} bytes in {done.shards} shards ({done.resumed} finished before), "
        f"{done.seconds:.1f} s; {done.copied} tensors byte for byte, {done.cast} tile scales in another dtype with their "
        f"values, {done.inverted} global scales inverted"
    )
    if done.one_way:
        shown = collapsed(done.one_way)
        more = f" and {len(shown) - _SHOWN} more kinds" if len(shown) > _SHOWN else ""
        print_result(
            f"{len(done.one_way)} of {done.inverted} inverses do not give their scale back bit for bit in float32 (one unit in "
            f"the last place off on the way back): {', '.join(shown[:_SHOWN])}{more}; all in {directory.path / 'one_way.json'}"
        )
    else:
        print_result(f"all {done.inverted} inverses give their scale back bit for bit")


if __name__ == "__main__":
    exit_with(main)
