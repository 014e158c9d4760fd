"""Reads the data set that a recipe names with Hugging Face datasets: bundled, local files, a directory, the hub.

No code of a data set runs: datasets 5 refuses loading scripts and pickles.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
from datasets.utils.extract import Extractor  # type: ignore[import-untyped]

from calibration.data.json_rows import as_rows, guarded_reader, not_utf8, open_expanded, read_rows
from recipes.errors import SourceError
from recipes.schema import Calibration

BUNDLED = Path(__file__).parent / "bundled" / "texts.jsonl"
"""The text set that ships with the project; its NOTICE names sources and licenses."""
BUILDERS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv",
    ".tsv": "csv",
}  # fmt: skip
COMPRESSED = ".gz"
"""Suffixes that may follow the suffix of a JSON or CSV file."""
MAX_ENTRIES = 100_000
"""Maximum number of files and directories below a data set's directory."""
_COMMIT = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")


EXPANSION, EXPANDED = 200, 1 << 30
"""A file that expands to more than this many bytes and this many times its size is not text, which gzip shrinks 3 to 20
times."""
LOOKED_INTO = 1 << 30
"""Bytes of files that are read again to describe what is wrong with a data set."""


@dataclass(frozen=True)
class Table:
    """The rows of a data set. With `books` each row is a whole .txt file. `place` begins every message about the data
    set; `files` are its local files, None for the hub."""

    data: Any
    place: str
    files: list[Path] | None
    books: bool = False

    def __len__(self) -> int:
        return len(self.data)

    @property
    def revision(self) -> str | None:
        """The hub's commit that the rows are from, as datasets records it in the addresses of the files; None for local files."""
        addresses = getattr(getattr(self.data, "info", None), "download_checksums", None) or {}
        commits = {found[1] for address in addresses if (found := _COMMIT.search(str(address)))}
        return commits.pop() if self.files is None and len(commits) == 1 else None

    @property
    def columns(self) -> list[str]:
        return list(self.data.column_names)

    def rows(self, columns: list[str], order: Iterable[int]) -> Iterator[Mapping[str, Any]]:
        """Yields these columns of the rows in `order`. Raises SourceError for a row that cannot be read, and for a
        column of images, audio or anything else that datasets would decode."""
        wanted = self.data.select_columns(columns)
        for column, feature in (wanted.features or {}).items():
            if kind := _decoded(feature):
                raise SourceError(f"{self.place}: column {column!r} holds {kind}, not text; name another column")
        for index in order:
            try:
                row = wanted[index]
            except Exception as error:  # Arrow first reads the values here
                problems = _damages(self.files) or [
                    f"row {index + 1} cannot be read: {first_line(error)}; is it UTF-8?"
                ]
                raise SourceError([f"{self.place}: {problem}" for problem in problems]) from error
            yield row

    def unfolded(self) -> Table:
        """If the table has one row with one list (`{"version": 1, "data": [...]}`), the rows in that list; else this
        table."""
        if len(self) != 1:
            return self
        (row,) = self.rows(self.columns, [0])
        lists = {name: value for name, value in row.items() if isinstance(value, list)}
        if len(lists) != 1:
            return self
        ((name, values),) = lists.items()
        try:
            return Table(_Rows(as_rows(values, f"key {name!r}")), self.place, self.files)
        except ValueError as error:
            raise SourceError(f"{self.place}: {error}") from None


class _Rows:
    """Rows that datasets cannot read, with the methods of datasets.Dataset that `Table` needs."""

    features = None

    def __init__(self, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
        self._rows = rows
        self.column_names = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else columns

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: self._rows[index].get(name) for name in self.column_names}

    def select_columns(self, columns: list[str]) -> _Rows:
        return _Rows(self._rows, columns)


