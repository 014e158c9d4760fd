"""A size budget: what is measured is what a unit costs, a killed run chooses and writes the same, and vLLM serves the mixture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.nvfp4 import RANGE
from calibration.data.batches import load_batches, load_tokenizer
from calibration.engine import sensitivity
from calibration.families.registry import open_source
from calibration.model.skeleton import build_skeleton
from calibration.model.source_model import SourceModel
from calibration.plan.budget import BudgetTask, Unit
from recipes.schema import Calibration
from tests.exported import EXPERTS, recipe
from tests.integration import batch_runs
from tests.integration.attempts import TARGETS, Attempt, Case, same
from tests.integration.interrupted_runs import KillAt, finish
from tests.integration.whole_runs import LINEAR, SERVING, run, write_recipe
from tests.models import any_family, deepseek_v4, standard
from tests.reference import nvfp4 as reference

TEXT = Calibration(dataset="bundled", num_samples=2, max_seq_length=48, batch_size=2)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "v4": lambda path: deepseek_v4.write(path, "bf16"),
    "qwen3_moe": lambda path: standard.write(path, "qwen3_moe"),
    "glm_moe_dsa": lambda path: any_family.write(path, "glm_moe_dsa"),
}
TARGETED = {"v4": EXPERTS, "glm_moe_dsa": ["part:routed expert"]}


class Measured:
    """A tiny model, its units and its batches; counts the blocks that are loaded and the predictions that are made."""

    def __init__(self, root: Path, name: str) -> None:
        source = WRITERS[name](root / name)
        formats = Formats(open_source(source))
        asked = {"bits_per_parameter": 15.0}
        made = recipe(source, root / "out", TARGETED.get(name, LINEAR), budget=asked)
        self.units = BudgetTask.of(made, formats).units
        self.batches = list(load_batches(TEXT, load_tokenizer(source, False), source_directory=source).batches)
        self.model: SourceModel = build_skeleton(formats, root / f"{name}-work", False, torch.device("cpu"))
        self.loaded = self.predicted = 0
        load, blocks = self.model.load, set(self.model.blocks.values())

        def counted(roots: Any) -> None:
            self.loaded += sum(root in blocks for root in roots)
            load(roots)

        self.model.load = counted  # type: ignore[method-assign]

    def measure(
        self, path: Path, key: str = "key", on_step: Callable[[str, int, int], None] = lambda a, b, c: None
    ) -> Any:
        self.loaded = self.predicted = 0
        saved = sensitivity.Saved(path, path.with_suffix(".json"), key)
        with pytest.MonkeyPatch.context() as patch:
            predictions = sensitivity._log_probabilities

            def counted(*arguments: Any) -> torch.Tensor:
                self.predicted += 1
                return predictions(*arguments)

            patch.setattr(sensitivity, "_log_probabilities", counted)
            return sensitivity.measure(self.units, self.model, self.batches, saved, on_step)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Measured]:
    root = tmp_path_factory.mktemp("measured")
    return {name: Measured(root, name) for name in WRITERS}


@torch.no_grad()
def divergence(case: Measured, unit: Unit) -> float:
    """The KL divergence with one unit in NVFP4 in the whole model, by the float64 reference's arithmetic."""
    model, names = case.model, case.model.model_modules()
    roots = [*model.outside_blocks(), *model.blocks.values()]
    model.load(roots)
    sample = {**case.batches[0], "use_cache": False}
    modules = [model.model.get_submodule(names[module]) for module in unit.modules]
    largest: dict[nn.Module, float] = {}

    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments[0].numel():
            largest[module] = max(largest.get(module, 0.0), float(arguments[0].abs().max()))

    def rounded(value: torch.Tensor, amax: float) -> torch.Tensor:
        return reference.fake_quantize(value, torch.tensor([RANGE / amax])).to(value.dtype)

    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    exact = model.model(**sample).logits.double().log_softmax(-1)
    for hook in hooks:
        hook.remove()
    hooks = []
    for module in modules:
        module.weight.data = rounded(module.weight.data, float(module.weight.abs().max()))
        if module in largest:
            hooks.append(module.register_forward_pre_hook(lambda m, given: (rounded(given[0], largest[m]), *given[1:])))
    made = model.model(**sample).logits.double().log_softmax(-1)
    for hook in hooks:
        hook.remove()
    model.unload(roots)
    return float((exact.exp() * (exact - made)).sum(-1).mean())


