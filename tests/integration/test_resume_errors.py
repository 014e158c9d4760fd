"""What ends a run ends it in one clear message and a state that the same command goes on from, to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from calibration.checkpoint.header import read_header
from calibration.checkpoint.index import INDEX_NAME
from tests.integration.attempts import (
    ENVIRONMENT,
    INTERRUPTED,
    KILLED,
    SOURCE,
    Attempt,
    Case,
    kill_behind,
    poison,
    same,
    slow_blocks,
)
from tests.integration.held_runs import Hold
from tests.integration.interrupted_runs import finish, interrupt, start, wait_until
from tests.models import standard


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("resume-errors")
    source = standard.write(root / "source", "qwen3")
    finish(["--help"], root / "log")
    return Case(root / "case", source, "QuantizationModifier")


@pytest.fixture
def attempt(case: Case, request: pytest.FixtureRequest) -> Attempt:
    return Attempt(case, request.node.name.partition("[")[0], run=False)


def test_goes_on_at_the_first_unfinished_block(case: Case, attempt: Attempt) -> None:
    assert attempt.go(partial(kill_behind, 1)) == KILLED
    attempt.go()
    assert "2 of 3 blocks are finished; resuming with block 3" in attempt.text
    assert attempt.loaded() == [2]
    same(attempt, case)
    assert [line["block"] for line in attempt.journal()] == [0, 1, 2]
    # Parity with the model's own forward was checked in the resumed block too: the engine records what it found.
    assert attempt.journal()[2]["result"]["parity"] == 0.0


def weaken(block: int) -> None:
    """The model's own forward of one block differs from the traced one."""
    from llmcompressor.modifiers.utils.hooks import HooksMixin

    from workflows.run import calibrate

    build = calibrate.build_skeleton

    def built(*args: Any) -> Any:
        model = build(*args)
        module = list(model.blocks.values())[block]
        forward = module.forward

        def unsteady(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) * (1.01 if HooksMixin._HOOKS_DISABLED else 1)

        module.forward = unsteady
        return model

    calibrate.build_skeleton = built


def test_parity_is_checked_in_resumed_blocks(case: Case, attempt: Attempt) -> None:
    assert attempt.go(partial(kill_behind, 1)) == KILLED
    assert attempt.go(partial(weaken, 2)) == 1
    assert "block 2: traced output differs from the model's own forward" in attempt.text
    attempt.go()
    same(attempt, case)


@pytest.mark.parametrize("harm", ["a byte", "deleted"])
def test_damaged_shard_is_found_and_its_block_done_again(case: Case, harm: str) -> None:
    attempt = Attempt(case, f"damaged-{harm}", partial(kill_behind, 1))
    shard = attempt.output / next(iter(attempt.journal()[0]["shards"]))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    if harm == "a byte":
        shard.write_bytes(data)
    attempt.go()
    assert f"damaged or missing since they were finished: {shard.name}; 2 of 3 blocks" in attempt.text
    # Block 1 is calculated from the text and its end leads nowhere: blocks 2 and 3 go on from saved activations.
    assert attempt.loaded() == [None, 0, 2]
    same(attempt, case)


