"""Batches in real processes: workers and the batch itself are killed at random, and nothing is lost."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

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
from workflows.batch.attempt import Slot
from workflows.batch.preflight import preflight, wanted_runs
from workflows.batch.queue import Queue, Rules
from workflows.batch.state import BatchDirectory, alive
from workflows.interrupts import NOTICE

FAILED, INTERRUPTED = 6, 130


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("sources"))


def under_way(batch: Path, names: list[str]) -> list[dict[str, Any]]:
    """The attempts whose processes live now."""
    found = []
    for name in names:
        path = batch / "runs" / name / "attempts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        last = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {}
        if alive(last):
            found.append(last | {"name": name})
    return found


def soak(folder: Path, recipes: list[Path], kills: int, seed: int, *options: str) -> dict[str, int]:
    """Runs the batch to its end through `kills` random kills, every third of the batch itself; how many hit what."""
    batch, log, moments = folder / "b.run", folder / "log", random.Random(seed)
    names = [recipe.stem for recipe in recipes]
    arguments = [
        *map(str, recipes),
        "--directory",
        str(batch),
        "--keep-going",
        "--backoff",
        "0.01",
        "--tries",
        "1000",
        *options,
    ]
    hit = {"worker": 0, "batch": 0}
    process = start_batch(arguments, log)
    for number in range(kills):
        wait_for(lambda now=process: under_way(batch, names) or not now.is_alive(), "a run under way")
        victim = moments.choice(under_way(batch, names) or [{}])
        if not victim:
            break
        if number % 2:  # every second one is killed behind a fact of its journal, however slow the machine is
            known = len(journal(folder, victim["name"]))
            while alive(victim) and len(journal(folder, victim["name"])) == known:
                time.sleep(0.002)
        time.sleep(moments.random() * (0.02 if number % 2 else 2.0))
        if number % 3 == 2:
            process.kill()
            process.join()
            hit["batch"] += 1
            process = start_batch(arguments, log)
        elif alive(victim):
            os.kill(victim["pid"], signal.SIGKILL)
            hit["worker"] += 1
    process.join(2400)
    assert process.exitcode == FAILED, log.read_text()
    assert "Traceback" not in log.read_text()
    return hit


def overlapping(batch: Path, names: list[str]) -> list[str]:
    """Runs that were in a slot while another one was: from each start to the next line that the batch wrote of the run."""
    spans = []
    for name in names:
        lines = [json.loads(line) for line in (batch / "runs" / name / "attempts.jsonl").read_text().splitlines()]
        ends = [line["time"] for line in lines[1:]] + [lines[-1]["time"]]
        spans += [
            (line["slot"], line["time"], end, name)
            for line, end in zip(lines, ends, strict=True)
            if line["fact"] == "begun"
        ]
    spans.sort()
    return [f"{a} {b}" for a, b in pairwise(spans) if a[0] == b[0] and b[1] < a[2]]


def all_as_alone(folder: Path, recipes: list[Path], bad: dict[str, str]) -> None:
    rows = summary(folder / "b.run")
    for recipe in recipes:
        row = rows[recipe.stem]
        if recipe.stem in bad:
            assert row["state"] == "failed" and re.search(bad[recipe.stem], row["reason"]), row
            continue
        assert row["state"] == "done" and row["verdicts"]["structure"] == "PASS", row
        mine, alone = files(folder, recipe.stem), single_run(recipe, folder / "alone")
        assert mine.keys() == alone.keys()
        assert [name for name in alone if mine[name] != alone[name]] == []
    assert not under_way(folder / "b.run", [recipe.stem for recipe in recipes])


def test_kills_of_workers_and_of_the_batch_lose_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    recipes = [
        write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, **converted()),
        write_recipe(tmp_path, "no_match", sources["qwen"], ["re:^nothing$"], **converted()),
        write_recipe(tmp_path, "v4", sources["v4"], V4, **converted()),
        write_recipe(tmp_path, "no_data", sources["qwen"], QWEN, calibration={"dataset": str(tmp_path / "none.txt")}),
    ]
    hit = soak(tmp_path, recipes, 4, 3, "--gpus", "0,1")
    assert hit["worker"] + hit["batch"] >= 2, hit
    all_as_alone(tmp_path, recipes, {"no_match": "matches no module", "no_data": "none.txt"})
    batch = tmp_path / "b.run"
    slots = {fact["slot"] for name in ("qwen", "v4", "no_data") for fact in facts(batch, name, "begun")}
    assert slots == {"GPU 0", "GPU 1"}
    assert overlapping(batch, ["qwen", "v4", "no_data"]) == []
    # A recipe's own fault is not tried again by one call of the batch.
    faults = [fact for fact in facts(batch, "no_data", "ended") if fact["outcome"] == "failed"]
    assert 1 <= len(faults) <= 1 + hit["batch"]
    # The same command skips what is done, and says again what is not.
    begun = len(facts(batch, "qwen", "begun"))
    code, text = finish_batch([*map(str, recipes[:1]), "--directory", str(batch)], tmp_path / "log")
    assert code == 0 and "qwen: done and verified before" in text
    assert len(facts(batch, "qwen", "begun")) == begun


@pytest.mark.slow
def test_soak_of_twelve_recipes(sources: dict[str, Path], tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # a hang here is found by the joins; it may take longer than other tests
    recipes = []
    few = {"dataset": "bundled", "num_samples": 3, "max_seq_length": 64}
    for kind, targets in (("qwen", QWEN), ("v4", V4)):
        gptq = [{"GPTQModifier": {"targets": targets, "scheme": "NVFP4"}}]
        for name, sections in {
            "rtn": {},
            "a16": converted(),
            "gptq": {"modifiers": gptq},
            "few": {"calibration": few},
            "plain": {"method": "plain", "modifiers": [], "calibration": None},
        }.items():
            recipes.append(write_recipe(tmp_path, f"{kind}_{name}", sources[kind], targets, **sections))
    recipes.insert(3, write_recipe(tmp_path, "no_match", sources["v4"], ["re:^nothing$"], **converted()))
    recipes.insert(
        7, write_recipe(tmp_path, "no_data", sources["qwen"], QWEN, calibration={"dataset": str(tmp_path / "none.txt")})
    )
    assert len(recipes) == 12
    hit = soak(tmp_path, recipes, 30, 11)
    assert hit["worker"] >= 10 and hit["batch"] >= 5, hit
    all_as_alone(tmp_path, recipes, {"no_match": "matches no module", "no_data": "none.txt"})


def test_ctrl_c_finishes_the_block_and_twice_stops_at_once(sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "qwen", sources["qwen"], QWEN)
    later = write_recipe(tmp_path, "later", sources["qwen"], QWEN, **converted())
    batch, log = tmp_path / "b.run", tmp_path / "log"
    told = batch / "runs/qwen/log.txt"
    arguments = [str(recipe), str(later), "--directory", str(batch)]
    for signals, under_way, finished in ((1, 1, 2), (2, 2, 2)):
        hold = Hold(tmp_path / str(signals), under_way)
        process = start_batch(arguments, log, hold.launcher)
        wait_for(hold.reached, f"block {under_way}")
        for number in range(signals):
            notices = told.read_bytes().count(NOTICE)
            os.kill(process.pid or 0, signal.SIGINT)
            if number == 0:  # the run itself must have the first one before it gets the second
                wait_for(lambda n=notices: told.read_bytes().count(NOTICE) > n, "the notice", 60)
        if signals == 1:
            hold.let_go()
        process.join(120)
        assert process.exitcode == INTERRUPTED, log.read_text()
        assert [line["block"] for line in journal(tmp_path, "qwen")] == list(range(finished)), log.read_text()
        assert summary(batch)["qwen"]["state"] == "stopped" and summary(batch)["later"]["state"] == "waiting"
    assert facts(batch, "later", "begun") == []
    code, text = finish_batch(arguments, log)
    assert code == 0, text
    assert files(tmp_path, "qwen") == single_run(recipe, tmp_path / "alone")


def test_the_hour_of_until_finishes_the_block(sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "qwen", sources["qwen"], QWEN)
    later = write_recipe(tmp_path, "later", sources["qwen"], QWEN, **converted())
    batch, hold = BatchDirectory(tmp_path / "b.run"), Hold(tmp_path, 1)
    batch.open()
    entries = preflight(wanted_runs([recipe, later], [], []), batch, 1, False, lambda text: None).entries
    queue = Queue(
        batch, entries, [Slot((5, 6))], Rules(), lambda text, level: None, launcher=lambda slot: hold.launcher
    )
    told = batch.path / "runs/qwen/log.txt"
    environments: list[bytes] = []

    def strike() -> None:  # whatever the clock says, the hour comes with the second block
        wait_for(hold.reached, "block 1")
        environments.append(Path(f"/proc/{queue.running[0].pid}/environ").read_bytes())
        queue.rules = replace(queue.rules, until=time.time())
        wait_for(lambda: NOTICE in told.read_bytes(), "the notice", 60)
        hold.let_go()

    clock = threading.Thread(target=strike)
    clock.start()
    queue.work()
    clock.join()
    batch.close()
    assert {name: outcome.kind for name, outcome in queue.outcomes.items()} == {"qwen": "stopped", "later": "stopped"}
    assert b"CUDA_VISIBLE_DEVICES=5,6" in environments[0].split(b"\0")
    (ended,) = facts(batch.path, "qwen", "ended")
    assert ended["code"] == INTERRUPTED and not facts(batch.path, "later", "begun")
    # The one under way, and no further one.
    assert [line["block"] for line in journal(tmp_path, "qwen")] == [0, 1]


@pytest.mark.parametrize("executor", [pytest.param((), marks=pytest.mark.slow), ("--executor", "local")])
def test_the_user_is_told_of_every_failure_and_of_the_end(
    sources: dict[str, Path], tmp_path: Path, executor: tuple[str, ...]
) -> None:
    """The same events from one machine and from a cluster's jobs: one failure each, before or in a job, and one end."""
    recipes = [
        write_recipe(tmp_path, "good", sources["qwen"], QWEN, **converted()),
        write_recipe(tmp_path, "no_match", sources["qwen"], ["re:^nothing$"], **converted()),
        write_recipe(tmp_path, "no_data", sources["qwen"], QWEN, calibration={"dataset": str(tmp_path / "none.txt")}),
    ]
    hook, told, batch, log = tmp_path / "hook.py", tmp_path / "told", tmp_path / "b.run", tmp_path / "log"
    hook.write_text(
        "import json, os, sys\n"
        "states = [run['state'] for run in json.load(open(os.environ['BATCH_SUMMARY']))['runs']]\n"
        "line = [os.environ['BATCH_EVENT'], os.environ['BATCH_RUN'], os.environ['BATCH_REASON'], states]\n"
        f"open({str(told)!r}, 'a').write(json.dumps(line) + '\\n')\n"
    )
    arguments = [*map(str, recipes), "--directory", str(batch), "--keep-going", "--gpus", "0,1", *executor]
    arguments += ["--notify", f"{sys.executable} {hook}"]
    code, text = finish_batch(arguments, log)
    assert code == FAILED, text
    events = [json.loads(line) for line in told.read_text().splitlines()]
    assert sorted(event[:2] for event in events) == [["end", ""], ["failure", "no_data"], ["failure", "no_match"]]
    reasons = {run: reason for _, run, reason, _ in events}
    assert "matches no module" in reasons["no_match"] and "none.txt" in reasons["no_data"]
    assert events[-1][0] == "end" and events[-1][3] == ["done", "failed", "failed"], events
    # Also where there is nothing left to do.
    code, text = finish_batch([str(recipes[0]), *arguments[3:]], log)
    assert code == 0, text
    assert json.loads(told.read_text().splitlines()[-1])[:2] == ["end", ""]
    assert len(told.read_text().splitlines()) == len(events) + 1


