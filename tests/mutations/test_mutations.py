"""Hundreds of seeded mutations of every kind of file in each run of the tests, a million with `-m slow`: nothing but a
documented error or a verdict comes out, within bounds on time and memory. A failure names the command that replays it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.kinds import KINDS
from tests.mutations.mutate import Sound
from tests.mutations.runner import run

#: Mutations of one test: minutes at most.
PART = 50_000


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mutated_is_itself_taken(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind][0](tmp_path)
    taken = 0
    for seed in range(12):
        try:
            taken += not made.run(Sound(seed))
        except made.documented:
            continue
    made.close()
    assert taken


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutations(kind: str) -> None:
    outcome = run(kind, range(KINDS[kind][1]))
    assert not outcome.failures, outcome.report()
    assert outcome.refused or outcome.done < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "part"), [(kind, part) for kind, (_, _, count) in KINDS.items() for part in range(-(-count // PART))]
)
def test_a_million_mutations(kind: str, part: int) -> None:
    first = 1_000_000 + part * PART
    outcome = run(kind, range(first, first + min(PART, KINDS[kind][2] - part * PART)))
    print(outcome.report())
    assert not outcome.failures, outcome.report()