@pytest.mark.parametrize("name", ["qwen3_moe", "v4"])
def test_the_error_of_a_unit_is_the_divergence_that_it_causes_in_the_whole_model(
    tmp_path: Path, measured: Mapping[str, Measured], name: str
) -> None:
    case = measured[name]
    found = case.measure(tmp_path / "state")
    assert found.keys() == {unit.name for unit in case.units} and not case.model.loaded()
    for unit in case.units:
        assert found[unit.name]["NVFP4"] == pytest.approx(divergence(case, unit), rel=0.1, abs=1e-6), unit.name
        assert found[unit.name]["bfloat16"] == 0.0
        if "FP8_BLOCK" in unit.sizes:
            assert 0 < found[unit.name]["FP8_BLOCK"] < found[unit.name]["NVFP4"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["qwen3_moe", "glm_moe_dsa"])
def test_a_stopped_measurement_resumes_with_the_next_block_to_the_same_bits(
    tmp_path: Path, measured: Mapping[str, Measured], name: str
) -> None:
    """The last block of glm_moe_dsa takes the positions that the one before it has selected."""
    case = measured[name]
    whole = case.measure(tmp_path / "whole")
    assert case.loaded == 3

    def stop(what: str, finished: int, number: int) -> None:
        if (what, finished) == ("block", 2):
            raise Stop

    with pytest.raises(Stop):
        case.measure(tmp_path / "state", on_step=stop)
    assert case.measure(tmp_path / "state") == whole
    assert case.loaded == 1
    assert case.measure(tmp_path / "state", key="another") == whole
    assert case.loaded == 3, "a state of other settings is not used"
    (tmp_path / "state").unlink()
    with pytest.raises(Stop):
        case.measure(tmp_path / "state", on_step=stop)
    good = (tmp_path / "state").read_bytes()
    hostile = [good.replace(a, b) for a, b in (
        (b'"following":"2"', b'"following":"9"'), (b'"following":"2"', b'"following":"1"'), (b"experts.*", b"experts.+"),
        (b'"BF16"', b'"F16" '), (b'NVFP4', b'NVFP5'),
    )]  # fmt: skip
    if name == "glm_moe_dsa":
        hostile.append(good.replace(b"handed.0.0", b"handed.0.9"))
    assert all(len(text) == len(good) and text != good for text in hostile)
    for damaged in (b"", b"not safetensors", good[:-100], *hostile):
        (tmp_path / "state").write_bytes(damaged)
        assert case.measure(tmp_path / "state") == whole
        assert case.loaded == 3


