"""Reads untrusted files within bounds, and writes our own so that no incomplete file ever has its final name.

A file of a checkpoint is a stranger's: it may be a FIFO that never answers, an endless device, of any size, nested a
hundred thousand levels deep, or not text at all. Every reader here opens without waiting, reads only regular files,
bounds what it reads, and reports every error as a SourceError.

Our own files are written as `.partial`, fsynced and renamed: a kill or a full disk leaves the old file or none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from recipes import files
from recipes.errors import EnvironmentProblem, SourceError

#: Suffix of a file that is being written.
PARTIAL = ".partial"
#: Largest text or JSON file, in bytes. The largest legitimate ones: the index of a 1.6 T model in NVFP4 with separate
#: experts takes about 40 MB, a tokenizer.json with 262,144 tokens about 35 MB.
MAX_BYTES = 256 << 20
#: Maximum number of commas and opening brackets of a JSON file: bounds the memory of its objects (a 256 MiB file of
#: empty lists would take 6 GiB). A safetensors header of 100 MB, the longest that the library reads, has about six
#: million.
MAX_VALUES = 20_000_000


class MissingFile(SourceError):
    """Raised if there is no file of this name."""


def open_regular(path: Path, remedy: str = "check the path and the permissions") -> BinaryIO:
    """Opens a regular file of any size for reading. Raises SourceError for a FIFO, a device, a directory, an impossible
    name or a file that cannot be opened; MissingFile if there is none."""
    try:
        return files.open_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    except OSError as error:
        shown = str(path) if str(path).isprintable() else repr(str(path))
        raise SourceError(f"{shown}: cannot be read: {error.strerror}; {remedy}") from None


def no_link(path: str, flags: int) -> int:
    """An opener for `open` of our own files: raises OSError for a link, whose target would otherwise be overwritten."""
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
    """The value in a JSON file. `constants` allows NaN and Infinity, which are not JSON but which Python writes. Raises
    SourceError (MissingFile if there is none)."""
    return parse_json(read_bytes(path, max_bytes=max_bytes, remedy=remedy), str(path), constants=constants)


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES, constants: bool = False) -> dict[str, Any]:
    """The JSON object in a file, as `read_json`. Raises SourceError also for any other value."""
    value = read_json(path, max_bytes=max_bytes, constants=constants)
    if not isinstance(value, dict):
        raise SourceError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def read_json_or_none(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, NaN and Infinity allowed; None if there is no such file or it holds something else."""
    try:
        return read_json_object(path, constants=True)
    except SourceError:
        return None


def inner(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under `key` in a file that may be damaged; an empty one if there is none."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def parse_json(raw: bytes, where: str, *, constants: bool = False) -> Any:
    """The value of JSON bytes (UTF-8); `where` begins the message. pydantic's parser limits the depth (200) and the
    digits of a number (4,300) and reports line and column. Raises SourceError."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        raise SourceError(f"{where}: holds more than {MAX_VALUES:,} values; no checkpoint needs as many")
    try:
        return from_json(raw.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=constants)
    except ValueError as error:
        raise SourceError(f"{where}: is not valid JSON: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8). A lone surrogate, which Python uses for file names that are not UTF-8, is escaped."""
    write_safely(path, lambda partial: partial.write_bytes(text.encode(errors="backslashreplace")), len(text))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in the style of transformers' configs: two spaces of indentation, a final newline."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_safely(path: Path, write: Callable[[Path], object], nbytes: int) -> None:
    """Calls `write` with `<path>.partial`, which does not exist yet, then fsyncs the file and renames it to `path`.

    Raises EnvironmentProblem that names the file, the bytes needed and the bytes free, and removes the partial file.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a link there would have its target overwritten
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise EnvironmentProblem(explain(path, error, nbytes, error.errno == errno.ENOSPC)) from error


def file_digest(path: Path) -> str:
    """sha256 of a regular file, hex. Raises OSError."""
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(path: Path, error: Exception, nbytes: int, full: bool) -> str:
    """The message for an `error` while `path` was written, with its remedy; `full` says that the disk is full."""
    if not full:
        return f"{path}: cannot be written: {error}; check the path and the permissions"
    place = next(parent for parent in path.absolute().parents if parent.exists())
    disk = os.statvfs(place)
    if free_inodes(place) == 0:
        return (
            f"{path}: no inode is left for one more file on the file system of {place} ({disk.f_bavail * disk.f_frsize:,} "
            "bytes are free); remove some files there and run the same command again (files already finished stay)"
        )
    return (
        f"{path}: the disk is full: {nbytes:,} bytes wanted, {disk.f_bavail * disk.f_frsize:,} free; free some space and "
        "run the same command again (files already finished stay)"
    )


def free_inodes(place: Path) -> int | None:
    """The number of further files that fit on the file system of an existing directory; None if it has no limit
    (btrfs)."""
    disk = os.statvfs(place)
    return disk.f_favail if disk.f_files else None


def fsync_directory(directory: Path) -> None:
    """Makes renames inside `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode(path: Path, wanted: Any) -> bool:
    try:
        return bool(wanted(os.stat(path).st_mode))
    except (OSError, ValueError):
        return False
