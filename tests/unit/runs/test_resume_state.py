"""The journal after a kill, the fingerprint of a run, what is taken for finished, and the status that is shown."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibration.checkpoint.files import file_digest
from calibration.checkpoint.index import Checkpoint, shard_state
from calibration.runs.fingerprint import fingerprint, require_same
from calibration.runs.journal import RunDirectory
from calibration.runs.ranks import Ranks
from calibration.runs.resume import Boundary, Discard, Resume, activations_directory, open_resume
from recipes.errors import EnvironmentProblem, Interrupted, SourceError
from recipes.schema import Recipe
from tests import exported
from tests.models import deepseek_v4
from workflows.interrupts import Interrupts
from workflows.run.status import read_status, render_status


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    opened = RunDirectory(tmp_path / "output").open()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek_v4.write(tmp_path_factory.mktemp("resume") / "source", "fp8_mxfp4")


def journal(directory: RunDirectory) -> Path:
    return directory.path / "journal.jsonl"


@pytest.mark.parametrize("torn", ['{"fact": "sh', '{"fact": "shards", "n": 3}', "\0\0\0\0", "123", '\n{"', "\xff\xfe"])
def test_line_cut_off_by_a_kill_is_left_out_and_swallows_no_other(directory: RunDirectory, torn: str) -> None:
    directory.record("shards", n=1)
    with journal(directory).open("ab") as file:
        file.write(torn.encode("latin-1"))
    directory.record("shards", n=2)
    numbers = [fact["n"] for fact in directory.facts("shards")]
    # A whole line that lost its newline alone was on disk: it counts.
    assert numbers == ([1, 3, 2] if torn.endswith("}") else [1, 2])


def test_journal_that_does_not_fit_keeps_its_old_lines(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    directory.record("shards", n=1)
    before, limit = journal(directory).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, limit[1]))
    try:
        with pytest.raises(
            EnvironmentProblem, match=r"journal\.jsonl: cannot be written: .*run the same command again"
        ):
            directory.record("shards", n=2, filler="x" * 100)
        directory.event("lost", filler="x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert journal(directory).read_bytes() == before
    directory.record("shards", n=3)
    assert [fact["n"] for fact in directory.facts()] == [1, 3]


def test_restart_replaces_the_journal_in_one_step(directory: RunDirectory) -> None:
    directory.record("shards", n=1)
    directory.restart("fingerprint", parts={"a": 1})
    assert [fact["fact"] for fact in directory.facts()] == ["fingerprint"]


def recipe(source: Path, **sections: Any) -> Recipe:
    return exported.recipe(source, source.parent / "output", **sections)


def printed(source: Path, device: str = "cpu AVX2", data: str = "d" * 64, **sections: Any) -> dict[str, Any]:
    made = recipe(source, **sections)
    return fingerprint(exported.task_of(made), data, device)


def test_fingerprint_survives_json_and_ignores_what_changes_nothing(source: Path) -> None:
    one = printed(source)
    assert json.loads(json.dumps(one)) == one
    other = printed(source, verify={"structure": False}, offload={"max_host_memory": "1GiB"}, convert={"workers": 3})
    assert other == one
    assert exported.recipe(source, source.parent / "elsewhere").output not in json.dumps(one)


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"calibration": {"dataset": "bundled", "seed": 7}}, ["recipe calibration.seed: 42 -> 7"]),
        ({"calibration": {"dataset": "bundled", "batch_size": 8}}, ["recipe calibration.batch_size: 1 -> 8"]),
        ({"device": "NVIDIA H200"}, ["device: cpu AVX2 -> NVIDIA H200"]),
        ({"data": "e" * 64}, [f"data: {'d' * 12} -> {'e' * 12}"]),
        ({"export": {"kept": "plain"}}, ["recipe export.kept: native -> plain", "plan: "]),
    ],
)
def test_what_changed_is_named_from_old_to_new(source: Path, changed: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        require_same(printed(source), printed(source, **changed), Path("output.run"), 3)
    text = str(caught.value)
    assert all(f"  {line}" in text for line in lines), text
    assert text.count(" -> ") == len(lines)
    assert "output.run: this run began with other settings, and its 3 finished blocks" in text and "--restart" in text


def test_equal_fingerprints_pass(source: Path) -> None:
    require_same(printed(source), printed(source), Path("output.run"), 3)


def test_changed_source_weights_are_noticed(tmp_path: Path) -> None:
    """Same names, shapes and config; other numbers."""
    one, two = (deepseek_v4.write(tmp_path / f"source-{seed}", "bf16", seed=seed) for seed in (0, 1))
    assert printed(one)["plan"] == printed(two)["plan"]
    assert printed(one)["source files"] != printed(two)["source files"]


RESULT = {
    "modules": 1,
    "tokens_per_expert": {},
    "filled_experts": [],
    "rounded_to_nearest": [],
    "parity": 0.0,
    "peak_rss": 0,
}


class Begun:
    """A journal, shards and activations as a run leaves them that finished the blocks below `blocks`."""

    def __init__(self, directory: RunDirectory, source: Path, blocks: int) -> None:
        self.directory, self.output = directory, directory.path.with_name("output")
        self.made = exported.recipe(source, self.output)
        self.task = exported.task_of(self.made)
        self.plan = self.task.plan
        self.activations = directory.path / "activations"
        self.output.mkdir()
        self.parts = {"recipe a": 1}
        directory.record("fingerprint", plan=self.plan.digest, parts=self.parts)
        last = self.plan.block_numbers[-1]
        for block in range(blocks):
            names = [s.name for s in self.plan.shards if s.block == block or (s.block is None and block == last)]
            shards = {name: self.write(self.output / name) for name in names}
            folder = self.activations / f"boundary-{block + 2:04d}"
            saved = {"directory": str(folder), "files": {"batch-000000.pt": self.write(folder / "batch-000000.pt")}}
            directory.record(
                "shards", plan=self.plan.digest, block=block, shards=shards, result=RESULT,
                activations=None if block == last else saved,
            )  # fmt: skip

    @staticmethod
    def write(path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode() * 3)
        return file_digest(path)

    def shard(self, block: int | None) -> Path:
        return next(self.output / shard.name for shard in self.plan.shards if shard.block == block)

    def open(self, discard: Discard = "nothing", source: Any = None) -> Resume:
        task = self.task if source is None else replace(self.task, formats=SimpleNamespace(checkpoint=source))
        return open_resume(task, self.directory, self.parts, discard)


def test_finished_blocks_and_their_last_activations(directory: RunDirectory, source: Path) -> None:
    begun = Begun(directory, source, 2)
    resume = begun.open()
    assert sorted(resume.finished) == [0, 1] and sorted(resume.boundaries) == [1, 2] and resume.damaged == []
    assert (resume.starting_point(2), resume.starting_point(1), resume.starting_point(0), resume.rest) == (
        2,
        1,
        0,
        False,
    )


def test_an_output_that_is_spelled_relative_keeps_its_saved_activations(
    directory: RunDirectory, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Begun(directory, source, 2)
    monkeypatch.chdir(directory.path.parent)
    begun.activations = begun.activations.relative_to(directory.path.parent)
    resume = begun.open()
    assert sorted(resume.boundaries) == [1, 2]
    assert all((b.directory / name).is_file() for b in resume.boundaries.values() for name in b.files)


def test_damage_is_found_by_digest_at_equal_size(directory: RunDirectory, source: Path) -> None:
    begun = Begun(directory, source, 2)
    shard, saved = begun.shard(0), begun.activations / "boundary-0003" / "batch-000000.pt"
    for path in (shard, saved):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    resume = begun.open()
    assert sorted(resume.finished) == [1] and resume.damaged == [shard.name]
    assert sorted(resume.boundaries) == [1] and not saved.parent.exists()
    assert (resume.starting_point(2), resume.starting_point(0)) == (1, 0)


def test_shards_outside_the_blocks_cost_no_block(directory: RunDirectory, source: Path) -> None:
    begun = Begun(directory, source, len(exported.plan_of(source, recipe(source))[0].block_numbers))
    assert begun.open().rest
    begun.shard(None).unlink()
    resume = begun.open()
    assert not resume.rest and sorted(resume.finished) == begun.plan.block_numbers and resume.boundaries == {}


def test_line_of_another_plan_counts_for_nothing(directory: RunDirectory, source: Path) -> None:
    begun = Begun(directory, source, 2)
    text = journal(directory).read_text().replace(begun.plan.digest, "f" * 64)
    journal(directory).write_text(text)
    assert begun.open().finished == {}


@pytest.mark.parametrize(
    ("discard", "complete", "goes_on"),
    [
        ("nothing", False, True),
        ("nothing", True, True),
        ("outdated", False, True),
        ("outdated", True, False),
        ("everything", False, False),
    ],
)
def test_when_a_run_begins_anew(
    directory: RunDirectory, source: Path, discard: Discard, complete: bool, goes_on: bool
) -> None:
    begun = Begun(directory, source, 2)
    if complete:
        directory.record("verified")
    resume = begun.open(discard)
    assert bool(resume.finished) == goes_on
    assert bool(list(begun.output.iterdir())) == goes_on == bool(list(begun.activations.glob("*/*")))


def test_other_fingerprint_is_refused_but_for_overwrite(directory: RunDirectory, source: Path) -> None:
    begun = Begun(directory, source, 2)
    begun.parts = {"recipe a": 2}
    with pytest.raises(EnvironmentProblem, match="recipe a: 1 -> 2"):
        begun.open()
    assert begun.shard(0).exists()
    assert begun.open("outdated").finished == {} and not begun.shard(0).exists()


def begin_with_source(begun: Begun, source: Path) -> Checkpoint:
    """The journal of a run that recorded the state of its source, as runs do."""
    checkpoint = Checkpoint.open(source)
    path = journal(begun.directory)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["source"] = checkpoint.state
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return checkpoint


def test_a_source_that_was_written_to_is_not_gone_on_from(
    directory: RunDirectory, source: Path, tmp_path: Path
) -> None:
    """At equal size, and where no sample looks: the fingerprint is the same."""
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    begun = Begun(directory, copy, 2)
    assert len(begun.open(source=begin_with_source(begun, copy)).finished) == 2
    shard = sorted(copy.glob("*.safetensors"))[0]
    stat, moved = shard.stat(), tmp_path / "moved.safetensors"
    shard.rename(moved)
    shutil.copy2(moved, shard)  # another inode, the times of the old one
    assert len(begun.open(source=Checkpoint.open(copy)).finished) == 2
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    message = (
        rf"the source changed since this run began \(1 of \d+ shards: {shard.name} \(mtime_ns {stat.st_mtime_ns} -> .*"
    )
    with pytest.raises(SourceError, match=message + "set the old time again .*--restart"):
        begun.open(source=Checkpoint.open(copy))
    assert begun.shard(0).exists()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the documented remedy
    assert len(begun.open(source=Checkpoint.open(copy)).finished) == 2
    os.truncate(shard, stat.st_size - 1)
    changed = SimpleNamespace(state=shard_state(copy, [shard.name]))
    with pytest.raises(SourceError, match=rf"bytes {stat.st_size} -> {stat.st_size - 1}"):
        begun.open(source=changed)
    assert begun.open("everything", changed).finished == {}


def test_a_run_records_the_state_of_its_source(directory: RunDirectory, source: Path) -> None:
    begun, checkpoint = Begun(directory, source, 0), Checkpoint.open(source)
    begun.open(source=checkpoint)
    assert directory.facts("fingerprint")[0]["source"] == checkpoint.state == shard_state(source, checkpoint.shards)


def test_nothing_finished_means_nothing_to_protect(directory: RunDirectory, source: Path) -> None:
    begun = Begun(directory, source, 0)
    begun.parts = {"recipe a": 2}
    assert begun.open().finished == {}
    assert directory.facts("fingerprint")[0]["parts"] == {"recipe a": 2}


def test_runs_share_a_scratch_directory_without_meeting(tmp_path: Path) -> None:
    scratch = [activations_directory(tmp_path, tmp_path, Path(name)) for name in ("a/output", "b/output")]
    assert scratch[0] != scratch[1] and all(path.parent == tmp_path for path in scratch)
    assert activations_directory(None, tmp_path / "x.run", Path("x")) == tmp_path / "x.run" / "activations"


def test_boundary_needs_every_file(tmp_path: Path) -> None:
    boundary = Boundary(tmp_path, {"a": Begun.write(tmp_path / "a"), "b": Begun.write(tmp_path / "b")})
    assert boundary.intact(Ranks())
    (tmp_path / "b").unlink()
    assert not boundary.intact(Ranks())


def lines(directory: RunDirectory, name: str, *facts: dict[str, Any]) -> None:
    (directory.path / name).write_text("".join(json.dumps(fact) + "\n" for fact in facts))


def running(directory: RunDirectory) -> None:
    """Two of five blocks done in 20 s each, the third under way for 5 s at time 1100."""
    stage = {"time": 1050, "event": "stage_started", "stage": "calibrate"}
    load = [{"time": 1055 + 20 * n, "event": "load", "block": n} for n in range(3)]
    block = [{"time": 1075 + 20 * n, "event": "block", "block": n + 1, "blocks": 5} for n in range(2)]
    lines(directory, "events.jsonl", stage, load[0], block[0], load[1], block[1], load[2])
    facts = [{"time": 1075, "fact": "shards", "block": n, "shards": {f"s{n}": "0"}} for n in range(2)]
    lines(directory, "journal.jsonl", {"time": 1050, "fact": "fingerprint", "blocks": 5, "parts": {}}, *facts)


def test_status_of_a_run_under_way(directory: RunDirectory) -> None:
    running(directory)
    status = read_status(directory.path.with_name("output"), now=1100)
    assert (status["state"], status["holder"]) == ("running", f"pid {os.getpid()}")
    assert (status["blocks"], status["blocks_finished"], status["block_under_way"]) == (5, 2, 3)
    assert (status["seconds_per_block"], status["eta"]) == (20, 55)
    text = "\n".join(render_status(status))
    assert "blocks: 2/5 finished, block 3 under way, 20.0 s per block, ETA 0:00:55" in text
    assert "stages: calibrate running" in text and "last event: 0:00:05 ago" in text


def test_status_of_a_run_that_ended(directory: RunDirectory) -> None:
    running(directory)
    directory.close()
    output = directory.path.with_name("output")
    killed = read_status(output, now=1100)
    assert (killed["state"], killed["eta"], killed["block_under_way"]) == ("stopped", None, None)
    assert killed["stages"] == {"calibrate": "interrupted"}
    with (directory.path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1096, "event": "stage_failed", "stage": "calibrate"}) + "\n")
        file.write(json.dumps({"time": 1096, "event": "error", "problems": ["the disk is full"]}) + "\n")
    failed = render_status(read_status(output, now=1100))
    assert "last error, 0:00:04 ago: the disk is full" in failed and "stages: calibrate failed" in failed
    with (directory.path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1099, "event": "stage_finished", "stage": "calibrate"}) + "\n")
    directory.record("verified")
    done = read_status(output, now=1100)
    assert (done["state"], done["last_error"]) == ("complete", None)


def test_status_takes_no_lock_and_writes_nothing(directory: RunDirectory) -> None:
    running(directory)
    before = {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}
    read_status(directory.path.with_name("output"))
    assert {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()} == before


def test_status_where_nothing_was_begun(tmp_path: Path) -> None:
    status = read_status(tmp_path / "output")
    assert status["state"] == "not started" and list(tmp_path.iterdir()) == []
    assert render_status(status) == [f"not started: {tmp_path / 'output'}"]


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_lost_terminal_finishes_the_block_however_often_it_says_so(
    handlers: None, capfd: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupts = Interrupts()
    interrupts.install()
    with pytest.raises(Interrupted), interrupts.deferring():
        for _ in range(3):  # from the kernel, and from the shell
            signal.raise_signal(signal.SIGHUP)
        assert interrupts.requested
    assert "stopping after the block" in capfd.readouterr().err
    interrupts = Interrupts()
    interrupts.install()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)  # does not end what cleans up
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_nohup_stays_nohup(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Interrupts().install()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_signal_without_a_terminal_to_tell_is_no_error(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(number: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", gone)
    interrupts = Interrupts()
    interrupts.install()
    with pytest.raises(Interrupted), interrupts.deferring():
        signal.raise_signal(signal.SIGTERM)


def test_second_signal_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    interrupts, before = Interrupts(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupts.install()
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.deferring():
            signal.raise_signal(signal.SIGTERM)
            assert interrupts.requested and "once more stops at once" in capfd.readouterr().err
            signal.raise_signal(signal.SIGINT)
        interrupts = Interrupts()
        interrupts.install()
        with pytest.raises(Interrupted), interrupts.deferring():
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "line",
    [
        {"shards": ["model-00001-of-00002.safetensors"]},
        {"shards": {"a": 1}},
        {"shards": {"a": "b"}, "block": "0"},
        {"shards": {"a": "b"}, "block": True},
        {"shards": {"a": "b"}, "block": 10**4000},
        {"shards": {"a": "b"}, "time": float("nan")},
        {"shards": {"a": "b"}, "activations": {"directory": 3, "files": {}}},
        {"shards": {"a": "b"}, "result": {"peak_rss": "much"}},
    ],
)
def test_a_line_whose_fields_mean_nothing_was_never_written(directory: RunDirectory, line: dict[str, Any]) -> None:
    directory.record("shards", **{"plan": "p", "block": 0, **line})
    directory.record("shards", plan="p", block=1, shards={"b": "c"})
    assert [fact["block"] for fact in directory.facts("shards")] == [1]
    assert read_status(directory.path.with_name("output"))["blocks_finished"] == 1


@pytest.mark.parametrize("spoil", ["elsewhere", "../boundary-0002", "activations/boundary-0002", "no files"])
def test_a_journal_names_no_directory_but_a_runs_own_activations(
    directory: RunDirectory, source: Path, spoil: str
) -> None:
    begun = Begun(directory, source, 1)
    text = journal(directory).read_text()
    place = str(begun.activations / "boundary-0002")
    assert place in text
    if spoil == "no files":
        text = re.sub(r'"files": \{[^}]*\}', '"files": {}', text)
    elif spoil != "activations/boundary-0002":
        text = text.replace(place, str(directory.path / spoil))
    journal(directory).write_text(text)
    assert list(begun.open().boundaries) == ([1] if spoil.startswith("activations") else [])


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"stages": 3}', '{"stages": {"a": {"predicted": {}}}}', "[" * 10_000]
)
def test_status_of_a_run_with_damaged_files_says_what_is_known(directory: RunDirectory, content: str) -> None:
    running(directory)
    for name in ("estimate.json", "lock", "serving.json", "verify.json"):
        (directory.path / name).write_text(content)
    assert "blocks: 2/5 finished" in "\n".join(render_status(read_status(directory.path.with_name("output"), now=1100)))
