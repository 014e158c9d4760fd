"""The calibration forward of experts against llm-compressor's own, on llm-compressor's own classes and observers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from llmcompressor.observers import Observer
from llmcompressor.observers.min_max import StaticMinMaxObserver
from torch import nn
from transformers import Llama4TextConfig

from calibration.engine.experts import ROWS, ExpertCalibration, Pass
from calibration.engine.peers import fill_dead_experts, fill_from_peers
from calibration.engine.stacked_experts import Stack
from tests.unit.engine.expert_models import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    batches,
    make_experts,
    side_by_side,
    statistics,
    watch,
)


def run(
    experts: LinearExperts2D, calibration: ExpertCalibration | None, all_experts: bool = True
) -> list[torch.Tensor]:
    """Outputs per batch; stock's forward where calibration is None."""
    installed = nullcontext() if calibration is None else calibration.installed()
    flag = moe_calibration_context() if all_experts else nullcontext()
    with torch.no_grad(), installed, flag:
        return [experts(*batch) for batch in batches()]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v4"])
@pytest.mark.parametrize("observer", ["static_minmax", "minmax", "memoryless_minmax"])
@pytest.mark.parametrize("leaves", [(), ("down_proj",), ("gate_proj", "up_proj")])
@pytest.mark.parametrize("all_experts", [True, False])
def test_statistics_and_outputs_equal_stock(
    kind: str, observer: str, leaves: tuple[str, ...], all_experts: bool
) -> None:
    mine, theirs = make_experts(kind), make_experts(kind)
    hooks = [watch(experts, observer, leaves) for experts in (mine, theirs)]
    made, wanted = run(mine, ExpertCalibration(), all_experts), run(theirs, None, all_experts)
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert statistics(theirs)
    assert same(statistics(mine), statistics(theirs))
    del hooks


