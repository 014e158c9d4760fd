"""What a night does to a batch, made real: a disk that is full, an engine that is killed while it serves.

Slow: minutes. The disks are small tmpfs: mounting them needs root, and without it the tests fail.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoint.files import read_json_or_none
from tests.integration.batch_runs import (
    QWEN,
    V4,
    converted,
    facts,
    files,
    finish_batch,
    journal,
    single_run,
    start_batch,
    summary,
    wait_for,
    write_recipe,
    write_sources,
)
from tests.integration.held_runs import Hold
from tests.reference.engine import VLLM_PYTHON
from workflows.batch.state import BatchDirectory
from workflows.batch.summary import summarize

pytestmark = pytest.mark.slow
FAILED = 6
DATA = {"dataset": "bundled", "num_samples": 24, "max_seq_length": 256, "batch_size": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves nothing free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)
    return ballast


def test_a_disk_fills_in_the_middle_and_space_comes_back(sources: dict[str, Path], tmp_path: Path, disk: Path) -> None:
    """The batch's directory and the run's log lie on the same disk."""
    recipe = write_recipe(disk, "qwen", sources["qwen"], QWEN, calibration=DATA)
    batch, log = disk / "b.run", tmp_path / "log"
    hold = Hold(tmp_path, 1)
    process = start_batch([str(recipe), "--directory", str(batch), "--backoff", "0.1"], log, hold.launcher)
    wait_for(hold.reached, "a block")
    with (batch / "runs/qwen/log.txt").open("ab") as told:  # the next line needs a page of its own
        told.write(b"\n" * (-told.tell() % 4096))
    ballast = fill(disk)
    shards = {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (disk / "qwen/output").glob("*.safetensors")
    }
    hold.let_go()
    wait_for(lambda: "next attempt in" in log.read_text(), "the end of the first attempt")
    assert "No space left" in log.read_text() or "the disk is full" in log.read_text()
    time.sleep(3)
    assert process.is_alive() and len(facts(batch, "qwen", "begun")) == 1
    assert [row["state"] for row in summarize(BatchDirectory(batch))["runs"]] == ["retrying"]
    ballast.unlink()
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    # Found to be full once, and waited for: no attempt was spent on a disk that still was.
    assert len(facts(batch, "qwen", "begun")) == 2
    assert [line["block"] for line in journal(disk, "qwen")] == [0, 1, 2]
    assert shards and {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards} == shards
    assert "resuming with block" in (batch / "runs/qwen/log.txt").read_text()
    assert files(disk, "qwen") == single_run(recipe, tmp_path / "alone")


def test_a_disk_that_stays_full_costs_its_own_run_alone(sources: dict[str, Path], tmp_path: Path, disk: Path) -> None:
    starved = write_recipe(disk, "starved", sources["qwen"], QWEN, calibration=DATA)
    other = write_recipe(tmp_path, "other", sources["qwen"], QWEN, **converted())
    batch, log = tmp_path / "b.run", tmp_path / "log"
    arguments = [str(starved), str(other), "--directory", str(batch), "--backoff", "0.1", "--space-patience", "0.05"]
    hold = Hold(tmp_path, 1)
    process = start_batch(arguments, log, hold.launcher)
    wait_for(hold.reached, "a block")
    ballast = fill(disk)
    hold.let_go()
    process.join(300)
    assert process.exitcode == FAILED, log.read_text()
    rows = summary(batch)
    assert rows["other"]["state"] == "done" and rows["starved"]["state"] == "failed"
    reason = rows["starved"]["reason"]
    assert re.fullmatch(r"no space came back in 0.05 min: .*: [\d,]+ bytes free, the run needs [\d,]+ .*", reason), (
        reason
    )
    assert 1 <= len(facts(batch, "starved", "begun")) <= 3
    assert "no space came back" in (batch / "summary.html").read_text()
    # Later there is room, and the same command goes on where the disk stopped it.
    ballast.unlink()
    code, text = finish_batch(arguments, log)
    assert code == 0 and "other: done and verified before" in text, text
    assert [line["block"] for line in journal(disk, "starved")] == [0, 1, 2]
    assert files(disk, "starved") == single_run(starved, tmp_path / "alone")


def kill_engine(output: Path) -> None:
    """SIGKILL to the vLLM process that serves `output`, once it has loaded the model."""
    logs = Path(f"{output}.run") / "logs"
    request = str((logs / "serving-request.json").resolve()).encode()

    def engine() -> int:
        if (read_json_or_none(logs / "serving-result.json") or {}).get("stage") not in ("forward", "generate"):
            return 0
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdecimal() and request in (process / "cmdline").read_bytes().split(b"\0"):
                    return int(process.name)
            except OSError:
                continue
        return 0

    os.kill(wait_for(engine, "vLLM", 300), signal.SIGKILL)


def test_vllm_is_killed_while_it_serves(sources: dict[str, Path], tmp_path: Path) -> None:
    serving: dict[str, Any] = {
        "python": VLLM_PYTHON, "max_tokens": 8, "prompts": ["Once upon a time"], "text": "bundled", "windows": 2,
        "compare": "auto",
    }  # fmt: skip
    recipe = write_recipe(tmp_path, "v4", sources["v4"], V4, verify={"serving": serving})
    batch, log, output = tmp_path / "b.run", tmp_path / "log", tmp_path / "v4" / "output"
    arguments = [str(recipe), "--directory", str(batch), "--backoff", "0.1", "--tries", "2"]
    # An engine that dies each time: two attempts, no more.
    process = start_batch(arguments, log)
    kill_engine(output)
    wait_for(lambda: len(facts(batch, "v4", "begun")) == 2, "the second attempt")
    shards = {path: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    (Path(f"{output}.run") / "logs" / "serving-result.json").unlink(missing_ok=True)
    kill_engine(output)
    process.join(300)
    assert process.exitcode == FAILED, log.read_text()
    assert summary(batch)["v4"]["reason"] == (
        "vLLM killed by SIGKILL (out of memory?) (2 attempts in a row finished nothing)"
    )
    # The next call: killed once, then left alone.
    (Path(f"{output}.run") / "logs" / "serving-result.json").unlink()
    process = start_batch(arguments, log)
    kill_engine(output)
    process.join(600)
    assert process.exitcode == 0, log.read_text()
    assert [fact["options"] for fact in facts(batch, "v4", "begun")] == [[], *[["--from", "verify"]] * 3]
    assert [line["block"] for line in journal(tmp_path, "v4")] == list(range(len(journal(tmp_path, "v4"))))
    assert shards == {path: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    assert (batch / "runs/v4/log.txt").read_text().count("[calibrate] done") == 1

    # The morning's summary has what the engine measured.
    row, served = summary(batch)["v4"], json.loads((Path(f"{output}.run") / "serving.json").read_text())
    assert row["state"] == "done" and row["verdict"] == "PASS" and row["verdicts"]["serving"] == "PASS"
    assert row["perplexity"] == served["perplexity"] > 1 and row["kl"] == served["source"]["agreement"]["kl"] > 0
    assert (batch / row["report"]).resolve() == (Path(f"{output}.run") / "report.html").resolve()
    page, table = (batch / "summary.html").read_text(), log.read_text().split("1 done;")[0].splitlines()[-5:]
    for shown in (f"{row['perplexity']:.4g}", f"{row['kl']:.2e}", "PASS"):
        assert shown in page and any(shown in line for line in table), (shown, table)
    assert f'href="{row["report"]}"' in page