def load_table(options: Calibration) -> Table:
    """The rows of the recipe's data set and split.

    Raises SourceError for a data set that is missing, unreachable, damaged or empty, that contains anything but regular
    files, and for an unknown split.
    """
    path = BUNDLED if options.dataset == "bundled" else Path(options.dataset).expanduser()
    mode = _mode(path, options)
    if mode is not None and stat.S_ISREG(mode):
        return _load_file(options, path)
    if mode is not None and stat.S_ISDIR(mode):
        _look_through(path, options)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _guarded(options, [], partial(_from_disk, path, options.split))
        files = sorted(file for file in path.rglob("*") if file.is_file() and builder_of(file))
        if files and all(file.suffix == ".txt" for file in files):
            return _load_files(options, "text", files)

        def read_directory() -> Any:
            for file in files:
                _check_expansion(file)
            _check_inside(path, options)
            return datasets.load_dataset(str(path), name=options.config_name, split=options.split)

        return _guarded(options, files, read_directory)
    if mode is not None:
        raise SourceError(f"calibration.dataset {options.dataset}: is not a regular file (a device, pipe or socket)")
    if builder_of(path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", options.dataset):
        raise SourceError(
            f"calibration.dataset {options.dataset}: no such file or directory (relative paths start at "
            f"{Path.cwd()}); name a {', '.join(BUILDERS)} file, a directory of them, a hub id, or `bundled`"
        )
    read = partial(datasets.load_dataset, options.dataset, name=options.config_name, split=options.split)
    return _guarded(options, None, read)


def text_table(text: str) -> Table:
    """A text as a table of one book."""
    return Table(_Rows([{"text": text}]), "the text", [], books=True)


def builder_of(path: Path) -> str | None:
    """The datasets builder for a file of this name; None for other kinds of files."""
    name = path.name.lower()
    builder = BUILDERS.get(Path(name.removesuffix(COMPRESSED)).suffix)
    return None if name.endswith(COMPRESSED) and builder not in ("json", "csv") else builder


def _mode(path: Path, options: Calibration) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a loop of links, a too long name, no permission
        raise SourceError(f"calibration.dataset {options.dataset}: cannot be read: {error}") from None


def _look_through(directory: Path, options: Calibration) -> None:
    """Raises SourceError for anything that would never end: links to a parent directory, pipes and devices, too many
    files."""
    place = f"calibration.dataset {options.dataset}"
    entries = 0
    above: dict[str, tuple[str, ...]] = {str(directory): (os.path.realpath(directory),)}
    for folder, folders, files in os.walk(directory, followlinks=True):
        entries += len(folders) + len(files)
        if entries > MAX_ENTRIES:
            raise SourceError(f"{place}: holds more than {MAX_ENTRIES:,} files; name one of them, or join them")
        for name in folders:
            real = os.path.realpath(os.path.join(folder, name))
            if real in above[folder]:
                raise SourceError(
                    f"{place}: {os.path.join(folder, name)} links to a directory above it; remove the link"
                )
            above[os.path.join(folder, name)] = (*above[folder], real)
        for file in (Path(folder, name) for name in files):
            try:
                regular = stat.S_ISREG(file.stat().st_mode)
            except OSError:  # a broken link
                continue
            if not regular:
                raise SourceError(f"{place}: {file} is not a regular file (a device, pipe or socket); remove it")


def _check_inside(directory: Path, options: Calibration) -> None:
    """Raises ValueError if the README.md of a directory names files outside it or at another address."""
    found = datasets.load_dataset_builder(str(directory), name=options.config_name).config.data_files or {}
    inside = tuple(f"{real}/" for real in (os.path.abspath(directory), os.path.realpath(directory)))
    for file in (str(file) for files in found.values() for file in files):
        if not os.path.normpath(file).startswith(inside):
            raise ValueError(
                f"README.md names {file}, which is not in the directory; remove it there, or copy the file"
            )


def _load_file(options: Calibration, path: Path) -> Table:
    builder = builder_of(path)
    if builder is None:
        raise SourceError(
            f"calibration.dataset {options.dataset}: a file must end in {', '.join(BUILDERS)} (JSON and CSV also in "
            f"{COMPRESSED}), not {path.suffix!r}"
        )
    if builder == "json" and _begins(path) == b"[[":
        # The library would make each message a row.
        return _guarded(options, [path], lambda: _Rows(read_rows(path)))
    return _load_files(options, builder, [path])


def _load_files(options: Calibration, builder: str, files: list[Path]) -> Table:
    settings: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    if builder == "csv" and ".tsv" in files[0].name.lower():
        settings["sep"] = "\t"
    data_files = {"train": [str(file) for file in files]}

    def read() -> Any:
        for file in files:
            _check_expansion(file)
        try:
            return datasets.load_dataset(builder, data_files=data_files, split=options.split, **settings)
        except datasets.exceptions.DatasetBuildError:
            if builder != "json":
                raise
            # The library cannot put these into one table (lists of messages, values of several types).
            return _Rows([row for file in files for row in read_rows(file)])

    return _guarded(options, files, read, books=builder == "text")


def _check_expansion(file: Path) -> None:
    """Raises ValueError for an archive, and for a small file that would fill disk and memory. datasets decompresses a
    file by its content, whatever its name."""
    packed = Extractor.infer_extractor_format(str(file))
    if packed is None:
        return
    if packed != "gzip":
        raise ValueError(f"{file} is compressed ({packed}); unpack it, or use gzip")
    size, most = 0, max(EXPANDED, EXPANSION * file.stat().st_size)
    with open_expanded(file) as opened:
        while block := opened.read(1 << 20):
            size += len(block)
            if size > most:
                raise ValueError(f"{file} expands to more than {most:,} bytes, which text never does")


def _begins(path: Path) -> bytes:
    """The first two bytes that are not whitespace, after a byte order mark; empty if the file cannot be read."""
    try:
        with open_expanded(path) as file:
            return b"".join(file.read(4096).removeprefix(b"\xef\xbb\xbf").split())[:2]
    except (OSError, EOFError):
        return b""


def _from_disk(path: Path, split: str) -> datasets.Dataset:
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"Unknown split {split!r}. Should be one of {sorted(loaded)}.")
    return loaded[split]


