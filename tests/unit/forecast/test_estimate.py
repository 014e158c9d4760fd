"""The prediction of a run: it counts what the plan says, costs what the machine says, and measures without a trace."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.checkpoint.formats import Formats
from calibration.families.registry import open_source
from calibration.forecast import measuring, speed
from calibration.forecast.cost import Product, block_costs, boundary_bytes, hessian_bytes
from calibration.forecast.measuring import predict_measuring
from calibration.forecast.predict import predict
from calibration.forecast.speed import Machine, Spent
from calibration.plan.budget import BudgetTask
from recipes.errors import SourceError
from tests.exported import recipe, task_of
from tests.models import deepseek_v4, standard
from workflows.progress import Reporter
from workflows.run import prediction as estimate
from workflows.run.state import Run


class Unit:
    """A machine where each term costs one second a unit, told apart by processor seconds."""

    device = torch.device("cpu")
    write, read, digest, pack, conversion = Spent(1, 0), Spent(1, 0), Spent(0, 1), Spent(1, 1), Spent(2, 2)

    def load(self, kind: str) -> Spent:
        return Spent(1, 2)

    def product(self, product: Product, tokens: int) -> Spent:
        return Spent(product.operations * tokens, 0)

    def attention(self, heads: int, dim: int, length: int) -> Spent:
        return Spent(4 * heads * dim * length * length, 0)

    def norm(self, tokens: int, width: int) -> Spent:
        return Spent()

    def expert(self, down: Product, tokens: int) -> Spent:
        return Spent()

    def observe(self, tokens: int, width: int) -> Spent:
        return Spent(1, 1)

    def rounding(self, scheme: str) -> Spent:
        return Spent(1, 0) if scheme == "NVFP4" else Spent(0, 1)

    def predictions(self, vocabulary: int, width: int, tokens: int) -> Spent:
        return Spent(vocabulary * width * tokens, 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek_v4.write(tmp_path_factory.mktemp("estimate") / "source", "fp8_mxfp4")


def run_of(source: Path, output: Path, **sections: Any) -> Run:
    run = Run(recipe(source, output, **sections), Reporter("error"))
    run.make_plan()
    return run


def test_counts_are_those_of_plan_and_source(source: Path, tmp_path: Path) -> None:
    run = run_of(source, tmp_path / "output")
    costs = block_costs(run.plan, run.formats)
    assert [cost.number for cost in costs] == [0, 1, 2, None]
    assert sum(cost.source_bytes for cost in costs) == run.source.total_bytes
    assert sum(cost.written for cost in costs) == run.plan.output_bytes
    assert sum(cost.values for cost in costs) == run.plan.parameters
    assert sum(cost.modules for cost in costs) == len(run.plan.quantized)
    assert all(set(cost.reads) == {"plain", "fp8_tiles", "mxfp4", "scale"} for cost in costs[:-1])


def test_terms_of_a_calibration(source: Path, tmp_path: Path) -> None:
    data = {"dataset": "bundled", "num_samples": 5, "max_seq_length": 32, "batch_size": 2}
    run = run_of(source, tmp_path / "output", calibration=data)
    told = predict(run.task, Unit())  # type: ignore[arg-type]
    work, costs = told["stages"]["calibrate"], block_costs(run.plan, run.formats)
    boundary = boundary_bytes(4 * 64, [(2, 32), (2, 32), (1, 32)])
    assert work["terms"]["load"] == [run.source.total_bytes, 2 * run.source.total_bytes]
    assert work["terms"]["write"] == [run.plan.output_bytes, run.plan.output_bytes]
    assert work["terms"]["activations"] == [3 * boundary, 3 * boundary]  # nothing leaves the last of three blocks
    assert work["bytes_written"] == run.plan.output_bytes + 3 * boundary
    # 160 tokens, and what is outside the experts for two batches of 64 again, for the comparison with the model's own
    # forward: lengths 2 and 1 differ.
    blocks = [cost for cost in costs if cost.number is not None]
    scores = 4 * 2 * 512 * 32 * len(blocks)
    every = sum(cost.operations(32) for cost in blocks)
    repeated = sum(2 * 64 * (c.operations(32) - 4 * 2 * 512 * 32) * c.outside_experts(32) for c in blocks)
    assert all(0 < cost.outside_experts(32) < 1 for cost in blocks)
    assert work["terms"]["forward"][0] == pytest.approx(160 * every + repeated + 2 * 64 * scores)
    # Per batch: one for each layer and each expert's down, in units of the largest batch.
    layers = sum(n for c in costs for product, n in c.products.items() if product.use != "expert gate")
    assert work["terms"]["observe"][0] == pytest.approx(layers * 160 / 64) and layers > 3 * 64
    assert work["terms"]["quantize"][0] == sum(cost.quantized for cost in costs)
    later = predict(run.task, Unit(), finished={0, 1})  # type: ignore[arg-type]
    assert later["blocks"] == 1 and later["stages"]["calibrate"]["terms"]["activations"] == [0, 0]
    assert later["stages"]["calibrate"]["bytes_read"] == costs[2].source_bytes + costs[3].source_bytes
    assert any("max_seq_length" in note for note in told["notes"])


def test_terms_of_measuring_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, targets = standard.write(tmp_path / "source", "qwen3_moe"), [r"re:^model\.layers\.\d+\..*proj$"]
    asked = {"bits_per_parameter": 11, "tokens": 300}
    made = recipe(source, tmp_path / "output", targets, budget=asked)
    budget = BudgetTask.of(made, Formats(open_source(source)))
    work = predict_measuring(budget, Unit())  # type: ignore[arg-type]
    # Three samples of 128 tokens. Three blocks of three units; o_proj may be FP8 too: 4 trials, and 0, 3 and 6 units before them.
    costs = block_costs(budget.plan, budget.formats, 0.0)
    blocks = [cost for cost in costs if cost.number is not None]
    runs = [5, 8, 11]
    heads = blocks[0].attention
    scores = 3 * 4 * heads[0] * heads[1] * 128**2
    forward = [3 * 128 * sum(p.operations * n for p, n in c.products.items()) + scores for c in blocks]
    assert budget.text == (3, 128)
    assert work["terms"]["forward"][0] == pytest.approx(
        sum(f * n for f, n in zip(forward, runs, strict=True)), rel=1e-3
    )
    config = budget.formats.checkpoint.config
    assert work["terms"]["predictions"][0] == 3 * 10 * config["vocab_size"] * 64 * 128
    shapes = [
        budget.formats.of(step.source).shape
        for step in budget.plan.quantized.values()
        if ".experts." not in step.source
    ]
    routed = [
        budget.formats.of(step.source).shape for step in budget.plan.quantized.values() if ".experts." in step.source
    ]
    rounded = sum(m * k + 384 * k for m, k in shapes) + sum(m * k + 384 * k * 2 / 8 for m, k in routed)
    assert work["terms"]["round"] == [rounded, sum(m * k + 384 * k for m, k in shapes if k == 128)]
    outside = next(cost.source_bytes for cost in costs if cost.number is None)
    assert work["bytes_read"] == budget.formats.checkpoint.total_bytes + outside
    assert work["state_bytes"] == 10 * 384 * 64 * 2
    # Saved behind a block if it is due: here each takes longer. It has 4, 7 and 10 streams by then.
    stream = 384 * 64 * 2
    assert work["bytes_written"] == (4 + 7 + 10) * stream
    took = sum(work["terms"][name][0] for name in ("load", "forward", "round"))
    for seconds, streams in ((took * 0.9, 10), (took + 1, 10), (took + work["terms"]["predictions"][0] + 1, 0)):
        monkeypatch.setattr(measuring, "SAVE_SECONDS", seconds)
        found = predict_measuring(budget, Unit())  # type: ignore[arg-type]
        assert found["bytes_written"] == streams * stream, "behind the last block, at the head, never"


def test_a_conversion_takes_as_long_as_its_slowest_part(source: Path, tmp_path: Path) -> None:
    run = run_of(source, tmp_path / "output", method="convert", scheme="NVFP4A16", calibration=None,
                 convert={"workers": 1})  # fmt: skip
    work = predict(run.task, Unit())["stages"]["calibrate"]  # type: ignore[arg-type]
    assert work["seconds"] == 2 * run.plan.output_bytes and work["bytes_written"] == run.plan.output_bytes


@pytest.fixture
def machine(source: Path, tmp_path: Path) -> Iterator[Machine]:
    made = recipe(source, tmp_path / "deep" / "output", method="convert", scheme="NVFP4A16", calibration=None)
    yield Machine(task_of(made), torch.device("cpu"))
    assert not list(tmp_path.iterdir()), "the measurements left something"


def test_every_measurement_is_of_something_and_leaves_nothing(machine: Machine) -> None:
    for spent in (
        machine.product(Product(64, 128), 256), machine.attention(4, 64, 128), machine.norm(128, 256), machine.read,
        machine.expert(Product(64, 32, 0.1, "expert down"), 128), machine.observe(64, 64),
        machine.load("mxfp4"), machine.load("fp8_tiles"), machine.load("plain"), machine.pack, machine.digest,
        machine.conversion, machine.rounding("NVFP4"), machine.rounding("FP8_BLOCK"), machine.predictions(256, 64, 32),
    ):  # fmt: skip
        assert spent.clock > 0
    assert machine.write is not None and machine.write.clock > 0
    assert machine.load("nvfp4") == Spent()  # there is none in this source


def test_without_unnamed_files_the_write_rate_is_assumed(source: Path, tmp_path: Path) -> None:
    run = run_of(source, tmp_path / "output")
    nowhere = Machine(replace(run.task, recipe=run.recipe.model_copy(update={"output": "/proc/self/output"})))
    assert nowhere.write is None
    assert any("assumed" in note for note in predict(run.task, nowhere)["notes"])


def test_a_source_that_cannot_be_read_is_named(source: Path, tmp_path: Path) -> None:
    made = recipe(source, tmp_path / "output")
    task = task_of(made)
    task.source.directory = tmp_path
    with pytest.raises((SourceError, OSError), match="safetensors"):
        Machine(replace(task, formats=Formats(task.source))).load("mxfp4")


def test_facts_of_a_stage(tmp_path: Path) -> None:
    facts: dict[str, dict[str, Any]] = {}
    with estimate.measured(facts, "export"):
        (tmp_path / "file").write_bytes(os.urandom(3 << 20))
        held = bytearray(os.urandom(64 << 20))
    assert len(held) and facts["export"]["bytes_written"] == pytest.approx(3 << 20, rel=0.01)
    assert facts["export"]["peak_memory"] > 64 << 20 and facts["export"]["cpu_seconds"] > 0
    told = {"from": "rehearsal", "notes": [], "stages": {"export": facts["export"] | {"terms": {}}, "verify": {}}}
    both = estimate.compare(told, facts)
    assert list(both["stages"]) == ["export"]
    (line,) = estimate.render(both)
    assert line.startswith("export: ") and "; predicted " in line and "3.1 MB written" in line


@pytest.mark.parametrize(
    ("arguments", "experts", "gates", "downs"),
    [({"quantized_inputs": True}, "all", 1, 1), ({"quantized_inputs": True}, "routed", 8, 1), ({}, "all", 16, 1)],
)
def test_hessians_are_one_for_every_input(
    tmp_path: Path, arguments: dict[str, Any], experts: str, gates: int, downs: int
) -> None:
    """8 experts of 1, DeepSeek-V4: gate and up share their input, and with all experts so do those of all."""
    source = deepseek_v4.write(tmp_path / "source", "bf16")
    target = {"targets": [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"], "scheme": "NVFP4"}
    calibration = {"dataset": "bundled", "experts": experts}
    made = recipe(
        source, tmp_path / "output", modifiers=[{"GPTQModifier": target | arguments}], calibration=calibration
    )
    task = task_of(made)
    inside = {name: task.formats.of(f"layers.0.ffn.experts.0.{name}.weight").shape[1] for name in ("w1", "w2")}
    count = sum(name.startswith("layers.0.") and name.endswith(".w2") for name in task.plan.quantized)
    expected = 4 * (inside["w1"] ** 2 * gates * (1 if gates == 1 else count // 8) + inside["w2"] ** 2 * count * downs)
    assert hessian_bytes(task) == expected
    if arguments:  # of two ranks each keeps half of them, that of all gates both, and the inputs of one batch
        tokens, on_two = 2048, hessian_bytes(task, 2)
        shown = 1.0 if experts == "all" else task.source.config["num_experts_per_tok"] / count
        gates_of_rank = 1 if gates == 1 else count // 2
        inputs = tokens * (inside["w1"] * (1 if gates == 1 else count * shown) + inside["w2"] * count * shown)
        assert on_two == 4 * (inside["w1"] ** 2 * gates_of_rank + inside["w2"] ** 2 * count // 2) + 2 * int(inputs)
    plain = recipe(source, tmp_path / "output", modifiers=[{"QuantizationModifier": target}], calibration=calibration)
    assert hessian_bytes(task_of(plain)) == 0


class SharedProcessor:
    """Stands for `time` on a processor that a process has for 3 ms out of every 24; `calls` take 0.8 ms of it."""

    def __init__(self, phase: float) -> None:
        self.clock, self.cpu = phase, 0.0

    def call(self) -> None:
        self.cpu += 0.0008
        self.clock += 0.0008
        if self.clock % 0.024 > 0.003:
            self.clock += 0.021

    def perf_counter(self) -> float:
        return self.clock

    def process_time(self) -> float:
        return self.cpu


def test_a_measurement_on_a_shared_processor_does_not_depend_on_when_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(wall: bool) -> list[float]:
        found = []
        for phase in range(30):
            processor = SharedProcessor(phase / 10_000)
            monkeypatch.setattr(speed, "time", processor)
            clock = processor.perf_counter if wall else processor.process_time
            found.append(speed.timed(processor.call, clock).clock / (0.0008 * 8))
        return found

    assert max(measured(wall=True)) > 2, "by the wall clock it does"
    assert min(measured(wall=False)) > 0.85 and max(measured(wall=False)) < 1.2


def test_a_measurement_on_the_cpu_goes_by_the_thread_s_own_seconds(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls() -> int:
        count = 0

        def wait_and_work() -> None:
            nonlocal count
            count += 1
            time.sleep(0.02)
            sum(range(100_000))  # about 2 ms

        machine._time(wait_and_work)
        return count

    assert calls() > 3, "another process's time does not end it"
    monkeypatch.setattr(machine, "device", torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    assert calls() <= 3
