"""The benchmarks run: nobody sees them break until a figure is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoint import native
from tests.benchmarks import accuracy, convert_once, convert_stages, fp8_source
from tests.benchmarks.convert_benchmark import check_bytes, digest


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("benchmarks")
    return fp8_source.write(directory / "source", blocks=1, experts=6, hidden=256, intermediate=128)


def test_conversions_take_the_source_of_the_benchmarks(source: Path, tmp_path: Path) -> None:
    convert_once.pipeline(source, tmp_path / "output")
    check_bytes(source, tmp_path / "output")
    convert_once.original(source, tmp_path / "original")


def test_stages_are_those_of_the_whole_conversion(source: Path, tmp_path: Path) -> None:
    """Under every variant of the kernels the same bytes, and no stage that the table does not know how to place."""
    digests, results = set(), {}
    for level in native.levels():
        results[level] = [convert_stages.once(level, source, tmp_path / level)]
        digests.add(digest(tmp_path / level))
    assert len(digests) == 1
    for (once,) in results.values():
        called = {name for name in once["stages"] if not name.startswith("C: ")}
        assert called <= {*convert_stages.STAGES, convert_stages.REST}
        assert {"read (preadv, past the page cache)", "CRC-32 (zlib)", "write (pwrite, past the page cache)"} <= called
    if "avx2" in results:
        assert {"C: fp8_maxima", "C: fp8_amax", "C: fp8_quantize"} <= results["avx2"][0]["stages"].keys()
    lines = convert_stages.table(results, 0.001)
    assert lines[0].count("|") == len(results) + 2 and any(line.startswith("| **all**") for line in lines)


def test_the_table_of_methods_pairs_windows_and_says_how_much_of_the_loss_is_closed() -> None:
    """Of a method that was measured on fewer windows, by these."""

    def result(shift: float, windows: int, **more: Any) -> accuracy.Result:
        losses = [1.0, 3.0, 2.0][:windows]
        values, top1 = dict.fromkeys(accuracy.TEXTS, shift), dict.fromkeys(accuracy.TEXTS, 1 - shift)
        return accuracy.Result(
            {text: [loss + shift for loss in losses] for text in accuracy.TEXTS}, values, top1, **more
        )

    rows = accuracy.table(
        {
            "BF16": result(0, 3),
            accuracy.RTN: result(0.4, 3, cpu_seconds=40.0, peak=2**30),
            "other": result(0.1, 2, cpu_seconds=60.0),
        }
    ).splitlines()
    assert rows[3].startswith(f"| {accuracy.RTN} | +0.400 +- 0.000 | +0.400 +- 0.000 | 0% / 0% |")
    assert rows[3].endswith("| 40 | 1.00 | 1024 MiB |")
    assert rows[4].startswith(
        "| other | +0.100 +- 0.000 | +0.100 +- 0.000 | 75% / 75% | 0.100 / 0.100 | 90.0% / 90.0% |"
    )
    assert rows[4].endswith("| 60 | 1.50 |  |")
    assert rows[-1].endswith("reference: 7.39 / 7.39")


def test_the_table_pairs_methods_with_one_of_them_too() -> None:
    def result(*losses: float) -> accuracy.Result:
        values = dict.fromkeys(accuracy.TEXTS, 0.0)
        return accuracy.Result({text: list(losses) for text in accuracy.TEXTS}, values, values)

    found = {"BF16": result(1, 3, 2), "all": result(1.5, 3.5), "routed": result(1.6, 3.8, 9.0)}
    title, _, base, every, routed, *_ = accuracy.table(found, "all").splitlines()
    assert title.endswith("| against all, prose / reference |")
    assert base.endswith("|  |") and every.endswith("|  |")
    assert routed.endswith("| +0.200 +- 0.100 / +0.200 +- 0.100 |")