@pytest.mark.slow
def test_a_run_that_gets_no_memory_is_tried_again(sources: dict[str, Path], tmp_path: Path) -> None:
    """The kernel refuses: the run's address space is limited to what it has in the middle of its calibration."""
    data = {"dataset": "bundled", "num_samples": 24, "max_seq_length": 256, "batch_size": 1}
    recipe = write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=data)
    batch, log = tmp_path / "b.run", tmp_path / "log"
    hold = Hold(tmp_path, 1)
    process = start_batch([str(recipe), "--directory", str(batch), "--backoff", "0.1"], log, hold.launcher)
    wait_for(hold.reached, "a block")
    pid = facts(batch, "qwen", "begun")[0]["pid"]
    there = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (there, there))
    hold.let_go()
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    first, second = facts(batch, "qwen", "ended")
    assert first["outcome"] == "transient" and re.search("emory|map segment|new thread|killed by", first["reason"]), (
        first
    )
    assert second["outcome"] == "done"
    assert [line["block"] for line in journal(tmp_path, "qwen")] == [0, 1, 2]
    assert files(tmp_path, "qwen") == single_run(recipe, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("executor", [(), ("--executor", "local")])
def test_several_gpus_of_a_slot_share_a_run(
    sources: dict[str, Path], tmp_path: Path, executor: tuple[str, ...]
) -> None:
    """torchrun inside, here two processes on the CPU; a rank is killed on the way."""
    data = {"dataset": "bundled", "num_samples": 24, "max_seq_length": 256, "batch_size": 1}
    recipe = write_recipe(tmp_path, "qwen", sources["qwen"], QWEN, calibration=data)
    batch, log = tmp_path / "b.run", tmp_path / "log"
    process = start_batch([str(recipe), "--directory", str(batch), "--gpus", "0-1", "--backoff", "0.1", *executor], log)
    wait_for(lambda: journal(tmp_path, "qwen"), "a block", 300)
    agent = facts(batch, "qwen", "begun")[0]["pid"]
    ranks = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    assert len(facts(batch, "qwen", "begun")) == 2
    assert files(tmp_path, "qwen") == single_run(recipe, tmp_path / "alone")
