"""The table of docs/families.md is what docs/families.json says, and a run changes its own row alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import families, family_table
from tests.family_table import BEGIN, END, Row
from tests.models import any_family


def row(family: str, method: str, **fields: object) -> Row:
    made = {"form": None, "exit_code": 0, "notes": {}, "cosine": "0.96", "seconds": 9, "key": "k", "date": "2026-01-02"}
    verdicts = {"structure": "PASS", "fidelity": "WARN", "serving": "UNCHECKED"}
    return Row.model_validate(
        {"family": family, "method": method, "verdicts": verdicts, "commit": "abc", **made, **fields}
    )


def test_the_page_shows_what_is_kept() -> None:
    shown = family_table.PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == family_table.table(family_table.rows(), families.cases())


def test_a_run_replaces_its_own_row_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_table, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(family_table, "PAGE", tmp_path / "page.md")
    family_table.PAGE.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    family_table.keep(row("qwen2", "convert", cosine=""))
    family_table.keep(row("qwen2", "calibrate", cosine="0.91"))
    family_table.keep(row("qwen2", "calibrate", notes={"serving.load": "UNCHECKED: why|not"}))
    assert [(kept["method"], kept["cosine"]) for kept in json.loads(family_table.KEPT.read_text())] == [
        ("calibrate", "0.96"), ("convert", ""),
    ]  # fmt: skip
    page = family_table.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    both = "PASS WARN UNCHECKED | PASS WARN UNCHECKED"
    assert f"| qwen2 | BF16 | {both} | 0.96 | serving.load UNCHECKED: why\\|not | 2026-01-02 abc |" in page
    assert "| phi3 | BF16 | not run | not run |  |  | never |" in page


def test_a_run_that_ends_before_it_is_verified_shows_its_exit_code() -> None:
    table = family_table.table([row("qwen2", "calibrate", verdicts={}, exit_code=3)], [("qwen2", None)])
    assert "| qwen2 | BF16 | exit 3 | not run |" in table


def test_a_kept_row_is_of_one_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    before = families.key("qwen2", None, "convert")
    assert before == families.key("qwen2", None, "convert") != families.key("qwen2", None, "calibrate")
    monkeypatch.setitem(any_family.FAMILIES, "qwen2", {"rope_theta": 5.0})
    assert families.key("qwen2", None, "convert") != before