def _guarded(options: Calibration, files: list[Path] | None, read: Callable[[], Any], books: bool = False) -> Table:
    """The result of `read()` as a table; turns its many exceptions into one SourceError. `files` are the local files,
    None for the hub."""
    place = f"calibration.dataset {options.dataset!r}"
    if files and not any(file.stat().st_size for file in files):
        raise SourceError([f"{place}: {file} is empty" for file in files])
    try:
        with _quiet(progress=files is None), guarded_reader():
            data = read()
    except Exception as error:  # datasets raises a dozen types, some only from its dependencies
        raise SourceError([f"{place}: {line}" for line in _explain(error, files, options.split)]) from error
    if len(data) == 0:
        raise SourceError(f"{place}: split {options.split!r} has no rows; name another split or data set")
    return Table(data, place, files, books)


def _explain(error: Exception, files: list[Path] | None, split: str) -> list[str]:
    if damaged := _damages(files):
        return damaged
    cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetBuildError) else error
    message = first_line(cause)
    if "split" in message.lower() and isinstance(error, ValueError):
        return [f"calibration.split {split!r}: {message}"]
    if files is not None:
        return [f"cannot be read: {message}"]
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return [f"not found on the hub: {message}. Correct the id, or log in to the hub if it is gated"]
    remedy = "Copy the data set to a local file and name that, or set calibration.dataset: bundled"
    if isinstance(error, ConnectionError):
        return [f"the hub cannot be reached, and there is no local file of this name: {message}. {remedy}"]
    return [f"cannot be loaded from the hub: {message}. {remedy}"]


def _damages(files: list[Path] | None) -> list[str]:
    """One problem for each damaged local file, at most five."""
    sizes = itertools.accumulate(file.stat().st_size for file in files or [])
    looked_into = [file for file, size in zip(files or [], sizes, strict=True) if size <= LOOKED_INTO]
    return list(itertools.islice((problem for file in looked_into if (problem := _damaged(file))), 5))


def _damaged(file: Path) -> str | None:
    """The problem of a text file: the first line that does not parse or is not UTF-8; None if there is none."""
    builder = builder_of(file)
    if builder == "json":
        try:
            read_rows(file)
        except ValueError as error:
            return str(error)
    elif builder in ("csv", "text"):
        try:
            with open_expanded(file) as opened:
                opened.read(LOOKED_INTO).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return f"{file}, {not_utf8(error)}"
        except (OSError, EOFError) as error:
            return f"{file} cannot be read: {error}"
    return None


def _decoded(feature: Any) -> str | None:
    """The kind of a column that datasets decodes from files or addresses, which the data set could choose; else
    None."""
    if isinstance(feature, dict):
        return next((kind for inner in feature.values() if (kind := _decoded(inner))), None)
    if isinstance(feature, list):
        return _decoded(feature[0])
    if hasattr(feature, "feature"):
        return _decoded(feature.feature)
    plain = isinstance(feature, datasets.Value | datasets.ClassLabel | datasets.Translation | datasets.Json)
    return None if plain else type(feature).__name__


def first_line(error: BaseException | None) -> str:
    """Type and first line of an error, for one-line messages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


@contextmanager
def _quiet(*, progress: bool) -> Iterator[None]:
    """Silences the libraries' own error logs, which would repeat our message."""
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
