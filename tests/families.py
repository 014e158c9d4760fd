"""Tiny checkpoints of families that no table names, through calibration, verification and vLLM; the rows of
docs/families.md.

python -m tests.families --directory DIR [--method M] [FAMILY ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.integration.whole_runs import SERVING, write_recipe
from tests.integration.whole_runs import run as run_recipe
from tests.models import any_family
from verify.checks import LEVELS

METHODS = ("calibrate", "convert")
_DATA = {"dataset": "bundled", "num_samples": 8, "max_seq_length": 64, "batch_size": 4}
#: On the processor that tests claim; the perplexity is compared with the source's.
_SERVED = {key: value for key, value in SERVING.items() if key in ("python", "dtype")} | {"max_tokens": 4, "windows": 1}


@dataclass(frozen=True)
class Outcome:
    """What one run came to: exit code, a verdict for each level, the checks that failed or warned, and its messages."""

    family: str
    method: str
    exit_code: int
    verdicts: dict[str, str]
    notes: dict[str, str]
    cosine: str
    seconds: float
    messages: str


def run(family: str, method: str, directory: Path, serve: bool, form: str | None = None) -> Outcome:
    """Makes the checkpoint (once), in a stored `form` in three shards, and quantizes its linear layers as a user would;
    verified, and served if asked."""
    stem = family if form is None else f"{family}-{form}"
    source, folder = directory / stem, directory / f"{stem}-{method}"
    if not source.is_dir():
        any_family.write(source, family, form=form, shards=3)
    folder.mkdir(exist_ok=True)
    modifier = {"targets": ["Linear"], "scheme": "NVFP4", "ignore": ["part:head"]}
    recipe = write_recipe(
        folder, source, [], method=method, modifiers=[{"QuantizationModifier": modifier}],
        calibration=_DATA if method == "calibrate" else None, verify={"serving": _SERVED if serve else None},
    )  # fmt: skip
    began = time.monotonic()
    done = run_recipe(recipe, "--overwrite")
    found = folder / "output.run" / "verify.json"
    judged = json.loads(found.read_text()) if found.is_file() else {"verdicts": {}, "checks": []}
    checks = {check["id"]: check for check in judged["checks"]}
    return Outcome(
        family, method, done.returncode, judged["verdicts"],
        {id: f"{check['verdict']}: {check['figure']}" for id, check in checks.items()
         if (check["verdict"] in ("FAIL", "WARN") and id != "fidelity.input_scales")
         or (check["verdict"] == "UNCHECKED" and id == "serving.load")},
        checks.get("fidelity.block_cosine", {}).get("figure", "").partition(" (")[0].removeprefix("worst "),
        time.monotonic() - began, done.stderr,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="of tests.models.any_family; all of them without")
    parser.add_argument("--method", action="append", choices=METHODS, help="both of them without")
    parser.add_argument("--directory", type=Path, required=True, help="where checkpoints and outputs go")
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    print("| family | method | structure | fidelity | serving | worst block cosine | what warned or failed |")
    print("|---|---|---|---|---|---|---|")
    for family in options.families or any_family.FAMILIES:
        for method in options.method or METHODS:
            done = run(family, method, options.directory, serve=True)
            verdicts = " | ".join(done.verdicts.get(level, f"exit {done.exit_code}") for level in LEVELS)
            notes = "; ".join(f"{id} {text}" for id, text in done.notes.items()).replace("|", "\\|")
            print(f"| {family} | {method} | {verdicts} | {done.cosine} | {notes[:300]} |", flush=True)
            print(f"{family} {method}: exit {done.exit_code}, {done.seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
