"""The data set that a recipe names, read with Hugging Face datasets: bundled, local files, a directory, the hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]

from recipes.errors import SourceError
from recipes.schema import Calibration

BUNDLED = Path(__file__).parent / "bundled" / "texts.jsonl"
"""The text set that ships with the project; its NOTICE names sources and licences."""
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load_table(options: Calibration) -> tuple[datasets.Dataset, bool]:
    """The rows of the recipe's data set and split, and whether they are whole books (one .txt file each).

    Raises SourceError for a data set that is missing, unreachable, damaged or empty, and for an unknown split.
    """
    path = BUNDLED if options.dataset == "bundled" else Path(options.dataset).expanduser()
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise SourceError(
                f"calibration.dataset {options.dataset}: a file must end in {', '.join(BUILDERS)}, not {path.suffix!r}"
            )
        return _load_files(options, BUILDERS[path.suffix], [path]), path.suffix == ".txt"
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _guarded(options, [], partial(_from_disk, path, options.split)), False
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in BUILDERS)
        if files and all(file.suffix == ".txt" for file in files):
            return _load_files(options, "text", files), True
        read = partial(datasets.load_dataset, str(path), name=options.config_name, split=options.split)
        return _guarded(options, files, read), False
    if path.suffix in BUILDERS or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", options.dataset):
        raise SourceError(
            f"calibration.dataset {options.dataset}: no such file or directory (relative paths start at "
            f"{Path.cwd()}); name a {', '.join(BUILDERS)} file, a directory of them, a hub id, or `bundled`"
        )
    read = partial(datasets.load_dataset, options.dataset, name=options.config_name, split=options.split)
    return _guarded(options, None, read), False


def _load_files(options: Calibration, builder: str, files: list[Path]) -> Any:
    whole = {"sample_by": "document"} if builder == "text" else {}
    data_files = {"train": [str(file) for file in files]}
    read = partial(datasets.load_dataset, builder, data_files=data_files, split=options.split, **whole)
    return _guarded(options, files, read)


def _from_disk(path: Path, split: str) -> datasets.Dataset:
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"Unknown split {split!r}. Should be one of {sorted(loaded)}.")
    return loaded[split]


def _guarded(options: Calibration, files: list[Path] | None, read: Callable[[], Any]) -> Any:
    """`read()` with its many exceptions as one SourceError. `files` are the local ones, None for the hub."""
    place = f"calibration.dataset {options.dataset!r}"
    if files and not any(file.stat().st_size for file in files):
        raise SourceError([f"{place}: {file} is empty" for file in files])
    try:
        with _quiet(progress=files is None):
            table = read()
    except Exception as error:  # datasets raises a dozen types, some of them only from its dependencies
        raise SourceError([f"{place}: {line}" for line in _explain(error, options, files)]) from error
    if len(table) == 0:
        raise SourceError(f"{place}: split {options.split!r} has no rows; name another split or data set")
    return table


def _explain(error: Exception, options: Calibration, files: list[Path] | None) -> list[str]:
    damaged = [problem for file in files or [] if file.suffix in (".json", ".jsonl") for problem in _damaged(file)]
    if damaged:
        return damaged
    message = first_line(error.__cause__ if isinstance(error, datasets.exceptions.DatasetBuildError) else error)
    if "split" in message.lower() and isinstance(error, ValueError):
        return [f"calibration.split {options.split!r}: {message}"]
    if files is not None:
        return [f"cannot be read: {message}"]
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return [f"not found on the hub: {message}. Correct the id, or log in to the hub if it is gated"]
    remedy = "Copy the data set to a local file and name that, or set calibration.dataset: bundled"
    if isinstance(error, ConnectionError):
        return [f"the hub cannot be reached, and there is no local file of this name: {message}. {remedy}"]
    return [f"cannot be loaded from the hub: {message}. {remedy}"]


def _damaged(file: Path) -> list[str]:
    """The first line of a JSON file that does not parse, if any."""

    def problem(text: str, offset: int) -> str | None:
        try:
            json.loads(text)
        except ValueError as error:
            line = offset + getattr(error, "lineno", 1)
            return f"{file}, line {line} is not JSON: {error}; correct or remove the line"
        return None

    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".json" and problem(text, 0) is None:
        return []
    if file.suffix == ".json" and text.lstrip().startswith("["):
        return [found] if (found := problem(text, 0)) else []
    lines = (problem(line, number) for number, line in enumerate(text.split("\n")) if line.strip())
    return list(islice((line for line in lines if line), 1))


def first_line(error: BaseException | None) -> str:
    """Type and first line of an error, for one-line messages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _quiet(*, progress: bool) -> Iterator[None]:
    """Keeps the libraries' own error logs from repeating what our one message says."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if not progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
