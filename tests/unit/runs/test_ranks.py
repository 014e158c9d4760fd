"""What each rank takes, and which modifiers and observers give the same bytes with any number of ranks."""

from __future__ import annotations

import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from calibration.engine.oneshot import require_divisible
from calibration.plan.plan import Plan
from calibration.runs import torchrun
from calibration.runs.ranks import Ranks
from calibration.runs.resume import Boundary, batch_file
from calibration.runs.sharing import assign_owners, require_batches
from calibration.runs.torchrun import connect
from recipes.errors import EnvironmentProblem, RecipeError
from recipes.schema import Recipe
from tests import exported
from tests.models import deepseek_v4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek_v4.write(tmp_path_factory.mktemp("ranks") / "source", "fp8_mxfp4")


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    return exported.plan_of(source, exported.recipe(source, source.parent / "output"))[0]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_weights_are_shared_out_evenly_and_fused_groups_whole(plan: Plan, size: int) -> None:
    owners = assign_owners(plan, size)
    assert owners.keys() == plan.quantized.keys()
    groups = [group for group in plan.fused if group[0] in owners]
    assert groups and all(len({owners[module] for module in group}) == 1 for group in groups)
    for block in plan.block_numbers:
        loads: Counter[int] = Counter()
        units: Counter[tuple[str, ...]] = Counter()
        for module, owner in owners.items():
            if plan.family.place(module).block == block:
                nbytes = sum(output.nbytes for output in plan.quantized[module].outputs)
                loads[owner] += nbytes
                units[next((group for group in plan.fused if module in group), (module,))] += nbytes
        assert max(loads.values()) - min(loads[rank] for rank in range(size)) <= max(units.values())


def recipe(modifier: dict[str, Any], name: str = "QuantizationModifier", **calibration: Any) -> Recipe:
    body = {
        "source": {"checkpoint": "source"}, "output": "output", "modifiers": [{name: modifier}],
        "calibration": {"dataset": "bundled"} | calibration,
    }  # fmt: skip
    return Recipe.model_validate(body)


def written(weights: str = "memoryless_minmax", inputs: str | None = "static_minmax") -> dict[str, Any]:
    """NVFP4 written out with observers of one's own."""
    four = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    activations = {**four, "dynamic": "local"} | ({"observer": inputs} if inputs else {})
    group = {"targets": ["Linear"], "weights": four | {"observer": weights}, "input_activations": activations}
    return {"config_groups": {"experts": group}}


PRESET = {"targets": ["Linear"], "scheme": "NVFP4"}


@pytest.mark.parametrize(
    "modifier",
    [PRESET, written(), written(inputs=None), written(weights="memoryless_mse"), written(weights="minmax"),
     PRESET | {"weight_observer": "mse"}, PRESET | {"input_observer": "static_minmax"}, PRESET | {"scheme": "FP8_BLOCK"}],
)  # fmt: skip
def test_extremes_may_be_shared_out(modifier: dict[str, Any]) -> None:
    require_divisible(recipe(modifier))


@pytest.mark.parametrize(
    ("modifier", "named"),
    [
        (written(inputs="minmax"), "experts.input_activations: observer minmax"),
        (written(inputs="memoryless_minmax"), "experts.input_activations: observer memoryless_minmax"),
        (written(weights="imatrix_mse"), "experts.weights: observer imatrix_mse"),
        (PRESET | {"weight_observer": "nvfp4_expanded_imatrix"}, "weights: observer nvfp4_expanded_imatrix"),
        (PRESET | {"observer": {"input": "minmax"}}, "input_activations: observer minmax"),
    ],
)
def test_averages_and_sums_are_refused_by_name(modifier: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=f"modifiers.0.QuantizationModifier: .*{named}.*without torchrun"):
        require_divisible(recipe(modifier))


def test_gptq_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"modifiers.0.GPTQModifier: sums over all samples.*`quantized_inputs: true`"):
        require_divisible(recipe(PRESET, "GPTQModifier"))
    served = PRESET | {"quantized_inputs": True, "dampening_frac": 0.05}
    require_divisible(recipe(served, "GPTQModifier"))
    topped_up = recipe(served, "GPTQModifier", experts={"topped_up": 4})
    with pytest.raises(RecipeError, match=r"modifiers.0.GPTQModifier: .*topped_up"):
        require_divisible(topped_up)
    with pytest.raises(
        RecipeError, match=r"modifiers.0.GPTQModifier: group_0.weights: observer nvfp4_expanded_imatrix"
    ):
        require_divisible(recipe(served | {"weight_observer": "nvfp4_expanded_imatrix"}, "GPTQModifier"))


class Rank(Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_every_batch_has_one_owner_and_every_rank_a_batch() -> None:
    assert [[number for number in range(5) if Rank(rank, 3).owns(number)] for rank in range(3)] == [[0, 3], [1, 4], [2]]
    require_batches(Rank(0, 5), 5)
    with pytest.raises(RecipeError, match="5 batches for 6 ranks; give torchrun at most --nproc-per-node 5"):
        require_batches(Rank(0, 6), 5)


def test_a_boundary_is_the_files_of_all_ranks_in_the_order_of_the_batches(tmp_path: Path) -> None:
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing
    parts: list[Boundary | None] = [
        Boundary(tmp_path, {batch_file(number): digest for number in range(3) if Rank(rank, 2).owns(number)})
        for rank in range(2)
    ]
    whole = Boundary.whole(parts)
    assert whole is not None and list(whole.files) == [batch_file(number) for number in range(3)]
    assert Boundary.whole([None, None]) is None
    for number in (0, 2):
        (tmp_path / batch_file(number)).touch()
    # Each rank looks at its own: on hosts with disks of their own the others' are not there.
    assert whole.intact(Rank(0, 2)) and not whole.intact(Rank(1, 2)) and not whole.intact(Ranks())


def test_ranks_that_nobody_started_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert connect().size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        EnvironmentProblem, match=r"WORLD_SIZE is 2 and the ranks cannot meet .*start them with torchrun"
    ):
        connect()


def test_a_rank_that_dies_before_the_ranks_have_met_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "SILENCE", 0.2)
    with pytest.raises(EnvironmentProblem, match="introduction: rank 1 of 2 did not come within 0 s"):
        torchrun._Connected(HashStore(), 0, 2)


def test_an_end_that_python_can_only_drop_is_not_reported() -> None:
    """A finalizer or a weak reference's callback swallows what a signal handler raises there; it is raised again."""
    told = list[type]()

    class Finalized:
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def __del__(self) -> None:
            raise self.error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", partial(torchrun._report_unraisable, lambda c: told.append(c.exc_type)))
        Finalized(torchrun.Stopped)
        Finalized(ValueError)
    assert told == [ValueError]


class GoneStore:
    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Broken pipe")


@pytest.mark.parametrize(("of_torchrun", "said"), [("True", "torchrun's store at "), ("", "rank 1 of 2 on here ")])
def test_whose_loss_a_broken_store_is(monkeypatch: pytest.MonkeyPatch, of_torchrun: str, said: str) -> None:
    """A rank that left because torchrun's store is gone was not killed."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", of_torchrun)
    ranks = object.__new__(torchrun._Connected)
    ranks.rank, ranks.size, ranks._lost, ranks._store = 0, 2, set(), GoneStore()
    ranks._beats, ranks._visible = {1: (b"", 0.0)}, {1}
    ranks.processes = [torchrun.Process("here", os.getpid(), "now"), torchrun.Process("here", os.getpid(), "before")]
    failure = ranks._look()
    assert failure is not None and failure.problems[0].startswith(said)
