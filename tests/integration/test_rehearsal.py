"""The rehearsal finds in the first seconds what would end the run in the night, tells it all at once, leaves no trace."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from llmcompressor.pipelines.sequential.helpers import SequentialTracer
from torch.utils.flop_counter import FlopCounterMode

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.data.batches import load_batches, load_tokenizer
from calibration.engine.oneshot import quiet
from calibration.engine.passes import Passes
from calibration.families.registry import family_of
from calibration.forecast.cost import BlockCost, attention, boundary_bytes, hidden_width, products
from calibration.forecast.rehearsal import kinds, rehearse_blocks
from calibration.model import tracing
from calibration.model.parity import ParityError
from calibration.model.skeleton import build_skeleton
from calibration.runs.journal import RunDirectory
from recipes.schema import Calibration
from tests.integration.attempts import TARGETS, Attempt, Case, kill_behind, poison, same
from tests.integration.interrupted_runs import finish
from tests.models import deepseek_v4, standard

RECIPE, SOURCE, ENVIRONMENT, KILLED = 2, 3, 4, -signal.SIGKILL


class Rehearsed(Attempt):
    """Runs with their rehearsal."""

    def go(self, prepare: Any = None, *options: str) -> int:
        self.code, self.text = finish([str(self.recipe), *options], self.log, prepare)
        return self.code

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in RunDirectory(self.output).events() if event["event"] == name]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("rehearsal")
    source = standard.write(root / "source", "qwen3")
    finish(["--help"], root / "log")
    return Case(root / "case", source, "QuantizationModifier")


@pytest.fixture
def attempt(case: Case, request: pytest.FixtureRequest) -> Rehearsed:
    return Rehearsed(case, request.node.name.partition("[")[0], run=False)


def stages(attempt: Rehearsed) -> list[str]:
    """Those begun since the run directory is open: inspect opens it."""
    return [event["stage"] for event in attempt.events("stage_started")]


def test_leaves_no_trace_and_changes_no_byte(case: Case, attempt: Rehearsed) -> None:
    scratch = attempt.directory / "scratch"
    scratch.mkdir()
    attempt.write(case.body | {"offload": {"directory": str(scratch)}})
    assert attempt.go(None, "--stages", "inspect,rehearse") == 0
    (rehearsed,) = attempt.events("rehearsed")
    assert [block["blocks"] for block in rehearsed["blocks"]] == [[0, 1, 2]] and rehearsed["blocks"][0]["parity"] == 0.0
    assert set(rehearsed["write_bytes_per_second"]) == {"output", "scratch"}
    assert not attempt.output.exists() and not (attempt.run_directory / "journal.jsonl").exists()
    assert not list(scratch.iterdir()) and not list(attempt.directory.glob(".*"))
    attempt.write(case.body)
    attempt.go()
    same(attempt, case)
    assert stages(attempt) == ["rehearse", "rehearse", "calibrate", "export", "verify"]


def test_prediction_stands_beside_the_fact(case: Case, attempt: Rehearsed) -> None:
    dry = json.loads(finish([str(attempt.recipe), "--dry-run", "--json"], attempt.directory / "dry")[1])["estimate"]
    assert sorted(path.name for path in attempt.directory.iterdir()) == ["dry", "recipe.yaml"]
    assert dry["from"] == "micro-benchmark" and dry["stages"]["calibrate"]["seconds"] > 0
    assert attempt.go() == 0
    kept = json.loads((attempt.run_directory / "estimate.json").read_text())
    work = kept["stages"]["calibrate"]
    assert kept["from"] == "rehearsal" and work["predicted"]["seconds"] > 0 and work["fact"]["seconds"] > 0
    # Journal, events and headers of the shards are not in the prediction, and much beside a tiny model.
    assert 0.8 * work["fact"]["bytes_written"] < work["predicted"]["bytes_written"] < work["fact"]["bytes_written"]
    assert dry["stages"]["calibrate"]["bytes_written"] == pytest.approx(work["predicted"]["bytes_written"], rel=0.25)
    assert work["predicted"]["peak_memory"] == pytest.approx(work["fact"]["peak_memory"], rel=0.3)
    assert [event["stages"] for event in attempt.events("estimate")] == [kept["stages"]]
    status = finish([str(attempt.recipe), "--status"], attempt.directory / "status")[1]
    assert "calibrate: " in status and "; predicted " in status and "peak memory" in status


def test_prediction_of_a_conversion(case: Case, attempt: Rehearsed) -> None:
    modifiers = [{"QuantizationModifier": {"targets": TARGETS, "scheme": "NVFP4A16"}}]
    body = {name: section for name, section in case.body.items() if name != "calibration"}
    attempt.write(body | {"method": "convert", "modifiers": modifiers})
    assert attempt.go() == 0, attempt.text
    work = json.loads((attempt.run_directory / "estimate.json").read_text())["stages"]["calibrate"]
    assert 0.8 * work["fact"]["bytes_written"] < work["predicted"]["bytes_written"] < work["fact"]["bytes_written"]
    assert work["predicted"]["terms"]["compute"][0] > 0


def test_is_not_repeated_where_blocks_are_finished(case: Case, attempt: Rehearsed) -> None:
    assert attempt.go(partial(kill_behind, 0)) == KILLED
    attempt.go()
    assert "1 blocks are finished: no block is rehearsed again" in attempt.text
    assert ["blocks" in event for event in attempt.events("rehearsed")] == [True, False]
    assert attempt.loaded() == [1, 2]
    same(attempt, case)


def test_tells_all_problems_at_once(case: Case, attempt: Rehearsed) -> None:
    body = case.body | {
        "calibration": case.body["calibration"] | {"dataset": "absent.jsonl"},
        "modifiers": [{"GPTQModifier": next(iter(case.body["modifiers"][0].values())) | {"block_size": "many"}}],
        "offload": {"directory": "/proc/no/such/place"},
        "verify": {"serving": {"python": "/nowhere/python"}},
    }
    attempt.write(body)
    assert attempt.go() == ENVIRONMENT
    told = attempt.text[attempt.text.index("error: ") :]
    for part in (
        "/nowhere/python: no such interpreter",
        "/proc: a file of",
        "absent.jsonl",
        "modifiers.0.GPTQModifier.block_size: ",
    ):
        assert part in told, attempt.text
    assert "Traceback" not in attempt.text and not attempt.output.exists() and not attempt.run_directory.exists()


def test_a_block_that_overflows_ends_the_run_before_it_begins(case: Case, attempt: Rehearsed) -> None:
    assert attempt.go(partial(poison, 0)) == SOURCE
    assert "rehearsal of block 0 (model.layers.0), batch 0: the hidden states are not finite" in attempt.text
    assert stages(attempt) == ["rehearse"] and attempt.loaded() == []
    assert attempt.go(None, "--no-rehearsal") == 0 and stages(attempt) == ["rehearse", "calibrate", "export", "verify"]
    same(attempt, case)


def kill_in_probe() -> None:
    """Kills the process when the probe file has its second name."""
    from calibration.runs import disk

    def dies(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    disk.fsync_directory = dies


def test_a_kill_while_it_writes_is_cleaned_up(case: Case, attempt: Rehearsed) -> None:
    assert attempt.go(kill_in_probe) == KILLED
    assert [path.name for path in attempt.directory.glob(".*")] == [".output.renamed.partial"]
    attempt.go()
    assert not list(attempt.directory.glob(".*"))
    same(attempt, case)


def small_machine() -> None:
    from workflows.run import rehearse

    rehearse.available_memory = lambda: 1000


def test_too_little_memory(case: Case, attempt: Rehearsed) -> None:
    assert attempt.go(small_machine) == ENVIRONMENT
    assert "lower offload.max_host_memory" in attempt.text and "1,000 that this process can have" in attempt.text


def rehearse(directory: Path, source: Path, **options: Any) -> Any:
    """The skeleton of `source` and its rehearsal on two samples of 64 tokens."""
    data = load_batches(
        Calibration(dataset="bundled", num_samples=2, max_seq_length=64, batch_size=2),
        load_tokenizer(source, False),
        source_directory=source,
    )
    with quiet(lambda event: None):
        model = build_skeleton(Formats(Checkpoint.open(source)), directory, False)
        return model, rehearse_blocks(model, data.batches, True, directory / "scratch", **options)


def test_a_trace_that_is_not_the_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm-compressor's own tracer loses the causal mask of Qwen3-MoE."""
    monkeypatch.setattr(tracing, "ConfigKeepingTracer", SequentialTracer)
    with pytest.raises(ParityError, match="block 0: traced output differs"):
        rehearse(tmp_path, standard.write(tmp_path / "source", "qwen3_moe"))


