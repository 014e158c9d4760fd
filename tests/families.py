"""Tiny checkpoints of families that no table names, through calibration, verification and vLLM: the matrix of
docs/families.md. What a run came to is kept in docs/families.json, and the table is written anew after each.

python -m tests.families --directory DIR [--method M] [--again] [FAMILY or FAMILY:FORM ...]

runs what is not kept under today's versions and definitions; `--table` runs nothing and writes the table alone.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tests import family_table
from tests.integration.whole_runs import SERVING, write_recipe
from tests.integration.whole_runs import run as run_recipe
from tests.models import any_family
from tests.reference.engine import VLLM_PYTHON

METHODS = ("calibrate", "convert")
#: Each form in which families are released, with those that are: tiles of DeepSeek-V3 and Kimi-K2, FP8 per channel and per
#: tensor of compressed-tensors, INT4 experts of Kimi-K2-Thinking and K2.5, gpt-oss' MXFP4, Qwen3.5's stacks, Step-3.7's in
#: tiles. Without a form a source is BF16 in many small shards.
STORED = (
    ("kimi_k25", "int4"), ("kimi_k2", "fp8_tiles"), ("deepseek_v3", "fp8_tiles"), ("glm4_moe", "fp8_channel"),
    ("minimax_m2", "fp8_tiles"), ("qwen3_5_moe", "fp8_tiles"), ("olmoe", "fp8_tensor"), ("kimi_k2", "int4"),
    ("gpt_oss", "mxfp4"), ("qwen3_5_moe", "stacked"), ("step3p7", "fp8_stacks"),
    ("llama4", "fp8_modelopt_stacks"),
    ("qwen2_moe", "single_file"), ("granitemoe", "single_file"),
)  # fmt: skip
_DATA = {"dataset": "bundled", "num_samples": 8, "max_seq_length": 64, "batch_size": 4}
#: On the processor that tests claim; the perplexity is compared with the source's.
_SERVED = {key: value for key, value in SERVING.items() if key in ("python", "dtype")} | {"max_tokens": 4, "windows": 1}
#: What random weights of a family lose to NVFP4 beyond the default limit (KL 0.6): the output's weights and quantized inputs in
#: transformers have a KL of 0.71 and a top-1 of 26 % on random tokens, in vLLM 0.71 and 28 % on text.
_REQUIRE = {"qwen3_5_moe": {"max_kl": 1.0}}
#: The rest of a recipe that a form needs: NVFP4 lies beside no MXFP4 in vLLM.
_BESIDE = {"mxfp4": {"export": {"kept": "plain"}}}


@dataclass(frozen=True)
class Outcome:
    """What one run came to, and all that it said."""

    row: family_table.Row
    messages: str


def cases() -> list[tuple[str, str | None]]:
    """Every family as BF16, and those that are stored otherwise too."""
    return [*((family, None) for family in any_family.FAMILIES), *STORED]


def run(family: str, method: str, directory: Path, serve: bool, form: str | None = None) -> Outcome:
    """Makes the checkpoint (once), in a stored `form` in three shards, and quantizes its linear layers as a user would;
    verified, and served if asked."""
    stem = family if form is None else f"{family}-{form}"
    source, folder = directory / stem, directory / f"{stem}-{method}"
    if not source.is_dir():
        any_family.write(source, family, form=form, shards=3)
    folder.mkdir(exist_ok=True)
    served = _SERVED | {"require": _REQUIRE[family]} if family in _REQUIRE else _SERVED
    modifier = {"targets": ["Linear"], "scheme": "NVFP4", "ignore": ["part:head"]}
    recipe = write_recipe(
        folder, source, [], method=method, modifiers=[{"QuantizationModifier": modifier}],
        calibration=_DATA if method == "calibrate" else None, verify={"serving": served if serve else None},
        **_BESIDE.get(form or "", {}),
    )  # fmt: skip
    began = time.monotonic()
    done = run_recipe(recipe, "--overwrite")
    found = folder / "output.run" / "verify.json"
    judged = json.loads(found.read_text()) if found.is_file() else {"verdicts": {}, "checks": []}
    checks = {check["id"]: check for check in judged["checks"]}
    served = (id for id, check in checks.items() if id.startswith("serving.") and check["verdict"] == "UNCHECKED")
    unchecked = next(served, None)  # those after it are for its reason
    notes = {
        id: f"{check['verdict']}: {check['figure']}" for id, check in checks.items()
        if (check["verdict"] in ("FAIL", "WARN") and id != "fidelity.input_scales")
        or (serve and id == unchecked)
    }  # fmt: skip
    why = "" if judged["verdicts"] else done.stderr.strip().rpartition("error: ")[2].partition("\n")[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    row = family_table.Row(
        family=family, form=form, method=method, exit_code=done.returncode,
        verdicts={level: verdict for level, verdict in judged["verdicts"].items() if serve or level != "serving"},
        notes=notes | ({"run": why} if why else {}),
        cosine=checks.get("fidelity.block_cosine", {}).get("figure", "").partition(" (")[0].removeprefix("worst "),
        seconds=round(time.monotonic() - began), key=key(family, form, method), date=datetime.date.today().isoformat(),
        commit=commit.stdout.strip(),
    )  # fmt: skip
    return Outcome(row, done.stderr)


def run_and_keep(family: str, method: str, directory: Path, serve: bool, form: str | None = None) -> Outcome:
    """`run`, whose row goes to docs/families.json and into the table."""
    done = run(family, method, directory, serve, form)
    family_table.keep(done.row)
    return done


def key(family: str, form: str | None, method: str) -> str:
    """What a row depends on beside this project's code: the definition of the checkpoint and the libraries' versions."""
    known = {name: metadata.version(name) for name in ("torch", "transformers", "llmcompressor", "compressed-tensors")}
    packages = Path(VLLM_PYTHON).parents[1].glob("lib/python*/site-packages")
    served = {d.metadata["Name"]: d.version for d in metadata.distributions(path=[str(path) for path in packages])}
    known["vllm"] = next((version for name, version in served.items() if name.startswith("vllm")), "none")
    made = [any_family.definition(family), form, method, _DATA, known]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="of tests.models.any_family, or FAMILY:FORM; all of them without")
    parser.add_argument("--method", action="append", choices=METHODS, help="both of them without")
    parser.add_argument("--directory", type=Path, help="where checkpoints and outputs go")
    parser.add_argument("--again", action="store_true", help="also what is kept")
    parser.add_argument("--unserved", action="store_true", help="structure and fidelity alone: seconds, not a minute")
    parser.add_argument("--table", action="store_true", help="write the table of docs/families.md alone")
    options = parser.parse_args(arguments)
    if options.table or options.directory is None:
        family_table.write([*cases()])
        return
    options.directory.mkdir(parents=True, exist_ok=True)
    wanted = [(name.partition(":")[0], name.partition(":")[2] or None) for name in options.families] or cases()
    kept = {(row.family, row.form, row.method): row for row in family_table.rows()}
    for method in options.method or METHODS:
        for family, form in wanted:
            row = kept.get((family, form, method))
            if row is not None and row.key == key(family, form, method) and not options.again:
                continue
            row = run_and_keep(family, method, options.directory, form is None and not options.unserved, form).row
            print(f"{family} {form or 'bf16'} {method}: exit {row.exit_code}, {row.verdicts}, {row.notes}, "
                  f"{row.seconds} s", file=sys.stderr, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