@pytest.mark.parametrize("all_experts", [True, False])
def test_llama_4_whose_experts_get_sorted_scaled_tokens_equals_stock(all_experts: bool) -> None:
    """Its experts are called with every token once for each of them, multiplied by a routing weight that is mostly zero."""
    config = Llama4TextConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, intermediate_size=96, dtype="bfloat16")
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(96 if at % 3 < 2 else HIDDEN, HIDDEN if at % 3 < 2 else 96, generator=generator)
               for at in range(3 * EXPERTS)]  # fmt: skip
    found = []
    for calibration in (ExpertCalibration(), None):
        experts = Llama4LinearExperts(EXPERTS, HIDDEN, 96, config).eval()
        for parameter, weight in zip(experts.parameters(), weights, strict=True):
            parameter.data = weight.mul(0.2).to(torch.bfloat16)
        hooks = watch(experts)
        installed = nullcontext() if calibration is None else calibration.installed()
        with torch.no_grad(), installed, moe_calibration_context() if all_experts else nullcontext():
            made = []
            for hidden, index, scores in batches():
                spread = torch.zeros(len(hidden), EXPERTS, dtype=torch.bfloat16).scatter_add_(1, index, scores)
                made.append(experts(hidden.repeat(EXPERTS, 1) * spread.t().reshape(-1, 1)))
        found.append((made, statistics(experts)))
        if calibration is not None:
            assert sum(calibration.tokens(experts).values()) == sum(int((s != 0).sum()) for _, _, s in batches())
        del hooks
    (mine, seen), (theirs, wanted) = found
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    if all_experts:
        assert seen and same(seen, wanted)
    else:  # stock observes zeros for the tokens that an expert did not get
        assert all(torch.equal(seen[name], wanted[name]) for name in seen) and seen


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products over all experts at once, as on an accelerator, two experts at a time; the experts of each grouped one."""
    calls = list[int]()
    product = nn.functional.grouped_mm
    monkeypatch.setattr(ExpertCalibration, "stacked", True)
    monkeypatch.setattr("calibration.engine.stacked_experts.CHUNK", 2 * 50 * 2 * 96 * 2)
    monkeypatch.setattr(nn.functional, "grouped_mm", lambda *a, **k: calls.append(a[1].shape[0]) or product(*a, **k))
    return calls


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v4"])
@pytest.mark.parametrize("observer", ["static_minmax", "minmax", "memoryless_minmax"])
@pytest.mark.parametrize("leaves", [(), ("down_proj",), ("gate_proj", "up_proj")])
def test_all_experts_at_once_give_the_same_bits(
    kind: str, observer: str, leaves: tuple[str, ...], grouped: list[int]
) -> None:
    mine, theirs = side_by_side(make_experts(kind)), make_experts(kind)
    hooks = [watch(experts, observer, leaves) for experts in (mine, theirs)]
    made, wanted = run(mine, ExpertCalibration()), run(theirs, None)
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert statistics(theirs) and same(statistics(mine), statistics(theirs))
    # Of experts 6 and 7 only the first batch has rows: no rows, no product.
    assert grouped == [2] * (4 + 3 + 3)
    del hooks


def test_all_experts_at_once_on_their_own_tokens(grouped: list[int]) -> None:
    """The pass that computes outputs alone."""
    mine, calibration = side_by_side(make_experts()), ExpertCalibration()
    with calibration.running(Pass.PROPAGATE):
        made = run(mine, calibration)
    assert grouped == [EXPERTS] * 6
    assert all(torch.equal(a, b) for a, b in zip(made, run(make_experts(), None), strict=True))


@pytest.mark.parametrize("what", ["replaced", "bias", "watched", "wrapped", "class", "apart", "odd", "turned"])
def test_experts_that_are_no_stack_are_computed_one_by_one(what: str, grouped: list[int]) -> None:
    experts = make_experts() if what == "apart" else side_by_side(make_experts())
    linear, seen = experts[3].up_proj, list[int]()
    if what == "replaced":
        linear.weight = nn.Parameter(linear.weight.clone() * 2)
    elif what == "bias":
        linear.bias = nn.Parameter(torch.ones(96, dtype=torch.bfloat16))
    elif what == "watched":
        linear.register_forward_hook(lambda *_: seen.append(1))
    elif what == "wrapped":
        linear.forward, linear.quantization_enabled = lambda value: nn.functional.linear(value, linear.weight) * 2, True
    elif what == "class":
        experts[3].__class__ = type("Other", (type(experts[3]),), {})
    elif what == "turned":
        linear.weight.data = linear.weight.data.as_strided((96, HIDDEN), (1, 96))
    elif what == "odd":
        for number in range(EXPERTS):
            for leaf in ("gate_proj", "up_proj"):
                module = getattr(experts[number], leaf)
                module.weight.data = module.weight.data[:95]
            down = experts[number].down_proj
            down.weight.data = down.weight.data[:, :95]
    wanted = run(experts, None)
    assert Stack.of(experts) is None
    assert all(torch.equal(a, b) for a, b in zip(run(experts, ExpertCalibration()), wanted, strict=True))
    assert grouped == [] and bool(seen) == (what == "watched")


@pytest.mark.parametrize("all_experts", [True, False])
def test_routed_tokens_are_counted(all_experts: bool) -> None:
    experts, calibration = make_experts(), ExpertCalibration()
    run(experts, calibration, all_experts)
    chosen = torch.cat([index.flatten() for _, index, _ in batches()]).tolist()
    assert calibration.tokens(experts) == {number: chosen.count(number) for number in range(EXPERTS)}
    assert calibration.tokens(experts)[EXPERTS - 1] == 0
    calibration.forget(experts)
    assert calibration.tokens(experts) == {}


def test_shared_input_is_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One observation for gate and up of all experts, one for each down projection: not 3 per expert."""
    experts, calls = make_experts(), list[Observer]()
    hooks = watch(experts)
    update = StaticMinMaxObserver.update_statistics_from_observed
    monkeypatch.setattr(
        StaticMinMaxObserver, "update_statistics_from_observed", lambda self, v: calls.append(self) or update(self, v)
    )
    run(experts, ExpertCalibration())
    assert len(calls) == 3 * (1 + EXPERTS)
    del hooks


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v4"])
@pytest.mark.parametrize("leaves", [(), ("down_proj",), ("gate_proj", "up_proj")])
@pytest.mark.parametrize("all_experts", [True, False])
def test_a_whole_pass_is_handed_to_each_observer_once(
    kind: str, leaves: tuple[str, ...], all_experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What static observers of an expert's own inputs see is collected over all batches; their statistics are stock's."""
    mine, theirs, calls = make_experts(kind), make_experts(kind), list[Observer]()
    hooks = [watch(experts, "static_minmax", leaves) for experts in (mine, theirs)]
    run(theirs, None, all_experts)
    update = StaticMinMaxObserver.update_statistics_from_observed
    monkeypatch.setattr(
        StaticMinMaxObserver, "update_statistics_from_observed", lambda self, v: calls.append(self) or update(self, v)
    )
    calibration = ExpertCalibration()
    with calibration.running(Pass.CALIBRATE):
        run(mine, calibration, all_experts)
        during = len(calls)
    assert statistics(theirs) and same(statistics(mine), statistics(theirs))
    shared = all_experts and leaves != ("down_proj",)
    assert during == (3 if shared else 0)
    assert len(set(calls[during:])) == len(calls) - during
    assert (len(calls) > during) == (not all_experts or leaves != ("gate_proj", "up_proj"))
    with calibration.running(Pass.CALIBRATE):  # a second pass adds to the first
        pass
    assert same(statistics(mine), statistics(theirs))
    del hooks


@pytest.mark.parametrize("all_experts", [True, False])
def test_nan_of_one_expert_reaches_its_observers(all_experts: bool) -> None:
    experts, calibration = make_experts(), ExpertCalibration()
    hooks = watch(experts)
    hidden, index, weights = batches(1)[0]
    hidden[5, 7] = torch.nan
    flag = moe_calibration_context() if all_experts else nullcontext()
    with torch.no_grad(), calibration.installed(), flag, calibration.running(Pass.CALIBRATE):
        experts(hidden, index, weights)
    struck = set(range(EXPERTS)) if all_experts else set(index[5].tolist())
    for leaf in ("gate_proj", "down_proj"):
        found = {n: getattr(experts[n], leaf).input_observer for n in range(EXPERTS)}
        seen = {n: observer.max_vals for n, observer in found.items() if observer.has_statistics}
        assert {n for n, value in seen.items() if value.isnan()} == struck
    del hooks


def test_down_runs_on_routed_tokens_only() -> None:
    experts, rows = make_experts(), list[int]()
    hooks = watch(experts)
    linear = nn.functional.linear

    def counted(value: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if weight.shape[0] == HIDDEN:
            rows.append(value.shape[0])
        return linear(value, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", counted)
        run(experts, ExpertCalibration())
    counts = [torch.bincount(index.flatten(), minlength=EXPERTS).tolist() for _, index, _ in batches()]
    assert rows == [-(-count // ROWS) * ROWS for batch in counts for count in batch]
    assert sum(rows) < 3 * 50 * EXPERTS / 2
    del hooks


def test_other_hooks_see_every_token_of_every_expert() -> None:
    """GPTQ collects its Hessian in forward hooks: they must not be bypassed."""
    experts, seen = make_experts(), dict[str, int]()
    hooks = watch(experts)
    for name, module in experts.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.__setitem__(name, seen.get(name, 0) + args[0].shape[0])
            )
    run(experts, ExpertCalibration())
    assert seen == {f"{e}.{leaf}_proj": 150 for e in range(EXPERTS) for leaf in ("gate", "up", "down")}
    del hooks


def test_observers_that_keep_more_than_extremes_go_the_long_way() -> None:
    mine, theirs = make_experts(), make_experts()
    hooks = [watch(experts, "mse") for experts in (mine, theirs)]
    run(mine, ExpertCalibration())
    run(theirs, None)
    assert statistics(theirs)
    assert same(statistics(mine), statistics(theirs))
    del hooks


@pytest.mark.parametrize("kind", [Pass.REPEAT, Pass.PROPAGATE])
def test_other_passes_neither_observe_nor_count(kind: Pass) -> None:
    experts, calibration = make_experts(), ExpertCalibration()
    hooks = watch(experts)
    first = run(experts, calibration)
    before, tokens = statistics(experts), calibration.tokens(experts)
    with calibration.running(kind):
        again = run(experts, calibration)
    assert same(before, statistics(experts))
    assert calibration.tokens(experts) == tokens
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    del hooks


def test_peers_fill_experts_with_too_few_tokens() -> None:
    experts, calibration = make_experts(), ExpertCalibration()
    hooks = watch(experts)
    run(experts, calibration, all_experts=False)
    tokens, before = calibration.tokens(experts), statistics(experts)
    assert (tokens[6], tokens[7]) == (TOP_K, 0)
    assert fill_from_peers(experts, tokens, TOP_K + 1) == [6, 7]
    after = statistics(experts)
    for leaf, group in (("gate_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        peers = [f"{e}.{name}.input_observer" for e in range(6) for name in group]
        low = torch.stack([before[f"{peer}.min_vals"] for peer in peers]).amin(0)
        high = torch.stack([before[f"{peer}.max_vals"] for peer in peers]).amax(0)
        assert torch.equal(after[f"7.{leaf}.input_observer.min_vals"], low)
        assert torch.equal(after[f"7.{leaf}.input_observer.max_vals"], high)
        own = before[f"6.{leaf}.input_observer.max_vals"]
        assert bool((own > high).all())
        assert torch.equal(after[f"6.{leaf}.input_observer.max_vals"], own)
    untouched = {name: value for name, value in before.items() if int(name.split(".")[0]) < 6}
    assert all(torch.equal(after[name], value) for name, value in untouched.items())
    del hooks


def test_a_pruned_expert_takes_the_extremes_of_its_peers() -> None:
    experts, calibration = make_experts(), ExpertCalibration()
    with torch.no_grad():
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            getattr(experts[3], leaf).weight.zero_()
    hooks = watch(experts)
    run(experts, calibration, all_experts=True)
    before = statistics(experts)
    assert not before["3.down_proj.input_observer.max_vals"].any()
    assert fill_dead_experts(experts) == [3]
    after = statistics(experts)
    peers = [f"{e}.down_proj.input_observer.max_vals" for e in range(8) if e != 3]
    assert torch.equal(after["3.down_proj.input_observer.max_vals"], torch.stack([before[p] for p in peers]).amax(0))
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("3.down"))
    del hooks


def test_no_peer_with_statistics_fills_nothing() -> None:
    experts = make_experts()
    hooks = watch(experts)
    assert fill_from_peers(experts, {}, 1) == []
    assert statistics(experts) == {}
    del hooks


def test_a_repeat_with_the_same_input_computes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity runs a block a second time: where its experts get the very same input, only what surrounds them is new."""
    experts, calibration, calls = make_experts(), ExpertCalibration(), list[int]()
    hooks = watch(experts)
    hidden, index, weights = batches()[0]
    compute = ExpertCalibration._forward
    monkeypatch.setattr(ExpertCalibration, "_forward", lambda *given: calls.append(1) or compute(*given))
    with torch.no_grad(), calibration.installed(), moe_calibration_context():
        made = experts(hidden, index, weights)
        with calibration.running(Pass.REPEAT):
            again = experts(hidden.clone(), index, weights)
            assert torch.equal(made, again) and again is not made and len(calls) == 1
            for other in ((hidden * 2, index, weights), (hidden, index.flip(0), weights), (hidden, index, weights / 2)):
                assert not torch.equal(experts(*other), made)
            assert len(calls) == 4
            made.add_(1)  # a model that goes on in place: what is kept is not the output any more
            assert torch.equal(experts(hidden, index, weights), again) and len(calls) == 5
        calibration.forget(experts)
        with calibration.running(Pass.REPEAT):
            experts(hidden, index, weights)
        assert len(calls) == 6
    del hooks
