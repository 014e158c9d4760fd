"""Makes a temporary plain BF16 copy of a source in FP8 or MXFP4, which the serving engine can load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calibration.plan.task import Task
from calibration.runs.finish import finish_output
from calibration.runs.journal import RunDirectory
from recipes.errors import WorkflowError
from recipes.loader import dump_recipe
from recipes.schema import Recipe
from verify.serving.serving import SourceToServe, source_as_stored

NAME = "plain-source"


@contextmanager
def source_to_serve(task: Task, run_directory: Path) -> Iterator[SourceToServe | None]:
    """Yields the source in a form that vLLM can load on any machine: as stored, or as `method: plain` writes it into
    the run directory, where it is removed at the end. None if the recipe does not serve or compare. Never raises
    WorkflowError."""
    options = task.recipe.verify.serving
    found = source_as_stored(task.formats, options) if options is not None else None
    if found is None or found.directory is not None or found.too_large:
        yield found
        return
    copy = run_directory / NAME
    try:
        yield write_plain_copy(task, copy)
    finally:
        remove_plain_copy(copy)


def write_plain_copy(task: Task, copy: Path) -> SourceToServe:
    """The source of `task` as `method: plain` writes it into the directory `copy`, or why it cannot."""
    # Imported late: a BF16 source does not need its threads and compiled kernel.
    from calibration.convert.pipeline import convert

    remove_plain_copy(copy)  # the remains of a killed run
    plain = Recipe.model_validate(
        {"source": task.recipe.source.model_dump(), "output": str(copy), "method": "plain", "export": {"kept": "plain"}}
    )
    directory = RunDirectory(copy)
    try:
        copying = Task.of(plain, task.formats)
        directory.open()
        convert(copying, directory)
        finish_output(copying, dump_recipe(plain))
    except WorkflowError as error:
        return SourceToServe(None, f"no plain copy of the source: {error.problems[0]}")
    finally:
        directory.close()
    return SourceToServe(copy)


def remove_plain_copy(copy: Path) -> None:
    """Removes it, whole or not."""
    for path in (copy, RunDirectory(copy).path):
        shutil.rmtree(path, ignore_errors=True)
