"""Reads JSON files: guards the library that reads them against input that would kill the process, and reads the forms
that it does not support."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow.json  # type: ignore[import-untyped]
from datasets.packaged_modules.json import json as library  # type: ignore[import-untyped]

MAX_DEPTH = 200
"""Maximum depth of brackets; pyarrow 26 crashes with SIGSEGV somewhere above 3000."""
MOST_BYTES = 2 << 30
"""Largest file, in bytes, that is read as a whole."""
_GZIP = b"\x1f\x8b"
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NULL_LINE = re.compile(rb"^[ \t]*null[ \t\r]*$", re.MULTILINE)
_NULL_ROW = re.compile(rb"(?:\A|[^:,\[\s])\s*null")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = np.zeros(256, dtype=np.int64)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


@contextmanager
def guarded_reader() -> Iterator[None]:
    """Inside, datasets' JSON builder does not pass input to pyarrow that would kill the process (deep nesting, null
    rows), and does not mistake a chat for an agent trace, which needs another package."""
    arrow, markers = library.paj, library.has_agent_traces_markers
    library.paj, library.has_agent_traces_markers = _Guard, lambda features: False
    try:
        yield
    finally:
        library.paj, library.has_agent_traces_markers = arrow, markers


class _Guard:
    """Replaces the module pyarrow.json in the builder."""

    ReadOptions = pyarrow.json.ReadOptions

    @staticmethod
    def read_json(file: io.BytesIO, read_options: Any) -> Any:
        batch = _NULL_LINE.sub(b"{}", file.getvalue())
        bare = _STRING.sub(b'""', batch)
        if _depth(bare) > MAX_DEPTH:
            raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
        if _NULL_ROW.search(bare):
            raise ValueError("a row is null")
        return pyarrow.json.read_json(io.BytesIO(batch), read_options=read_options)


def _depth(bare: bytes) -> int:
    """The deepest nesting in JSON whose strings were removed."""
    brackets = np.frombuffer(bare.translate(None, _NO_BRACKETS), dtype=np.uint8)
    return int(_STEP[brackets].cumsum().max(initial=0))


def open_expanded(file: Path) -> IO[bytes]:
    """Opens a file, decompressing gzip, which is recognized by content, as in datasets."""
    with file.open("rb") as opened:
        packed = opened.read(2) == _GZIP
    return cast("IO[bytes]", gzip.open(file)) if packed else file.open("rb")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file (or .gz) with one JSON value, or one per line: an object is a row, a text becomes {text}, a
    list of messages {messages}, a list of numbers {input_ids}, null {}. Reads the whole file into memory.

    Raises ValueError with the file, the line and the problem.
    """
    try:
        with open_expanded(file) as opened:
            raw = opened.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ValueError(f"{file} holds more than {MOST_BYTES >> 20} MiB; make several files of it, or .parquet")
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, {not_utf8(error)}") from None
    except (OSError, EOFError) as error:  # gzip raises both
        raise ValueError(f"{file} cannot be read: {error}") from None
    found = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    values = [(1, _parsed(file, 1, "\n".join(lines)))] if _is_one_value(file, found) else [
        (number, _parsed(file, number, line)) for number, line in found
    ]  # fmt: skip
    if len(values) == 1 and isinstance(values[0][1], list) and not _is_row(values[0][1]):
        return [_row(value, f"{file}, entry {number}") for number, value in enumerate(values[0][1], start=1)]
    return [_row(value, f"{file}, line {number}") for number, value in values]


def as_rows(values: list[Any], place: str) -> list[dict[str, Any]]:
    """The rows of parsed values, as in `read_rows`."""
    return [_row(value, f"{place}, entry {number}") for number, value in enumerate(values, start=1)]


def not_utf8(error: UnicodeDecodeError) -> str:
    """The message for a text that is not UTF-8: where it stops being so, and what to do."""
    line, data = error.object.count(b"\n", 0, error.start) + 1, error.object[: error.start + 2]
    kind = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return (
        f"line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file, for example with "
        f"`iconv -f {kind} -t utf-8`, or remove the line"
    )


def _is_one_value(file: Path, lines: list[tuple[int, str]]) -> bool:
    """Whether the file is one document, not one value per line."""
    if not lines:
        return False
    if len(lines) == 1:
        return True
    try:
        json.loads(lines[0][1])
    except ValueError:
        return file.name.removesuffix(".gz").endswith(".json") or lines[0][1].lstrip().startswith("[")
    except RecursionError:
        return False
    return False


def _parsed(file: Path, number: int, text: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError(
            f"{file}, line {number} holds half of a surrogate pair (\\ud800 to \\udfff), which is not text; correct or "
            "remove "
            "the line"
        ) from None
    except RecursionError:
        raise ValueError(f"{file}, line {number} is nested too deeply; correct or remove the line") from None
    except ValueError as error:
        line = number + getattr(error, "lineno", 1) - 1
        utf16 = "; NUL bytes: is it UTF-16? It must be UTF-8" if "\0" in text else ""
        raise ValueError(f"{file}, line {line} is not JSON: {error}{utf16}; correct or remove the line") from None


def _is_row(value: Any) -> bool:
    """Whether a list is a single row: messages or token ids."""
    if not isinstance(value, list) or not value:
        return False
    return all(type(entry) is int for entry in value) or all(
        isinstance(entry, dict) and ("role" in entry or "from" in entry) for entry in value
    )


def _row(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if value is None or isinstance(value, str):
        return {} if value is None else {"text": value}
    if _is_row(value):
        return {"input_ids" if type(value[0]) is int else "messages": value}
    raise ValueError(
        f"{place} is not a row but {type(value).__name__}; a row is an object, a text, a list of messages or of token "
        "ids"
    )