def test_one_block_of_every_kind(tmp_path: Path) -> None:
    """DeepSeek-V4 has hashed and learned routers, and two kinds of compressed attention; 3 to 5 are like 1 and 2."""
    source = deepseek_v4.write(tmp_path / "source", "fp8_mxfp4", layers=8, hash_layers=6)
    model, done = rehearse(tmp_path, source)
    assert kinds(model) == [(0,), (1, 3, 5), (2, 4), (6,), (7,)]
    assert [(block.block, block.name, block.parity) for block in done.blocks] == [
        (n, f"layers.{n}", 0.0) for n in (0, 1, 2, 6, 7)
    ]
    assert done.left_out == [] and model.loaded() == set()
    _, hurried = rehearse(tmp_path, source, seconds=0)
    assert [block.block for block in hurried.blocks] == [0] and hurried.left_out == [1, 2, 6, 7]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral"])
def test_operations_and_activations_are_what_the_cost_model_says(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts the operations of a block's forward pass and of the model's own (parity); routers are not in the
    formula, nor rotary tables in the bytes."""
    source = standard.write(tmp_path / "source", family)
    counter, forward = FlopCounterMode(display=False), Passes.forward

    def counted(*args: Any) -> Any:
        with counter:
            yield from forward(*args)

    monkeypatch.setattr(Passes, "forward", counted)
    model, done = rehearse(tmp_path, source)
    checkpoint = Checkpoint.open(source)
    formats, config = Formats(checkpoint), checkpoint.config
    shapes = {name: formats.of(name).shape for name in checkpoint.tensors if name not in formats.companions}
    heads, dim = attention(config)
    expected = BlockCost(0, products(family_of(config), shapes, config)[0], (heads, dim)).operations(64)
    routers = sum(p.numel() for n, p in model.blocks["model.layers.0"].named_parameters() if n.endswith("gate.weight"))
    # Routed tokens are rounded up, which counts on 128 tokens.
    assert counter.get_total_flops() == pytest.approx(2 * 128 * (expected + 2 * routers), rel=0.05 if routers else 1e-3)
    assert done.boundary_bytes == pytest.approx(boundary_bytes(hidden_width(config), [(2, 64)]), rel=0.2)
