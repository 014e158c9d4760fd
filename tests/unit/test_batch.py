"""What a batch decides from what it reads: runs of a matrix, preflight, what is done, why an attempt ended, the summary."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from calibration.forecast.cost import boundary_bytes, scratch_bytes
from calibration.runs import disk
from recipes.errors import EnvironmentProblem, RecipeError, SourceError
from recipes.loader import parse_value
from recipes.matrix import Matrix, Resources, load_matrix, parse_resources, variants
from tests.models import standard
from workflows.batch import preflight as batch_plan
from workflows.batch.__main__ import _until, main
from workflows.batch.attempt import Slot
from workflows.batch.hooks import Hooks
from workflows.batch.outcome import Outcome, judge
from workflows.batch.preflight import Wanted, ends, preflight, wanted_runs
from workflows.batch.queue import Queue, Rules, Waiting, parse_slots
from workflows.batch.state import BatchDirectory, Entry, standing
from workflows.batch.submission import remove_outstanding, set_outstanding
from workflows.batch.summary import summarize, write_summary
from workflows.progress import Reporter

BODY: dict[str, Any] = {
    "method": "convert",
    "modifiers": [{"QuantizationModifier": {"targets": [r"re:^model\.layers\..*proj$"], "scheme": "NVFP4A16"}}],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standard.write(tmp_path_factory.mktemp("source") / "model", "qwen3")


@pytest.fixture
def batch(tmp_path: Path) -> BatchDirectory:
    return BatchDirectory(tmp_path / "b.run")


def recipe(folder: Path, name: str, source: Path, **sections: Any) -> Path:
    path = folder / f"{name}.yaml"
    body = BODY | {"source": {"checkpoint": str(source)}, "output": str(folder / "out" / name)} | sections
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def looked_at(batch: BatchDirectory, *paths: Path, overwrite: bool = False) -> batch_plan.Preflight:
    batch.open()
    try:
        return preflight(wanted_runs(paths, [], []), batch, 1, overwrite, lambda text: None)
    finally:
        batch.close()


def test_a_matrix_is_the_product_of_its_axes_with_readable_names(tmp_path: Path, source: Path) -> None:
    base = recipe(tmp_path, "base", source)
    body = {
        "base": str(base),
        "vary": {
            "convert.input_amax": [100.0, 200.0],
            "scheme": {"w4a4": {"modifiers.0.QuantizationModifier.scheme": "NVFP4"}, "w4a16": {}},
        },
        "set": {"export.max_shard_size": "1MB"},
    }
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    matrix = load_matrix(tmp_path / "m.yaml")
    runs = wanted_runs([base], [(tmp_path / "m.yaml", matrix)], [])
    assert [run.name for run in runs] == [
        "base", "base-input_amax_100.0-w4a4", "base-input_amax_100.0-w4a16", "base-input_amax_200.0-w4a4",
        "base-input_amax_200.0-w4a16",
    ]  # fmt: skip
    assert runs[1].output == str(tmp_path / "out" / "base-input_amax_100.0-w4a4")
    assert 'export.max_shard_size="1MB"' in runs[1].overrides
    batch = BatchDirectory(tmp_path / "b.run")
    found = preflight(runs, batch, 1, False, lambda text: None)
    batch.close()
    assert not found.problems
    assert len({entry.recipe_digest for entry in found.entries}) == 5
    named = matrix.model_copy(update={"output": str(tmp_path / "models/{name}")})
    assert wanted_runs([], [(base, named)], [])[0].output == str(tmp_path / "models/base-input_amax_100.0-w4a4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vary": {"a": []}}, "vary: a: must be a list of values"),
        ({"vary": {"a": {"small": 3}}}, "vary: a: must be a list of values"),
        ({"varry": {}}, "varry: unknown key; did you mean 'vary'?"),
        ({"output": "/models/all"}, 'output: "/models/all" must contain {name}'),
        ({"resources": {"hours": 0}}, "resources.hours: must be more than 0"),
    ],
)
def test_a_wrong_matrix_is_refused_with_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"base": "r.yaml", "vary": {"a.b": [1]}} | change))
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        load_matrix(path)
    assert re.match(re.escape(str(path)) + r":\d+: ", str(error.value))


def test_resources_of_the_command_line_go_over_those_of_the_file() -> None:
    assert parse_resources(["hours=2"], Resources(nodes=3)) == Resources(nodes=3, hours=2)
    with pytest.raises(RecipeError, match=r"grace_seconds: .*at most half of the time limit"):
        parse_resources(["hours=0.1"], Resources())
    with pytest.raises(RecipeError, match=r"--resource gpus: .*keys are nodes"):
        parse_resources(["gpus=2"], Resources())


def test_variants_name_lists_and_words() -> None:
    matrix = Matrix(base="r.yaml", vary={"a.ignore": [["lm_head", "re:^x/y$"], []]})
    assert [name for name, _ in variants(matrix)] == ["ignore_lm_head_re_x_y", "ignore_none"]


def test_values_of_a_matrix_arrive_as_they_are_written(tmp_path: Path) -> None:
    values = [
        1e30,
        1e-7,
        3,
        None,
        True,
        "1e3",
        "no",
        "a b: c",
        "\U0001f600",
        [1e30, "x"],
        {"b": [1.5e9, None], "a": "010"},
    ]
    matrix = Matrix(base="r.yaml", vary={"a.b": values})
    found = [overrides[0].partition("=")[2] for _, overrides in variants(matrix)]
    assert [parse_value(text) for text in found] == values


def test_a_matrix_of_long_values_has_short_names_and_one_of_millions_of_runs_is_refused() -> None:
    matrix = Matrix(base="r.yaml", vary={"a.b": ["x" * 300 + "1", "x" * 300 + "2"]})
    one, two = (name for name, _ in variants(matrix))
    assert one != two and len(one) < 120
    with pytest.raises(RecipeError, match=r"vary: makes 10,000,000,000 runs, at most 10,000 are taken"):
        variants(Matrix(base="r.yaml", vary={f"a.k{axis}": list(range(10)) for axis in range(10)}))


def test_recipes_with_one_file_name_are_told_apart_by_their_directory(tmp_path: Path) -> None:
    assert [run.name for run in wanted_runs([Path("a/r.yaml"), Path("b/r.yaml")], [], [])] == ["a-r", "b-r"]
    with pytest.raises(RecipeError, match="a-r: two runs have this name"):
        wanted_runs([Path("a/r.yaml"), Path("a/r.yaml")], [], [])


@pytest.mark.parametrize(
    ("text", "slots"),
    [("0-3,4-7", [(0, 1, 2, 3), (4, 5, 6, 7)]), ("0,2", [(0,), (2,)]), (None, [None])],
)
def test_slots(text: str | None, slots: list[Any]) -> None:
    assert parse_slots(text) == [Slot(gpus) for gpus in slots]


@pytest.mark.parametrize("text", ["0-3,3", "a", "3-1", "", "0-"])
def test_wrong_slots(text: str) -> None:
    with pytest.raises(RecipeError, match="--gpus"):
        parse_slots(text)


def test_until_is_the_next_time_the_clock_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)
    now = 1_800_000_000.0
    import datetime

    clock = datetime.datetime.fromtimestamp(now)
    later, earlier = clock + datetime.timedelta(minutes=5), clock - datetime.timedelta(minutes=5)
    assert 0 < (_until(later.strftime("%H:%M")) or 0) - now <= 300
    assert 86_000 < (_until(earlier.strftime("%H:%M")) or 0) - now < 86_400
    with pytest.raises(RecipeError, match="time of day"):
        _until("7am")


def test_preflight_tells_every_problem_at_once(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    good = recipe(tmp_path, "good", source)
    paths = [
        good,
        recipe(tmp_path, "same", source, output=str(tmp_path / "out" / "good")),
        recipe(tmp_path, "no_source", tmp_path / "nowhere"),
        recipe(
            tmp_path,
            "no_match",
            source,
            modifiers=[{"QuantizationModifier": {"targets": ["re:^x$"], "scheme": "NVFP4A16"}}],
        ),
        recipe(tmp_path, "unknown", source, mehtod="convert"),
    ]
    found = looked_at(batch, *paths)
    with pytest.raises(RecipeError) as error:
        found.require_sound()
    for part in (
        "same: output", "is also the output of good", f"{tmp_path / 'nowhere'}: no such directory",
        "no_match: ", "matches no module", "mehtod: unknown key; did you mean 'method'?",
    ):  # fmt: skip
        assert part in str(error.value), part
    assert {entry.name: bool(entry.problems) for entry in found.entries} == dict.fromkeys(
        ("good", "same", "no_source", "no_match", "unknown"), True
    )
    with pytest.raises(SourceError):
        looked_at(batch, paths[2]).require_sound()


def test_a_shared_source_is_opened_once(
    tmp_path: Path, source: Path, batch: BatchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = [], batch_plan.Checkpoint.open
    monkeypatch.setattr(batch_plan.Checkpoint, "open", lambda path: (opened.append(path), real(path))[1])
    found = looked_at(batch, *(recipe(tmp_path, name, source) for name in ("a", "b", "c")))
    assert not found.problems and opened == [source]
    assert all(entry.seconds is not None and entry.seconds > 0 for entry in found.entries)


def test_the_disk_is_compared_with_all_outputs_together(
    tmp_path: Path, source: Path, batch: BatchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [recipe(tmp_path, name, source) for name in ("a", "b", "c")]
    one = looked_at(batch, paths[0]).entries[0].output_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=2 * one))
    looked_at(batch, *paths[:2]).require_sound()
    with pytest.raises(EnvironmentProblem, match=f"needs {3 * one:,}"):
        looked_at(batch, *paths).require_sound()


def test_two_batches_cannot_share_an_output(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    path, other = recipe(tmp_path, "a", source), BatchDirectory(tmp_path / "other.run")
    batch.open()
    assert not preflight([Wanted("a", path)], batch, 1, False, lambda text: None).problems
    with pytest.raises(
        EnvironmentProblem, match=rf"belongs to the batch {re.escape(str(batch.path))}, pid {os.getpid()}"
    ):
        looked_at(other, path).require_sound()
    with pytest.raises(EnvironmentProblem, match="already at work"):
        BatchDirectory(batch.path).open()
    batch.close()
    looked_at(other, path).require_sound()


def entry_of(batch: BatchDirectory, path: Path) -> Entry:
    return looked_at(batch, path).entries[0]


def finish(entry: Entry, **verdicts: str) -> None:
    """Leaves what a finished run leaves: shards, index, events, journal."""
    output, run = Path(entry.output), entry.run
    output.mkdir(parents=True)
    for name in ("model-1.safetensors", "model.safetensors.index.json"):
        (output / name).write_text("x")
    run.event("plan", digest=entry.plan_digest, recipe=entry.recipe_digest)
    shutil.copy(entry.recipe, run.path / "recipe.yaml")
    run.record("shards", plan=entry.plan_digest, block=0, shards={"model-1.safetensors": "d"})
    run.record("exported", plan=entry.plan_digest)
    run.record("verified", **({"structure": "PASS", "fidelity": "PASS", "serving": "UNCHECKED"} | verdicts))


def test_what_an_output_holds_decides_what_is_done(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    path = recipe(tmp_path, "a", source)
    entry = entry_of(batch, path)
    assert standing(entry).kind == "open"
    finish(entry)
    assert standing(entry).kind == "done"
    # Other checks alone are asked for: nothing is computed again. Another recipe's checkpoint is not touched.
    recipe(tmp_path, "a", source, verify={"fidelity": False})
    assert standing(entry_of(batch, path)).kind == "verify"
    recipe(tmp_path, "a", source, export={"max_shard_size": "1MB"})
    assert "name another output, or pass --overwrite" in looked_at(batch, path).problems[0][1]
    assert not looked_at(batch, path, overwrite=True).problems
    recipe(tmp_path, "a", source)
    (Path(entry.output) / "model-1.safetensors").unlink()
    assert "has lost files" in standing(entry).why
    (Path(entry.output) / "model-1.safetensors").write_text("x")
    entry.run.record("verified", structure="FAIL")
    assert standing(entry).kind == "verify"


def test_a_checkpoint_that_no_run_made_is_not_touched(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    path = recipe(tmp_path, "a", source)
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "config.json").write_text("{}")
    assert "output is not empty" in looked_at(batch, path).problems[0][1]


@pytest.mark.parametrize(
    ("code", "problems", "log", "outcome", "reason"),
    [
        (-9, [], "", "transient", "killed by SIGKILL (out of memory?)"),
        (-11, [], "", "transient", "killed by SIGSEGV"),
        (1, [], "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", "transient", "CUDA out of memory"),
        (1, [], "Traceback\nImportError: /x.so: failed to map segment from shared object", "transient", "/x.so"),
        (1, [], "Traceback\nImportError: /x.so: failed to map segment from shared object: Operation not permitted", "failed",
         "/x.so"),
        (4, ["shard-1: cannot be written: [Errno 12] Cannot allocate memory"], "", "transient", "shard-1"),
        (1, [], "Traceback\nKeyError: 'x'", "failed", "KeyError: 'x'"),
        (1, [], "Signal 9 (SIGKILL) received by PID 77\nChildFailedError", "transient", "killed by SIGKILL"),
        (2, [], "error: r.yaml:1: x: unknown key", "failed", "r.yaml:1: x: unknown key"),
        (3, ["shard is gone", "more"], "", "failed", "shard is gone"),
        (1, ["shard is gone"], "ChildFailedError", "failed", "shard is gone"),
        (4, ["out/x: the disk is full: 5 bytes wanted; free some space"], "", "space", "the disk is full"),
        (4, [], "error: out.run: another process works on this output; wait", "transient", "another process"),
        (4, ["no vLLM"], "", "failed", "no vLLM"),
        (5, ["out: verification failed: 1 of 9", "serving.load: NaN"], "", "failed", "serving.load: NaN"),
        (130, ["stopped"], "", "transient", "from outside"),
        (None, [], "block 1/3", "transient", "no batch was watching"),
    ],
)  # fmt: skip
def test_why_an_attempt_ended(
    tmp_path: Path, code: int | None, problems: list[str], log: str, outcome: str, reason: str
) -> None:
    entry = Entry("a", "a.yaml", str(tmp_path / "a.yaml"), str(tmp_path / "out"))
    entry.run.path.mkdir()
    entry.run.event("error", exit_code=3, problems=["an error of an earlier attempt"])
    began = entry.run.events()[-1]["time"] + 0.001
    if problems:
        (entry.run.path / "events.jsonl").write_text(
            json.dumps({"time": began, "event": "error", "exit_code": 3 if code == 1 else code, "problems": problems})
        )
    (tmp_path / "log").write_text("error: an earlier attempt\n" + log)
    found = judge(entry, code, began, tmp_path / "log", len("error: an earlier attempt\n"), False)
    assert (found.kind, reason in found.reason) == (outcome, True), found


def test_a_killed_engine_says_nothing_about_the_checkpoint(tmp_path: Path) -> None:
    entry = Entry("a", "a.yaml", str(tmp_path / "a.yaml"), str(tmp_path / "out"))
    entry.run.path.mkdir()
    (entry.run.path / "serving.json").write_text(json.dumps({"exit_code": -signal.SIGKILL}))
    assert judge(entry, 5, 0.0, tmp_path / "log", 0, False).kind == "transient"
    (entry.run.path / "serving.json").write_text(json.dumps({"exit_code": 0}))
    assert judge(entry, 5, 0.0, tmp_path / "log", 0, False).kind == "failed"


def test_runs_end_in_the_order_that_the_slots_allow() -> None:
    entries = [Entry(name, "", "", "", seconds=seconds) for name, seconds in (("long", 9.0), ("b", 2.0), ("c", 3.0))]
    assert ends(entries, 2) == [("b", 2.0), ("c", 5.0), ("long", 9.0)]
    assert ends([*entries, Entry("d", "", "", "")], 1) == [("long", 9.0), ("b", 11.0), ("c", 14.0), ("d", None)]


def test_summary_of_every_state(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    names = ("finished", "gave_up", "broken", "retried", "later", "dead")
    paths = [recipe(tmp_path, name, source, **({"output": 3} if name == "broken" else {})) for name in names]
    found = looked_at(batch, *paths)
    batch.save(found.entries, slots=1)
    finish(found.entries[0])
    (found.entries[0].run.path / "serving.json").write_text(
        json.dumps({"perplexity": 12.5, "source": {"agreement": {"kl": 0.01}}})
    )
    (found.entries[0].run.path / "report.html").write_text("x")
    batch.record("gave_up", "gave_up", reason="<b>no</b> vLLM")
    batch.record(
        "retried", "ended", outcome="transient", reason="killed by SIGKILL", seconds=60.0, peak_rss=2_000_000_000
    )
    batch.record("dead", "begun", pid=1, began="0", host="elsewhere")
    write_summary(batch)
    told = json.loads((batch.path / "summary.json").read_text())
    rows = {row["name"]: row for row in told["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "finished": "done", "gave_up": "failed", "broken": "failed", "retried": "retrying", "later": "waiting",
        "dead": "stopped",
    }  # fmt: skip
    assert rows["finished"]["verdict"] == "UNCHECKED" and rows["finished"]["perplexity"] == 12.5
    assert rows["finished"]["report"] == "../out/finished.run/report.html"
    assert (batch.path / rows["finished"]["report"]).read_text() == "x"
    assert rows["retried"]["seconds"] is None and rows["retried"]["peak_memory"] == 2_000_000_000
    assert rows["finished"]["kl"] == 0.01 and rows["later"]["kl"] is None and rows["later"]["report"] is None
    page = (batch.path / "summary.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt; vLLM" in page and "<b>no</b>" not in page
    assert 'href="../out/finished.run/report.html"' in page and 'http-equiv="refresh"' in page
    assert not re.search(r"(src|href)=.https?:", page)
    # A bare reader sees the failed ones first.
    assert page.index("<b>gave_up</b></td>") < page.index("<b>finished</b></td>")
    assert summarize(batch)["counts"]["failed"] == 2


def test_hooks_get_the_summary_and_their_failure_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    script = tmp_path / "hook with space.sh"
    script.write_text(f'#!/bin/sh\necho "$BATCH_EVENT $BATCH_RUN $BATCH_REASON $BATCH_SUMMARY $1" >> {tmp_path}/told\n')
    script.chmod(0o755)
    Hooks(tmp_path, f"'{script}' '$(touch {tmp_path}/shell)'", None, lambda text, level: said.append(text)).notify(
        "failure", "a", "no disk"
    )
    told = (tmp_path / "told").read_text()
    assert told == f"failure a no disk {tmp_path / 'summary.json'} $(touch {tmp_path}/shell)\n"
    assert not (tmp_path / "shell").exists() and not said
    for command in ("/nowhere", "false"):
        Hooks(tmp_path, command, None, lambda text, level: said.append(text)).notify("end")
    assert len(said) == 2 and "ended with 1" in said[1]
    with pytest.raises(RecipeError, match="--notify"):
        Hooks(tmp_path, "echo 'open", None, lambda text, level: None)


def queue_of(batch: BatchDirectory, entries: list[Entry], rules: Rules) -> Queue:
    return Queue(batch, entries, [Slot()], rules, lambda text, level: None)


def test_until_starts_nothing_behind_its_hour(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    queue = queue_of(batch, looked_at(batch, recipe(tmp_path, "a", source)).entries, Rules(until=time.time() - 1))
    queue.work()
    assert queue.outcomes["a"] == Outcome("stopped", "the hour of --until has come")
    assert [attempt["fact"] for attempt in batch.attempts("a")] == ["queued"]


def test_attempts_that_finish_nothing_are_bounded_and_come_later_each_time(
    tmp_path: Path, source: Path, batch: BatchDirectory
) -> None:
    (entry,) = looked_at(batch, recipe(tmp_path, "a", source)).entries
    queue, waiting, killed = queue_of(batch, [entry], Rules(3, 30.0)), Waiting(entry), Outcome("transient", "killed")
    delays = []
    for progressed in (False, True, False):
        queue.waiting.clear()
        queue._again(waiting, killed, progressed)
        delays.append(round(waiting.not_before - time.time()))
    assert delays == [30, 30, 120] and not queue.outcomes
    queue._again(waiting, killed, False)
    assert queue.outcomes["a"] == Outcome("failed", "killed (3 attempts in a row finished nothing)")
    assert batch.attempts("a")[-1]["fact"] == "gave_up"


def test_a_full_disk_is_waited_for(
    tmp_path: Path, source: Path, batch: BatchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = looked_at(batch, recipe(tmp_path, "a", source)).entries
    queue, waiting = queue_of(batch, [entry], Rules(backoff=0.0)), Waiting(entry)
    usage = shutil.disk_usage(tmp_path)
    queue._again(waiting, Outcome("space", "the disk is full"), False)
    waiting.entry = replace(entry, activation_bytes=50_000_000)
    wanted = entry.output_bytes + 50_000_000 + 2 * (1 << 20)  # and room for lines and pages
    for free, ready in ((wanted - 1, False), (wanted, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert queue._is_ready(waiting) is ready
    # What an earlier attempt left there counts.
    (entry.run.path / "activations").mkdir(parents=True)
    (entry.run.path / "activations" / "batch").write_bytes(b"x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=wanted - 1000))
    assert queue._is_ready(waiting)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    waiting.starved_since = time.time() - 3601
    assert not queue._is_ready(waiting)
    assert re.match(r"no space came back in 60 min: .*0 bytes free, the run needs [\d,]+ ", queue.outcomes["a"].reason)


def test_an_engine_that_is_killed_each_time_is_no_progress(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    (entry,) = looked_at(batch, recipe(tmp_path, "a", source)).entries
    finish(entry, serving="FAIL")
    before = entry.progress()
    entry.run.record("exported", plan=entry.plan_digest)
    entry.run.record("verified", serving="FAIL")
    assert entry.progress() == before
    entry.run.record("shards", plan=entry.plan_digest, block=1, shards={"model-2.safetensors": "d"})
    assert entry.progress() == before + 1


def test_a_log_on_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    reporter = Reporter()
    with open("/dev/full", "w", buffering=1) as full:
        reporter.console = Console(file=full)
        reporter.say("block 1/3")
        with pytest.raises(OSError, match="No space left"):
            reporter.console.print("the disk is full indeed")
        with contextlib.suppress(OSError):
            full.close()
    # Nor is a crash for which it had no words held against the recipe.
    entry = Entry("a", "a.yaml", str(tmp_path / "a.yaml"), str(tmp_path / "out"))
    log = tmp_path / "log"
    log.write_text("Traceback\nOSError: [Errno 28] No space left on device\n")
    assert judge(entry, 1, 0.0, log, 0, False).kind == "space"
    log.write_text("Traceback\nOSError: [Errno 27] File too large\n")
    assert judge(entry, 1, 0.0, log, 0, False).kind == "failed"


def test_the_last_run_of_a_cluster_ends_the_batch_once(tmp_path: Path) -> None:
    set_outstanding(tmp_path, ["a", "b"], [])
    assert [remove_outstanding(tmp_path, name) for name in ("b", "b", "a", "a", "c")] == [
        False,
        False,
        True,
        False,
        False,
    ]
    set_outstanding(tmp_path, ["a", "b"], [])
    remove_outstanding(tmp_path, "b")  # ended between the look at the queue and the next submission
    set_outstanding(tmp_path, ["c"], ["a", "b"])
    assert [remove_outstanding(tmp_path, name) for name in ("c", "a")] == [False, True]


def test_the_preflight_reckons_activations_as_the_rehearsal_does(
    tmp_path: Path, source: Path, batch: BatchDirectory
) -> None:
    """Hidden states, ids and positions, and the causal mask of every sample, which grows with the square of its length."""
    data = {"dataset": "bundled", "num_samples": 10, "max_seq_length": 256, "batch_size": 4}
    entry = looked_at(batch, recipe(tmp_path, "a", source, method="calibrate", calibration=data)).entries[0]
    config = json.loads((source / "config.json").read_text())
    boundary = boundary_bytes(config["hidden_size"], [(4, 256), (4, 256), (2, 256)])
    assert boundary >= 10 * 256 * 256 * 2
    assert entry.activation_bytes == scratch_bytes(boundary, config["num_hidden_layers"], None) > 0
    assert boundary_bytes(2048, [(1, 2048)] * 256) > 2 * (2 * 2048 * 256 * 2048)  # Qwen3-30B-A3B, 256 x 2048


def test_a_dry_run_of_a_batch_leaves_nothing_behind(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [recipe(tmp_path, name, source) for name in ("a", "b")]
    before = sorted(tmp_path.rglob("*"))
    assert main([*map(str, paths), "--dry-run"]) == 0
    assert "2 of 2 runs are to be done" in "".join(capsys.readouterr())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_batch_sees_what_is_at_work_and_what_cannot_be_written(
    tmp_path: Path,
    source: Path,
    batch: BatchDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path, "a", source)
    batch.open()
    assert batch.claim(tmp_path / "out" / "a") is None
    assert main([str(path), "--dry-run", "--directory", str(batch.path)]) == 4
    assert "this batch is already at work" in "".join(capsys.readouterr())
    assert main([str(path), "--dry-run"]) == 4
    assert "belongs to the batch" in "".join(capsys.readouterr())
    batch.close()
    (tmp_path / "file").write_text("")
    assert main([str(path), "--dry-run", "--set", f"output={tmp_path}/file/out"]) == 4
    assert "cannot be written" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "../../x"}, "no name of a run"),
        ({"name": 3}, "name"),
        ({"output": "a\0b"}, "no output"),
        ({"output": "/"}, "no output"),
        ({"output_bytes": "1"}, "output_bytes"),
        ({"problems": "x"}, "problems"),
        ({"unknown": 1}, None),
    ],
)
def test_a_batch_json_whose_fields_mean_nothing_is_one_message(
    tmp_path: Path, change: dict[str, Any], problem: str | None
) -> None:
    batch = BatchDirectory(tmp_path)
    run = {"name": "a", "given": "a.yaml", "recipe": "a.yaml", "output": str(tmp_path / "out"), **change}
    (tmp_path / "batch.json").write_text(json.dumps({"slots": 1, "runs": [run]}))
    if problem is None:
        assert batch.load()[0][0].name == "a"
        return
    with pytest.raises(EnvironmentProblem, match=problem):
        batch.load()
