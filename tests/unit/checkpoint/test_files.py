"""Files of strangers: whatever lies under a name, reading it ends at once, in a value or in one SourceError."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from calibration.checkpoint import files
from calibration.checkpoint.files import (
    MissingFile,
    is_directory,
    is_file,
    parse_json,
    read_json,
    read_json_object,
    read_text,
)
from recipes.errors import SourceError


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, "\xc3\xa4"]}')
    assert read_json_object(tmp_path / "a.json") == {"a": [1, 2.5, "\u00e4"]}
    assert read_text(tmp_path / "a.json").startswith("{")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "EOF"),
        (b'{"a": 1,\n "b": }', "line 2 column 7"),
        (b"[" * 100_000, "recursion limit"),
        (b"[" * 300 + b"]" * 300, "recursion limit"),
        (b"9" * 5_000, "number out of range"),
        (b'{"a": NaN}', "line 1 column 7"),
        (b'["\\ud800"]', "hex escape"),
        (b'"\xff"', "unicode"),
        (b"{}{}", "trailing"),
        (b"[1]", "must hold a JSON object, holds a list"),
    ],
)
def test_what_is_no_json_object_is_refused_by_place(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SourceError) as raised:
        read_json_object(tmp_path / "a.json")
    assert str(raised.value).startswith(f"{tmp_path / 'a.json'}: ") and problem in str(raised.value)


def test_constants_that_python_writes_are_read_where_they_are_allowed() -> None:
    assert parse_json(b"[NaN, -Infinity]", "a", constants=True)[1] == float("-inf")


def test_a_file_that_is_too_large_or_holds_too_many_values_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_bytes(b"[" + b"[]," * 1_000 + b"1]")
    with pytest.raises(SourceError, match="holds 3,003 bytes, 3,000 are the most"):
        read_json(tmp_path / "a.json", max_bytes=3_000)
    monkeypatch.setattr(files, "MAX_VALUES", 1_000)
    with pytest.raises(SourceError, match="more than 1,000 values"):
        read_json(tmp_path / "a.json")


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, kind in (
            ("fifo", "FIFO"),
            ("directory", "directory"),
            ("socket", "No such device"),
            ("/dev/zero", "device"),
        ):
            with pytest.raises(SourceError, match=kind):
                read_text(tmp_path / name)
            assert not is_file(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3_000, "a\0b", "\ud800", "absent", "a.json/b"])
def test_a_name_that_no_file_has_is_a_message(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").touch()
    with pytest.raises(SourceError):
        read_json(tmp_path / name)
    assert not is_file(tmp_path / name) and not is_directory(tmp_path / name)


def test_an_absent_file_can_be_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="No such file"):
        read_json(tmp_path / "absent")