def test_damaged_activations_are_calculated_again(case: Case, attempt: Attempt) -> None:
    assert attempt.go(partial(kill_behind, 1)) == KILLED
    for path in attempt.run_directory.glob("activations/*/*.pt"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    attempt.go()
    assert (
        "the activations that enter block 3 are gone: blocks 1 to 2 are calculated again from the text" in attempt.text
    )
    assert attempt.loaded() == [None, 0, 1, 2]
    assert [line["block"] for line in attempt.journal()] == [0, 1, 2]  # no shard was written twice
    assert [line["block"] for line in attempt.journal("boundary")] == [0, 1]
    same(attempt, case)


def holds(shard: Path, part: str) -> bool:
    return any(part in name for name in read_header(shard))


def test_shards_outside_the_blocks_are_written_again_alone(case: Case, attempt: Attempt) -> None:
    attempt.go(None, "--stages", "inspect,calibrate")
    (outside,) = [name for name in attempt.journal()[2]["shards"] if holds(attempt.output / name, "embed_tokens")]
    (attempt.output / outside).unlink()
    attempt.go()
    assert "all 3 blocks are finished and intact" in attempt.text and attempt.loaded() == []
    same(attempt, case)


def test_a_finished_calibration_is_not_repeated(case: Case, attempt: Attempt) -> None:
    assert attempt.go(None, "--stages", "inspect,calibrate") == 0
    stamps = {path: path.stat().st_mtime_ns for path in attempt.output.glob("*.safetensors")}
    assert attempt.go(None, "--stages", "inspect,calibrate") == 0
    assert "all 3 blocks are finished and intact: nothing to calibrate" in attempt.text and attempt.loaded() == []
    assert {path: path.stat().st_mtime_ns for path in attempt.output.glob("*.safetensors")} == stamps
    attempt.go()
    same(attempt, case)
    assert attempt.go() == 0 and "done and verified before by this recipe and plan" in attempt.text
    assert attempt.loaded() == []
    attempt.write(case.body | {"calibration": case.body["calibration"] | {"num_samples": 5}})
    assert attempt.go() == ENVIRONMENT and "output is not empty" in attempt.text
    attempt.write(case.body)
    assert attempt.go(None, "--overwrite") == 0 and attempt.loaded() == [None, 0, 1, 2]
    same(attempt, case)


def test_other_settings_are_named_and_refused(case: Case, attempt: Attempt) -> None:
    assert attempt.go(partial(kill_behind, 1)) == KILLED
    before = attempt.files()
    calibration = case.body["calibration"] | {"num_samples": 5, "batch_size": 1}
    attempt.write(case.body | {"calibration": calibration})
    assert attempt.go() == ENVIRONMENT
    for line in (
        "recipe calibration.num_samples: 6 -> 5",
        "recipe calibration.batch_size: 2 -> 1",
        "--restart",
        "data: ",
    ):
        assert line in attempt.text
    assert attempt.files() == before
    # What changes no number may be set freely.
    attempt.write(
        case.body | {"offload": {"directory": str(attempt.directory / "scratch"), "max_host_memory": "100KiB"}}
    )
    assert attempt.go(None, "--stages", "inspect,calibrate") == 0 and attempt.loaded() == [2]
    attempt.write(case.body)
    attempt.go()
    same(attempt, case)


def test_a_run_begun_with_padded_batches_does_not_go_on_without_padding(case: Case, attempt: Attempt) -> None:
    """What the version before 2026-11-29 wrote for samples of unequal length names no `batches`."""
    rows = attempt.directory / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "some words " * count}) + "\n" for count in (3, 9, 3, 5)))
    data = {"dataset": str(rows), "num_samples": 4, "max_seq_length": 64, "batch_size": 2}
    attempt.write(case.body | {"calibration": data})
    assert attempt.go(partial(kill_behind, 0)) == KILLED
    journal = attempt.run_directory / "journal.jsonl"
    text = journal.read_text()
    assert text.count('"batches"') == 1
    journal.write_text(text.replace('"batches"', '"ragged"'))
    assert attempt.go() == ENVIRONMENT
    assert "batches: null -> of samples of one length, without padding" in attempt.text
    journal.write_text(text)
    assert attempt.go() == 0 and attempt.loaded() == [1, 2]


def other_machine(name: str) -> None:
    """Another processor: its name as torch gives it, and products with other last bits."""
    from calibration.runs import row_invariance as products
    from tests import uneven

    products.device_name = lambda: name
    here_uneven = uneven.F.linear is uneven.uneven_linear
    uneven.F.linear = uneven.even_linear if here_uneven else uneven.uneven_linear


def test_a_run_that_goes_on_where_products_differ_says_what_it_loses(case: Case, attempt: Attempt) -> None:
    """Under the same name of the processor, and under another; and the card keeps it."""
    assert attempt.go(partial(kill_behind, 0)) == KILLED
    here, *none = attempt.journal("products")
    assert none == [] and here["row_invariant"] == (max(sum(here["differing"].values(), [0])) < 16)
    assert attempt.go(partial(other_machine, here["device"]), "--stages", "inspect,calibrate") == 0
    begun_on = f"{here['device']} (products {here['digest']}, {here['threads']} thread"
    assert f"finished blocks were calculated on {begun_on}" in attempt.text
    assert attempt.loaded() == [1, 2]
    assert len(attempt.journal("products")) == 2
    assert attempt.go() == 0 and "finished blocks" not in attempt.text  # nothing is calculated any more
    card = (attempt.output / "README.md").read_text()
    assert f"| calculated on | {here['device']} (products {here['digest']}), then {here['device']} (products" in card

    renamed = Attempt(case, "renamed", partial(kill_behind, 0))
    assert renamed.go(partial(other_machine, "cpu OTHER")) == 0
    assert begun_on in renamed.text and "), and cpu OTHER (products" in renamed.text
    begun = Attempt(case, "begun-and-restarted", partial(kill_behind, 0))
    assert begun.go(partial(other_machine, "cpu OTHER"), "--restart") == 0 and begun.loaded() == [None, 0, 1, 2]
    assert "finished blocks" not in begun.text and len(begun.journal("products")) == 1


