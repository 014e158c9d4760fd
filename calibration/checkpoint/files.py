"""Files: those of strangers are read within bounds, our own are written so that no broken one ever bears its final name.

A file of a checkpoint is a stranger's: it may be a FIFO that never answers, a device without an end, of any size, nested
a hundred thousand deep, or no text at all. Every reader here opens without waiting, reads regular files alone, bounds
what it takes, and says what is wrong in a SourceError; nothing else leaves these functions.

A file of our own is written beside its place, fsynced and renamed: a kill or a full disk leaves the old one or none.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from recipes import files
from recipes.errors import EnvironmentProblem, SourceError

#: Ends the name of a file that is being written.
PARTIAL = ".partial"
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


def read_json_or_none(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, NaN and Infinity allowed; None if there is no such file or it holds something else."""
    try:
        return read_json_object(path, constants=True)
    except SourceError:
        return None


def parse_json(raw: bytes, where: str, *, constants: bool = False) -> Any:
    """The value of JSON bytes (UTF-8); `where` begins the message. pydantic's parser bounds the depth (200) and the digits
    of a number (4,300) and names line and column. Raises SourceError."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        raise SourceError(f"{where}: holds more than {MAX_VALUES:,} values; no checkpoint needs as many")
    try:
        return from_json(raw.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=constants)
    except ValueError as error:
        raise SourceError(f"{where}: is not valid JSON: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8). A lone surrogate, which a name of other bytes than UTF-8 has in Python, is spelled."""
    write_safely(path, lambda partial: partial.write_bytes(text.encode(errors="backslashreplace")), len(text))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as transformers writes a config: two spaces, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safely(path: Path, write: Callable[[Path], object], nbytes: int) -> None:
    """Calls `write` with `<path>.partial`, which is not there, fsyncs it and renames it to `path`.

    Raises EnvironmentProblem naming the file, the bytes wanted and the bytes free; the partial file is removed.
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
    """What went wrong while `path` was written, in one sentence with its remedy; `full`: the disk is."""
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
    """How many more files the file system of an existing directory takes; None if it does not count them (btrfs)."""
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
