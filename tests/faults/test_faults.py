"""Every fault is caught by the check that promises it, at its level."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.checkpoints import BASES, Good, make
from tests.faults.faults import FAULTS, Fault
from tests.faults.judge import judged
from verify.fidelity.fidelity import verify_fidelity
from verify.known import Known
from verify.structure.structure import verify_structure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Good]:
    return cache(lambda base: make(base, tmp_path_factory.mktemp(base)))


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.level != "serving"], ids=lambda fault: fault.name)
def test_the_fault_is_caught(good: Callable[[str], Good], tmp_path: Path, fault: Fault) -> None:
    base = good(fault.base)
    directory = Path(shutil.copytree(base.directory, tmp_path / "output"))
    fault.spoil(directory)
    found = {check.id: check for check in judged(fault, base, directory)}
    assert fault.check in found and found[fault.check].verdict == "FAIL", [
        c for c in found.values() if c.verdict != "PASS"
    ]
    if fault.level == "structure":
        # What the checkpoint alone betrays is not forgiven where the source is known.
        checks = verify_structure(directory, Known(base.plan, base.source))
        assert "FAIL" in {check.verdict for check in checks}


@pytest.mark.parametrize("base", BASES)
def test_the_unspoiled_checkpoints_pass(good: Callable[[str], Good], base: str) -> None:
    made = good(base)
    alone = verify_structure(made.directory)
    whole = verify_structure(made.directory, Known(made.plan, made.source, made.digests))
    fidelity = verify_fidelity(made.directory, made.plan, made.source)
    assert {check.verdict for check in [*alone, *whole, *fidelity]} <= {"PASS", "WARN", "UNCHECKED"}, [
        *alone,
        *whole,
        *fidelity,
    ]


def test_the_list_is_what_it_says() -> None:
    names = Counter(fault.name for fault in FAULTS)
    assert len(names) >= 40 and max(names.values()) == 1


def test_the_table_in_docs_is_of_this_list_and_has_no_miss() -> None:
    """`python -m tests.faults` writes it."""
    rows = [
        line.split(" | ") for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")
    ]
    told = [(row[0].removeprefix("| "), row[1], row[2]) for row in rows[1:]]
    assert told == [(fault.name, fault.base, f"{fault.level}: {fault.check}") for fault in FAULTS]