def test_restart_begins_anew(case: Case, attempt: Attempt) -> None:
    other = case.body | {"calibration": case.body["calibration"] | {"num_samples": 5}}
    attempt.write(other)
    assert attempt.go(partial(kill_behind, 1)) == KILLED
    attempt.write(case.body)
    attempt.go(None, "--restart")
    assert attempt.loaded() == [None, 0, 1, 2]
    same(attempt, case)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_finishes_the_block_the_second_does_not(case: Case, number: signal.Signals) -> None:
    attempt = Attempt(case, f"signal-{number}", run=False)
    for signals in (1, 2):  # in the first block, which is finished, and in the second one, which is not
        hold = Hold(attempt.directory / str(signals), signals - 1)
        process = start([str(attempt.recipe), "--no-rehearsal"], attempt.log, hold.install)
        wait_until(hold.reached, [process])
        for _ in range(signals):
            interrupt(process.pid or 0, number)
        hold.let_go()
        process.join(60)
        assert process.exitcode == INTERRUPTED
        assert [line["block"] for line in attempt.journal()] == [0]
    text = attempt.log.read_text()
    assert "stopping after the block under way" in text
    assert "stopped after block 1 of 3; the same command resumes with block 2" in text
    assert "run the same command again to resume" in text
    assert "Traceback" not in text
    attempt.go()
    same(attempt, case)


def full_disk(suffix: str) -> None:
    """The disk fills up in the middle of the second file that ends with `suffix`."""
    import torch

    from calibration.checkpoint import writer
    from calibration.engine import activations

    seen = []

    def half(write: Any, *given: Any) -> None:
        seen.append(given)
        if len(seen) < 2:
            write(*given)
            return
        next(part for part in given if hasattr(part, "write")).write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if suffix == "shard":
        writer._fill = partial(half, writer._fill)
    else:
        activations.torch.save = partial(half, torch.save)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("suffix", "message"),
    [("shard", "the disk is full"), ("activations", "activations of batch 1 cannot be written: .*No space left")],
)
def test_full_disk(case: Case, suffix: str, message: str) -> None:
    import re

    attempt = Attempt(case, f"full-{suffix}", partial(full_disk, suffix))
    assert attempt.code == ENVIRONMENT and re.search(message, attempt.text), attempt.text
    assert "Traceback" not in attempt.text and not list(attempt.output.glob("*.partial"))
    attempt.go()
    same(attempt, case)


def test_full_disk_under_the_journal(case: Case, attempt: Attempt) -> None:
    """A line that did not fit whole is no line."""
    assert attempt.go(partial(kill_behind, 0)) == KILLED
    with (attempt.run_directory / "journal.jsonl").open("a") as file:
        file.write('{"fact": "shards", "block": 1, "sha')
    attempt.go()
    assert "1 of 3 blocks are finished" in attempt.text
    same(attempt, case)


def test_nan_in_a_block(case: Case, attempt: Attempt) -> None:
    assert attempt.go(partial(poison, 1)) == SOURCE
    assert "block 1 (model.layers.1), batch 0: the hidden states are not finite" in attempt.text
    assert "Traceback" not in attempt.text
    assert [line["block"] for line in attempt.journal()] == [0]
    attempt.go()
    assert attempt.loaded() == [1, 2]
    same(attempt, case)


def vanish(shard: Path) -> None:
    """A shard of the source is gone when the first block is finished."""
    from calibration.runs.journal import RunDirectory

    record = RunDirectory.record

    def recorded(self: RunDirectory, name: str, /, **facts: Any) -> None:
        record(self, name, **facts)
        if name == "shards" and facts["block"] == 0:
            shard.rename(shard.with_suffix(".away"))

    RunDirectory.record = recorded  # type: ignore[method-assign]


