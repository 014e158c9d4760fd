"""Reads and writes past the page cache, where the file system asks for more than they are aligned to."""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.checkpoint import direct
from calibration.checkpoint.direct import PAGE, Buffer, DirectReader, DirectWriter, Extent
from recipes.errors import SourceError

CONTENT = np.random.default_rng(0).integers(0, 256, 5 * PAGE + 100, dtype=np.uint8)


def write(path: Path) -> str:
    buffer, writer = Buffer(6 * PAGE), DirectWriter(path, CONTENT.size)
    buffer.array[: CONTENT.size] = CONTENT
    writer.append(buffer, CONTENT.size, zlib.crc32(CONTENT.data))
    return writer.finish()


def read(path: Path) -> bytes:
    buffer, reader, extent = Buffer(4 * PAGE), DirectReader(path.parent), Extent(path.name, PAGE, 4 * PAGE)
    try:
        return reader.read([extent], buffer)[extent].tobytes()
    finally:
        reader.close()


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file system on sectors of 16 KiB: what O_DIRECT asks of it otherwise is EINVAL. Returns what was refused."""
    refused: list[str] = []

    def strict(name: str) -> Any:
        real = getattr(os, name)

        def transfer(file: int, data: Any, offset: int) -> int:
            size = len(data[0]) if isinstance(data, list) else len(data)
            if fcntl.fcntl(file, fcntl.F_GETFL) & direct._DIRECT and (offset % 16384 or size % 16384):
                refused.append(name)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return int(real(file, data, offset))

        return transfer

    monkeypatch.setattr(os, "preadv", strict("preadv"))
    monkeypatch.setattr(os, "pwrite", strict("pwrite"))
    return refused


def test_a_file_system_with_larger_sectors_is_read_and_written_through_the_page_cache(
    tmp_path: Path, coarse: list[str]
) -> None:
    """XFS with sectors of 16 KiB takes open(O_DIRECT) and refuses the first read and write that are aligned to 4 KiB."""
    digest = write(tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == CONTENT.tobytes()
    assert read(tmp_path / "shard") == CONTENT[PAGE : 4 * PAGE].tobytes()
    assert direct.digest(tmp_path / "shard", Buffer(3 * PAGE)) == digest
    assert coarse in (["pwrite", "preadv", "preadv"], [])  # nothing where the directory has no O_DIRECT at all


def test_what_the_page_cache_cannot_read_either_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shard")

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(SourceError, match="shard: cannot be read: Invalid argument"):
        read(tmp_path / "shard")
