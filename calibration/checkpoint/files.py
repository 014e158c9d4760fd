"""Reading files that came from elsewhere: a config, an index, a tokenizer's JSON, a run directory's notes.

A file of a checkpoint is a stranger's: it may be a FIFO that never answers, a device without an end, of any size, nested
a hundred thousand deep, or no text at all. Every reader here opens without waiting, reads regular files alone, bounds
what it takes, and says what is wrong in a SourceError; nothing else leaves these functions.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from recipes import files
from recipes.errors import SourceError

#: Bytes of a text or JSON file. The largest honest ones: the index of a 1.6 T model in NVFP4 with its experts apart
#: takes about 40 MB, a tokenizer.json of 262,144 tokens about 35 MB.
MAX_BYTES = 256 << 20
#: Commas and opening brackets of a JSON file: what bounds the memory that its objects take (a 256 MiB file of empty lists
#: would take 6 GiB). A safetensors header of 100 MB, the longest that the library reads, has about six million.
MAX_VALUES = 20_000_000


class MissingFile(SourceError):
    """There is no file of this name."""


def open_regular(path: Path, remedy: str = "check the path and the permissions") -> BinaryIO:
    """Opens a regular file for reading, its size unbounded. Raises SourceError for a FIFO, a device, a directory, a name
    that no file can have, a file that cannot be opened; MissingFile if there is none."""
    try:
        return files.open_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    except OSError as error:
        shown = str(path) if str(path).isprintable() else repr(str(path))
        raise SourceError(f"{shown}: cannot be read: {error.strerror}; {remedy}") from None


def no_link(path: str, flags: int) -> int:
    """An opener for `open`: a link in the place of a file of our own is an OSError, and what it leads to is not written to."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file or a link to one. Raises nothing, whatever the name."""
    return _mode(path, stat.S_ISREG)


def is_directory(path: Path) -> bool:
    """Whether `path` is a directory or a link to one. Raises nothing, whatever the name."""
    return _mode(path, stat.S_ISDIR)


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES, remedy: str = "check the path and the permissions") -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises SourceError (MissingFile if there is none)."""
    with open_regular(path, remedy) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise SourceError(f"{path}: holds {size:,} bytes, {max_bytes:,} are the most that is read; {remedy}")
            return file.read(size)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}; {remedy}") from None


def read_text(path: Path, *, max_bytes: int = MAX_BYTES, errors: str = "strict") -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises SourceError (MissingFile if there is none)."""
    raw = read_bytes(path, max_bytes=max_bytes)
    try:
        return raw.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}; save it as UTF-8"
        ) from None


def read_json(
    path: Path, *, max_bytes: int = MAX_BYTES, constants: bool = False, remedy: str = "a checkpoint needs it"
) -> Any:
    """The value in a JSON file. `constants` allows NaN and Infinity, which are not JSON and which Python writes. Raises
    SourceError (MissingFile if there is none)."""
    return parse_json(read_bytes(path, max_bytes=max_bytes, remedy=remedy), str(path), constants=constants)


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES, constants: bool = False) -> dict[str, Any]:
    """The JSON object in a file, as `read_json`. Raises SourceError also for any other value."""
    value = read_json(path, max_bytes=max_bytes, constants=constants)
    if not isinstance(value, dict):
        raise SourceError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def parse_json(raw: bytes, where: str, *, constants: bool = False) -> Any:
    """The value of JSON bytes (UTF-8); `where` begins the message. pydantic's parser bounds the depth (200) and the digits
    of a number (4,300) and names line and column. Raises SourceError."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        raise SourceError(f"{where}: holds more than {MAX_VALUES:,} values; no checkpoint needs as many")
    try:
        return from_json(raw.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=constants)
    except ValueError as error:
        raise SourceError(f"{where}: is not valid JSON: {error}") from None


def _mode(path: Path, wanted: Any) -> bool:
    try:
        return bool(wanted(os.stat(path).st_mode))
    except (OSError, ValueError):
        return False