def test_vanished_source_file(case: Case, attempt: Attempt, tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "qwen3", shards=5)
    shards = [path for path in sorted(source.glob("*.safetensors")) if holds(path, "layers.2.")]
    shard = next(path for path in shards if not holds(path, "layers.1."))
    attempt.write(case.body | {"source": {"checkpoint": str(source)}})
    assert attempt.go(partial(vanish, shard)) == SOURCE, attempt.text
    assert f"{shard}: " in attempt.text and "cannot be read" in attempt.text and "Traceback" not in attempt.text
    assert attempt.go() == SOURCE and "missing shard" in attempt.text
    shard.with_suffix(".away").rename(shard)
    assert attempt.go() == 0
    assert "2 of 3 blocks are finished; resuming with block 3" in attempt.text
    weights = {name: data for name, data in case.reference.files().items() if name.endswith(".safetensors")}
    assert {name: data for name, data in attempt.files().items() if name in weights} == weights


def test_data_set_that_ends_early(case: Case, attempt: Attempt, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Row {n} tells of the sea, of the wind and of ships. " * 6}) + "\n" for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    calibration = case.body["calibration"] | {"dataset": str(data)}
    attempt.write(case.body | {"calibration": calibration | {"exact": True}})
    assert attempt.go(partial(kill_behind, 0)) == KILLED, attempt.text
    data.write_text("".join(rows[:3]))
    assert attempt.go() == SOURCE and "6 samples" in attempt.text and "3 there" in attempt.text
    attempt.write(case.body | {"calibration": calibration})
    assert attempt.go() == ENVIRONMENT and "data: " in attempt.text, "what is finished is not mixed with other rows"
    data.write_text("".join(rows))
    assert attempt.go() == 0
    assert "1 of 3 blocks are finished; resuming with block 2" in attempt.text


def test_killed_between_the_last_block_and_the_index(case: Case, attempt: Attempt) -> None:
    assert attempt.go(partial(kill_behind, 2)) == KILLED
    assert not (attempt.output / INDEX_NAME).exists()
    attempt.go()
    assert "nothing to calibrate" in attempt.text
    same(attempt, case)


def slow_and_held(hold: Hold) -> None:
    slow_blocks()
    hold.install()


def test_status_while_it_runs_and_after(case: Case, attempt: Attempt) -> None:
    status = [str(attempt.recipe), "--status", "--json"]
    assert json.loads(finish(status, attempt.log)[1])["state"] == "not started"
    hold = Hold(attempt.directory, 1)
    process = start([str(attempt.recipe), "--no-rehearsal"], attempt.log, partial(slow_and_held, hold))
    wait_until(hold.reached, [process])
    running = json.loads(finish(status, attempt.directory / "status")[1])
    process.kill()
    process.join()
    assert (running["state"], running["blocks"], running["blocks_finished"]) == ("running", 3, 1)
    assert running["holder"] == f"pid {process.pid}" and running["eta"] > 0 and running["seconds_per_block"] >= 0.5
    assert running["stages"] == {"inspect": "finished", "calibrate": "running"}
    stopped = json.loads(finish(status, attempt.directory / "status")[1])
    assert (stopped["state"], stopped["holder"], stopped["eta"]) == ("stopped", None, None)
    assert stopped["stages"] == {"inspect": "finished", "calibrate": "interrupted"}
    attempt.go(partial(poison, 2))
    failed = json.loads(finish(status, attempt.directory / "status")[1])
    assert failed["state"] == "stopped" and "not finite" in failed["last_error"]["problems"][0]
    attempt.go()
    code, text = finish([str(attempt.recipe), "--status"], attempt.directory / "status")
    assert code == 0 and text.startswith("complete: ") and "blocks: 3/3 finished" in text and "last error" not in text


def list_boundaries(activations: Path, into: Path) -> None:
    """Notes the folders of saved activations whenever a block is handed over."""
    from workflows.run import calibrate

    on_block = calibrate._Blocks.on_block

    def listed(self: Any, result: Any) -> None:
        with into.open("a") as file:
            file.write(json.dumps([result.block, sorted(path.name for path in activations.iterdir())]) + "\n")
        on_block(self, result)

    calibrate._Blocks.on_block = listed  # type: ignore[method-assign]


def test_disk_holds_two_boundaries_at_most(case: Case, attempt: Attempt) -> None:
    """Those that enter and leave a block; nothing leaves the last one."""
    seen = attempt.directory / "seen"
    assert attempt.go(partial(list_boundaries, attempt.run_directory / "activations", seen)) == 0
    assert [json.loads(line) for line in seen.read_text().splitlines()] == [
        [0, ["boundary-0001", "boundary-0002"]],
        [1, ["boundary-0002", "boundary-0003"]],
        [2, ["boundary-0003"]],
    ]
