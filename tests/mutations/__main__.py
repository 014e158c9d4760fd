"""`python -m tests.mutations KIND SEED`: runs one mutation again, with its traceback; `KIND FIRST COUNT`: many of them."""

from __future__ import annotations

import argparse

from tests.mutations.kinds import KINDS
from tests.mutations.runner import run


def main() -> int:
    """Returns 1 if a mutation ended in what is no verdict."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--failures", type=int, default=10, help="stop after so many")
    options = parser.parse_args()
    outcome = run(options.kind, range(options.seed, options.seed + options.count), options.failures)
    print(outcome.report())
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
