"""The stages that wait for a GPU run on a CPU with small sizes, so that none is broken when a machine comes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import pack, stages
from tests.gpu.once import measured, overlap, seconds, union


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations that need no process of their own here: the imports would be most of the time."""
    torch.set_num_threads(1)
    monkeypatch.setattr(
        stages, "once", lambda method, recipe, one_by_one=False, hide=False: measured(method, recipe, one_by_one)
    )


@pytest.mark.parametrize("name", [name for name in stages.STAGES if name != "tests"])  # CI collects those itself
def test_every_stage_runs_on_the_cpu(name: str, tmp_path: Path, in_this_process: None) -> None:
    file = tmp_path / "out.json"
    stages.run_here(name, stages.Context("cpu", "tiny", tmp_path / "work", file))
    said = json.loads(file.read_text())
    assert said["ok"] and said["facts"] and "error" not in said
    if name == "convert":
        assert said["facts"]["same_bytes"]
    if name in ("v4", "qwen3_moe"):
        assert set(stages.RUNS) == set(said["facts"]["times_faster"]) and said["facts"]["rounded"] == 0
        assert said["facts"]["all"]["reading_seconds"] > 0 and said["facts"]["all"]["computing_seconds"] > 0
    if name == "products":
        assert said["facts"]["largest_relative_difference"] < 2**-7
    assert not (tmp_path / "work").exists()


def test_a_stage_that_fails_keeps_its_figures_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(context: stages.Context) -> None:
        context.add(figure=1)
        assert json.loads(context.file.read_text())["facts"] == {"figure": 1}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(stages.STAGES, "card", breaks)
    file = tmp_path / "card.json"
    with pytest.raises(SystemExit, match="no such kernel"):
        stages.run_here("card", stages.Context("cpu", "tiny", tmp_path / "work", file))
    said = json.loads(file.read_text())
    assert not said["ok"] and said["facts"] == {"figure": 1} and said["error"] == "RuntimeError: no such kernel"


def test_a_stage_beyond_its_limit_is_ended_and_what_has_no_time_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, popen = list[str](), subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(command[command.index("--here") + 1])
        stages.write(tmp_path / f"{started[-1]}.json", {"ok": False, "facts": {"figure": 1}})
        return popen(["sleep", "60"], **options)

    monkeypatch.setattr(stages, "LEAST", 0.1)
    monkeypatch.setattr(stages.subprocess, "Popen", start)
    given = Namespace(out=tmp_path, work=tmp_path, device="cpu", size="tiny", budget=0.5, patience=1 / 200)
    assert stages.run_all(["card", "tests"], given) == 2
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["facts"] == {"figure": 1} and card["error"].startswith("ended at its limit")
    given.budget = 0.0
    assert stages.run_all(["v4"], given) == 1 and started == ["card", "tests"]
    assert json.loads((tmp_path / "v4.json").read_text()) == {"ok": False, "left out": "no time"}


def test_spans_that_overlap_count_once() -> None:
    left, right = [(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)], [(2.5, 5.5)]
    assert union(left) == [(0.0, 3.0), (5.0, 6.0)] and seconds(left) == 4.0
    assert overlap(left, right) == 1.0 == overlap(right, left) and overlap([], right) == 0.0


def test_what_is_packed_is_what_the_other_machine_lacks() -> None:
    lacking = pack.lacking(pack.THERE)
    assert {
        "llmcompressor",
        "compressed-tensors",
        "pydantic",
        "pydantic-core",
        "datasets",
        "setuptools",
    } <= lacking.keys()
    assert not lacking.keys() & {"torch", "transformers", "triton", "numpy"}
    assert "torch" in pack.lacking([name for name in pack.THERE if name != "torch"])


def wheel(directory: Path, name: str, tag: str) -> None:
    """Writes a wheel of `name` 1.0 that holds nothing but what pip reads."""
    with zipfile.ZipFile(directory / f"{name}-1.0-{tag}.whl", "w") as file:
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{name}-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.mark.parametrize(("options", "machine"), [([], "x86_64"), (["--machine", "aarch64"], "aarch64")])
def test_the_pack_has_the_wheels_of_the_named_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], machine: str
) -> None:
    """By pip itself, out of a folder that stands for the index."""
    index = tmp_path / "index"
    index.mkdir()
    for built, release in (("compiled", "2_28"), ("older", "2_17")):
        for other in ("x86_64", "aarch64"):
            wheel(index, built, f"cp312-cp312-manylinux_{release}_{other}")
    wheel(index, "pure", "py3-none-any")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(pack, "lacking", lambda there: dict.fromkeys(("compiled", "older", "pure"), "1.0"))
    monkeypatch.setattr(sys, "argv", ["pack", str(tmp_path / "pack"), *options])
    pack.main()
    assert {path.name for path in (tmp_path / "pack" / "wheels").iterdir()} == {
        f"compiled-1.0-cp312-cp312-manylinux_2_28_{machine}.whl",
        f"older-1.0-cp312-cp312-manylinux_2_17_{machine}.whl",
        "pure-1.0-py3-none-any.whl",
    }
