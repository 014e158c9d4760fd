"""Writes docs/faults.md: every fault, what caught it here, and what plain vLLM and plain transformers say of it.

    python -m tests.faults [--directory DIR] [--output docs/faults.md] [--no-peers] [--only TEXT] [--new]

A quarter of an hour on two idle cores with the peers, two minutes without; `--new` makes only the rows that the table
lacks or that say `not asked`. `make venv-vllm` first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import peers
from tests.faults.checkpoints import BASES, NOT_RUN, Good, make
from tests.faults.faults import FAULTS, Fault
from tests.faults.judge import judged, served
from tests.reference.engine import VLLM_PYTHON
from verify.checks import Check
from verify.fidelity.fidelity import verify_fidelity
from verify.known import Known
from verify.structure.structure import verify_structure

_PEERS = {"vllm": VLLM_PYTHON, "transformers": sys.executable}
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


_NOT_ASKED = "not asked"


@dataclass
class Row:
    """One line of the table."""

    fault: Fault
    level: str = ""
    kept: bool = False
    checks: list[str] = field(default_factory=list)
    says: dict[str, str] = field(default_factory=dict)


def failing(checks: list[Check]) -> list[str]:
    """The ids of the checks that say FAIL."""
    return [check.id for check in checks if check.verdict == "FAIL"]


def lowest(fault: Fault, good: Good, directory: Path) -> tuple[str, list[str]]:
    """The lowest level at which a check says FAIL, and those checks. Digests, which see every change, come last, and
    serving is tried for the faults that promise it."""

    for level, check in (
        ("structure", lambda: verify_structure(directory)),
        ("structure with source", lambda: verify_structure(directory, Known(good.plan, good.source))),
        ("fidelity", lambda: verify_fidelity(directory, good.plan, good.source)),
        (
            ("serving", lambda: served(good, directory, directory.with_name("logs")))
            if fault.level == "serving"
            else (
                "structure in a run",
                lambda: verify_structure(directory, Known(good.plan, good.source, good.digests)),
            )
        ),
    ):
        found = failing(check())
        if found:
            return level, found
    return "", []


def ask(peer: str, directories: Mapping[str, Path], work: Path) -> dict[str, dict[str, Any]]:
    """What a peer says of each directory (see peers.py)."""
    request, result = work / f"{peer}-request.json", work / f"{peer}-result.json"
    request.write_text(json.dumps([[name, str(directory)] for name, directory in directories.items()]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | _ENVIRONMENT
    subprocess.run([_PEERS[peer], str(peers.__file__), peer, str(request), str(result)], env=environment, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    found: dict[str, dict[str, Any]] = json.loads(result.read_text())
    return found


def opinion(found: dict[str, Any], good: dict[str, Any]) -> str:
    """One cell: silent, silent with other tokens, the first new warning, or the error."""
    if good["outcome"] != "runs":
        return "does not know the model"
    if found["outcome"] != "runs":
        return f"{found['outcome']}: {_short(found['message'])}"
    new = [line for line in found["warnings"] if line not in good["warnings"]]
    if new:
        return f"warns: {_short(new[0])}" + (f" (and {len(new) - 1} more)" if len(new) > 1 else "")
    return "**silent**" + (", other tokens" if found["text"] != good["text"] else "")


def _short(text: str) -> str:
    line = re.sub(r"/\S*/", "", next((part for part in text.splitlines() if part.strip()), "").strip())
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)
    line = line if len(line) <= 90 else line[:87] + "..."
    return line.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def table(rows: list[Row], versions: str, asked: bool) -> str:
    """The document."""
    silent = {peer: sum(row.says.get(peer, "").startswith("**silent") for row in rows) for peer in _PEERS}
    told = sum(bool(row.says) for row in rows)
    missed = [row.fault.name for row in rows if not row.kept]
    lines = [
        "# Faults",
        "",
        "Made by `python -m tests.faults`; do not edit. Each row is a corruption of a good checkpoint (tests/faults/faults.py),",
        "the level that promises to catch it, and the checks that said FAIL at the lowest level that did: `structure` has the",
        "checkpoint alone, `with source` its source too, `in a run` also the digests of the run's journal; `fidelity` compares",
        "weights with the source; `serving` runs vLLM. `tests/faults/test_good.py` holds the checkpoints that must pass.",
        "",
        f"**{len(rows)} faults, {len(missed)} missed by the check that promises them.**",
    ]
    if asked:
        lines += [
            f"Plain vLLM loads and generates without a new word from **{silent['vllm']} of {told}**, plain transformers",
            f"loads **{silent['transformers']} of {told}** so.",
            "",
            f"{versions}. Plain vLLM: `vllm.LLM` on a CPU with our emulation of its missing NVFP4 kernels, eight greedy tokens,",
            "no sentinel and no hooks. Plain transformers (what llm-compressor loads with): `AutoModelForCausalLM` and",
            "`AutoTokenizer`, no generation. *silent*: no error, and no warning or line of the loading report that the good",
            "checkpoint does not get too. (Of the good DeepSeek-V4 transformers reports 1213 missing or unexpected keys, and",
            "cannot run it; it is silent where that report is the same.)",
        ]
    lines += [
        "",
        "| fault | of | promised | caught at | by | plain vLLM | plain transformers |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        promised = f"{row.fault.level}: {row.fault.check}" + ("" if row.kept else " MISSED")
        cells = (row.fault.name, row.fault.base, promised, row.level, ", ".join(row.checks),
                 row.says.get("vllm", _NOT_ASKED), row.says.get("transformers", _NOT_ASKED))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def earlier(path: Path, asking: bool) -> tuple[dict[str, Row], str]:
    """The rows of a table that still hold, by fault, and its line of versions; with `asking`, rows that no peer was asked
    for do not."""
    text = path.read_text()
    known, rows = {fault.name: fault for fault in FAULTS}, {}
    for line in text.splitlines():
        cells = re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        fault = known.get(cells[0]) if line.startswith("| ") and len(cells) == 7 else None
        if fault is None or cells[1:3] != [fault.base, f"{fault.level}: {fault.check}"]:
            continue
        if not (asking and _NOT_ASKED in cells):
            says = {peer: cell for peer, cell in zip(_PEERS, cells[5:], strict=True) if cell != _NOT_ASKED}
            rows[fault.name] = Row(fault, cells[3], True, cells[4].split(", "), says)
    found = re.search(r"^(vllm .*?)\. Plain vLLM:", text, re.M)
    return rows, found[1] if found else ""


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/faults"))
    parser.add_argument("--output", type=Path, default=Path("docs/faults.md"))
    parser.add_argument("--no-peers", action="store_true", help="leave plain vLLM and plain transformers out")
    parser.add_argument("--resume", action="store_true", help="keep what peers answered in an earlier run in DIR")
    parser.add_argument("--new", action="store_true", help="keep the rows that the table has of unchanged faults")
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    options = parser.parse_args()
    work = options.directory.resolve()
    for old in work.glob("*") if options.resume else [work]:
        if old.suffix != ".json":
            shutil.rmtree(old, ignore_errors=True)
    goods = {base: make(base, work / base) for base in BASES}
    kept, versions = earlier(options.output, not options.no_peers) if options.new else ({}, "")
    rows, directories = list(kept.values()), {}
    for number, fault in enumerate(f for f in FAULTS if options.only in f.name and f.name not in kept):
        directory = work / f"{number:03d}" / "output"
        shutil.copytree(goods[fault.base].directory, directory)
        fault.spoil(directory)
        row = Row(fault)
        row.level, row.checks = lowest(fault, goods[fault.base], directory)
        promised = row.checks if row.level == "serving" else failing(judged(fault, goods[fault.base], directory))
        row.kept = fault.check in promised
        rows.append(row)
        directories[fault.name] = directory
        print(f"{fault.name}: {row.level} {', '.join(row.checks)}{'' if row.kept else ' MISSED'}", flush=True)
    asked = {base: goods[base].directory for base in BASES} | directories
    with ThreadPoolExecutor() as pool:
        answers = {} if options.no_peers else {peer: pool.submit(ask, peer, asked, work) for peer in _PEERS}
    versions = versions if options.no_peers else ""
    for peer, answer in answers.items():
        found = answer.result()
        versions += f"{', ' if versions else ''}{peer} {found.pop('version')['text']}"
        for base in BASES:
            assert base in NOT_RUN or found[base]["outcome"] == "runs", (peer, base, found[base])
        for row in (row for row in rows if row.fault.name in directories):
            row.says[peer] = opinion(found[row.fault.name], found[row.fault.base])
    order = {fault.name: number for number, fault in enumerate(FAULTS)}
    rows.sort(key=lambda row: order[row.fault.name])
    options.output.write_text(table(rows, versions, bool(versions)))


if __name__ == "__main__":
    main()