def test_a_measurement_that_is_killed_at_the_head_resumes_there_to_the_same_bits(
    tmp_path: Path, measured: Mapping[str, Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 samples, each with the exact predictions and those of every unit."""
    case = measured["qwen3_moe"]
    whole, every = case.measure(tmp_path / "whole"), 2 * (1 + len(case.units))
    assert case.predicted == every

    def stop(what: str, finished: int, number: int) -> None:
        if (what, finished) == ("sample", 1):
            assert number == 2
            raise Stop

    with pytest.raises(Stop):
        case.measure(tmp_path / "state", on_step=stop)
    kept = json.loads((tmp_path / "state.json").read_text())
    assert case.measure(tmp_path / "state") == whole and (case.loaded, case.predicted) == (0, every // 2)
    # Killed within a sample: nothing is said to anyone, and what was due is on disk.
    partial = {"key": kept["key"], "sums": {u: s if at < 3 else [] for at, (u, s) in enumerate(kept["sums"].items())}}
    (tmp_path / "state.json").write_text(json.dumps(partial))
    assert case.measure(tmp_path / "state") == whole and case.predicted == every - 3
    monkeypatch.setattr(sensitivity, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(sensitivity, "SAVE_HEAD_SECONDS", 0.0)
    (tmp_path / "state").unlink()
    assert case.measure(tmp_path / "state") == whole and case.measure(tmp_path / "state") == whole
    assert (case.loaded, case.predicted) == (0, 0), "the state is saved before the head, and what the head measures"
    name = next(iter(kept["sums"]))
    for damaged in ("[]", "{", *(json.dumps(kept | changed) for changed in (
        {"key": "x"}, {"sums": {}}, {"sums": kept["sums"] | {name: [1.0] * 3}}, {"sums": kept["sums"] | {name: [float("nan")]}},
        {"sums": kept["sums"] | {name: "a"}},
    ))):  # fmt: skip
        (tmp_path / "state.json").write_text(damaged)
        assert case.measure(tmp_path / "state") == whole and case.predicted == every


BUDGET = {"bits_per_parameter": 11.0, "tokens": 64}


def test_killed_anywhere_it_chooses_and_writes_the_same(tmp_path: Path) -> None:
    finish(["--help"], tmp_path / "log")
    source = standard.write(tmp_path / "source", "qwen3_moe")
    small = {"dataset": "bundled", "num_samples": 4, "max_seq_length": 64, "batch_size": 2}
    case = Case(tmp_path / "case", source, "QuantizationModifier", TARGETS, small, budget=BUDGET)
    kept = yaml.safe_load((case.reference.output / "recipe.yaml").read_text())
    groups = kept["modifiers"][0]["QuantizationModifier"]["config_groups"]
    assert "budget" not in kept and groups["nvfp4"]["scheme"] == "NVFP4"
    for step in sorted({3, 8, case.steps // 3, case.steps // 2, case.steps - 4}):
        attempt = Attempt(case, f"killed at {step}", KillAt(step))
        assert attempt.code == -9, attempt.text
        attempt.go()
        same(attempt, case)
    chosen = json.loads((case.reference.run_directory / "budget.json").read_text())
    assert chosen["chosen"]["bits_per_parameter"] <= 11.0 and set(chosen["choice"].values()) == {"NVFP4", "bfloat16"}
    # The same command again has nothing to do, and another size measures nothing again.
    assert case.reference.go() == 0 and "nothing to do" in case.reference.text
    case.reference.write(case.body | {"budget": BUDGET | {"bits_per_parameter": 9.0}})
    assert case.reference.go(None, "--overwrite") == 0, case.reference.text
    assert "[budget]" not in case.reference.text and "budget: chose" in case.reference.text
    again = json.loads((case.reference.run_directory / "budget.json").read_text())
    assert again["errors"] == chosen["errors"] and again["chosen"]["bits_per_parameter"] <= 9.0
    plan = json.loads((case.reference.run_directory / "plan.json").read_text())["plan"]
    assert plan["bits_per_parameter"] == again["chosen"]["bits_per_parameter"]


def test_a_hostile_choice_in_the_run_directory_is_measured_again(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "qwen3_moe")
    body = {"calibration": {"dataset": "bundled", "num_samples": 2, "max_seq_length": 64}, "budget": BUDGET}
    made = write_recipe(tmp_path, source, LINEAR, **body, verify={})
    first = run(made, "--stages", "inspect")
    assert first.returncode == 0, first.stderr
    place = tmp_path / "output.run" / "budget.json"
    found = json.loads(place.read_text())
    largest = dict.fromkeys(found["choice"], "bfloat16")
    for damaged in (
        "[]", "{", json.dumps(found | {"errors": {"a": 1}}), json.dumps(found | {"choice": largest}),
        json.dumps(found | {"choice": 5}), json.dumps(found | {"key": "x", "choice": largest}),
    ):  # fmt: skip
        place.write_text(damaged)
        done = run(made, "--stages", "inspect")
        assert done.returncode == 0, done.stderr
        assert json.loads(place.read_text())["choice"] == found["choice"]


def test_a_dry_run_measures_nothing_and_says_what_can_be_had(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "qwen3_moe")
    made = write_recipe(tmp_path, source, LINEAR, budget=BUDGET, verify={})
    done = run(made, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["budget"]["units"] == 9 and facts["budget"]["least"]["bits_per_parameter"] == 6.868
    assert facts["plan"]["output_bytes"] == facts["budget"]["least"]["bytes"]
    assert (
        next(iter(facts["estimate"]["stages"])) == "budget" and facts["estimate"]["stages"]["budget"]["cpu_seconds"] > 0
    )
    assert not (tmp_path / "output.run").exists()
    made = write_recipe(tmp_path, source, LINEAR, budget={"bits_per_parameter": 5}, verify={})
    refused = run(made)
    assert (
        refused.returncode == 2 and "5 is too small: the least that these targets and candidates give" in refused.stderr
    )
    assert not (tmp_path / "output.run").exists()


def test_the_mixture_is_served_and_passes_every_check(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "qwen3_moe")
    mixed = {"bits_per_parameter": 7.3, "tokens": 128}
    done = run(write_recipe(tmp_path, source, LINEAR, budget=mixed, verify={"serving": SERVING}), "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["verdicts"].values()) == {"PASS"}
    choice = json.loads((tmp_path / "output.run" / "budget.json").read_text())["choice"]
    assert {"NVFP4", "FP8_BLOCK", "bfloat16"} == set(choice.values())
    measuring = json.loads((tmp_path / "output.run" / "estimate.json").read_text())["stages"]["budget"]
    assert measuring["predicted"]["peak_memory"] == pytest.approx(measuring["fact"]["peak_memory"], rel=0.3)
    assert min(measuring[which]["cpu_seconds"] for which in ("predicted", "fact")) > 0
    size = sum(path.stat().st_size for path in (tmp_path / "output").glob("*.safetensors"))
    assert size * 8 / Formats(open_source(source)).parameters < 7.3 + 0.5  # headers of the files


def test_a_batch_measures_and_its_second_call_finds_what_was_chosen(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "qwen3_moe")
    folder, arguments = tmp_path / "batch", ["--directory", str(tmp_path / "state")]
    made = batch_runs.write_recipe(folder, "mixed", source, LINEAR, budget=BUDGET)
    code, text = batch_runs.finish_batch([str(made), *arguments], tmp_path / "log")
    assert code == 0, text
    chosen = json.loads((folder / "mixed" / "output.run" / "budget.json").read_text())
    assert batch_runs.files(folder, "mixed") == batch_runs.single_run(made, tmp_path / "alone")
    (attempt, *_) = json.loads((tmp_path / "state" / "summary.json").read_text())["runs"]
    code, text = batch_runs.finish_batch([str(made), *arguments], tmp_path / "log2")
    assert code == 0 and "mixed" in text, text
    again = json.loads((tmp_path / "state" / "summary.json").read_text())["runs"][0]
    assert again["attempts"] == attempt["attempts"] == 1
    assert again["bits_per_parameter"] == pytest.approx(chosen["chosen"]["bits_per_parameter"], abs=1e-3)
    # Other checks verify again; another size is another checkpoint.
    body = yaml.safe_load(made.read_text())
    made.write_text(yaml.safe_dump(body | {"verify": {"fidelity": True}}))
    code, text = batch_runs.finish_batch([str(made), *arguments], tmp_path / "log3")
    assert (
        code == 0
        and json.loads((folder / "mixed" / "output.run" / "verify.json").read_text())["verdicts"]["fidelity"] == "PASS"
    )
    made.write_text(yaml.safe_dump(body | {"budget": BUDGET | {"bits_per_parameter": 9.0}}))
    code, text = batch_runs.finish_batch([str(made), *arguments], tmp_path / "log4")
    assert code == 4 and "the checkpoint of another recipe is there" in text, text
