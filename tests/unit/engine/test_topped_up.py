"""Which tokens an expert that is short of tokens is shown: those that its router ranks next in the whole calibration."""

from __future__ import annotations

import random

import pytest
import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.quantization.calibration import initialize_observer
from torch import nn

from calibration.engine.experts import ExpertCalibration, Pass
from calibration.engine.topped_up import TopUp
from calibration.engine.weighted import weighted_observer
from tests.unit.engine.expert_models import EXPERTS, HIDDEN, TOP_K, make_experts, side_by_side, statistics, watch

ROWS, LENGTH = 12, 10
MODULE = nn.Identity()


def rows(seed: int = 3) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(token ids [LENGTH], hidden [LENGTH, HIDDEN], scores [LENGTH, EXPERTS]) of each row. Scores have few values, so that
    many are equal; experts 6 and 7 are never chosen, 7 is excluded (-inf) in every second row."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(ROWS):
        scores = torch.randint(3, 9, (LENGTH, EXPERTS), generator=generator).float() / 8
        scores[:, 6:] = torch.randint(0, 3, (LENGTH, 2), generator=generator).float() / 8
        if number % 2:
            scores[:, 7] = -torch.inf
        hidden = torch.randn(LENGTH, HIDDEN, generator=generator).to(torch.bfloat16)
        found.append((torch.randint(0, 1000, (LENGTH,), generator=generator), hidden, scores))
    return found


def choose(scores: torch.Tensor) -> torch.Tensor:
    """What a router does."""
    return torch.topk(scores, TOP_K, dim=-1, sorted=False)[1]


def chosen(batches: list[list[int]], wanted: int, ranks: int = 1) -> tuple[dict[int, set[bytes]], dict[int, int]]:
    """The tokens that each expert is shown, as bytes, and how many, of batches of the `rows`."""
    data, counts = rows(), [[0] * EXPERTS for _ in range(ranks)]
    top_ups = [TopUp(wanted) for _ in range(ranks)]
    for rank, top_up in enumerate(top_ups):
        for number, batch in enumerate(batches):
            top_up.add_batch(torch.stack([data[row][0] for row in batch]), number % ranks == rank)
        for number, batch in enumerate(batches[rank::ranks]):
            top_up.enter_batch(number)
            with top_up.watching():
                index = choose(torch.cat([data[row][2] for row in batch]))
            more = torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
            counts[rank] = [a + b for a, b in zip(counts[rank], more, strict=True)]
            top_up.offer(MODULE, torch.cat([data[row][1] for row in batch]), index, counts[rank])
    total = {number: sum(count[number] for count in counts) for number in range(EXPERTS)}
    offers = [top_up.ranks(MODULE) for top_up in top_ups]
    found: dict[int, set[bytes]] = {}
    for rank, top_up in enumerate(top_ups):
        shown, added = top_up.choose(MODULE, total, offers, rank)
        for number, tokens in shown.items():
            found.setdefault(number, set()).update(token.view(torch.uint8).numpy().tobytes() for token in tokens)
    return found, added


ONE_BY_ONE = [[row] for row in range(ROWS)]


@pytest.mark.parametrize("wanted", [5, 40, 70])
def test_an_expert_is_shown_the_tokens_that_score_highest_for_it_up_to_n(wanted: int) -> None:
    data = rows()
    shown, added = chosen(ONE_BY_ONE, wanted)
    for number in range(EXPERTS):
        tokens = [(hidden[t], scores[t]) for _, hidden, scores in data for t in range(LENGTH)]
        others = [(score[number].item(), h) for h, score in tokens if number not in choose(score).tolist()]
        allowed = sorted((score for score, _ in others if score != -torch.inf), reverse=True)
        count = len(tokens) - len(others)
        short = max(min(wanted - count, len(allowed)), 0)
        assert added.get(number, 0) == len(shown.get(number, ())) == short
        by_bytes = {h.view(torch.uint8).numpy().tobytes(): score for score, h in others}
        assert sorted((by_bytes[token] for token in shown.get(number, ())), reverse=True) == allowed[:short]
    assert added[7] == min(wanted, ROWS * LENGTH // 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_order_and_size_of_batches_and_ranks_change_no_choice(seed: int, ranks: int) -> None:
    shuffled = list(range(ROWS))
    random.Random(seed).shuffle(shuffled)
    size = [1, 2, 3, 4][seed]
    batches = [shuffled[at : at + size] for at in range(0, ROWS, size)]
    assert chosen(batches, 30, ranks) == chosen(ONE_BY_ONE, 30)


def test_without_a_ranking_nobody_is_topped_up() -> None:
    """Hash-routed layers look the experts up by token id."""
    top_up, data = TopUp(30), rows()
    top_up.add_batch(data[0][0][None], True)
    top_up.enter_batch(0)
    index = torch.arange(LENGTH * TOP_K).reshape(LENGTH, TOP_K) % EXPERTS
    with top_up.watching():
        choose(data[0][2])
    top_up.offer(MODULE, data[0][1], index, [4] * EXPERTS)
    assert top_up.is_unranked(MODULE) and not any(top_up.ranks(MODULE).values())
    top_up.forget(MODULE)
    assert not top_up.is_unranked(MODULE)


def test_no_expert_needs_more_tokens_than_there_are() -> None:
    top_up = TopUp(30)
    top_up.add_batch(torch.zeros(2, 10, dtype=torch.int64), True)
    assert top_up.least == 20
    top_up.add_batch(torch.zeros(3, 10, dtype=torch.int64), False)
    assert top_up.least == 30


def observed(experts: LinearExperts2D, wanted: int, stacked: bool | None = None) -> dict[str, torch.Tensor]:
    """The statistics of all observers after all rows, one by one, and the top-up."""
    hooks, top_up = watch(experts), TopUp(wanted)
    calibration = ExpertCalibration(top_up)
    calibration.stacked = stacked
    with torch.no_grad(), calibration.installed(), calibration.running(Pass.CALIBRATE):
        for number, (ids, hidden, scores) in enumerate(rows()):
            top_up.add_batch(ids[None], True)
            top_up.enter_batch(number)
            index = choose(scores)
            experts(hidden, index, torch.ones_like(index, dtype=torch.bfloat16))
        shown, _ = top_up.choose(experts, calibration.tokens(experts), [top_up.ranks(experts)], 0)
        for number, tokens in shown.items():
            calibration.show(experts, number, tokens)
    del hooks
    return statistics(experts)


@pytest.mark.parametrize("stacked", [False, True])
def test_observers_see_the_further_tokens_and_so_do_hooks_of_other_modifiers(stacked: bool) -> None:
    """The fast ways and the way through the experts' own modules, which GPTQ's hooks need."""
    plain, hooked, routed, seen = side_by_side(make_experts()), make_experts(), make_experts(), [0] * EXPERTS
    for number in range(EXPERTS):
        hooked[number].down_proj.register_forward_hook(
            lambda module, args, out, number=number: seen.__setitem__(number, seen[number] + len(args[0]))
        )
    fast, slow, few = observed(plain, 40, stacked), observed(hooked, 40), observed(routed, 1)
    assert fast.keys() == slow.keys() and all(torch.equal(fast[name], slow[name]) for name in fast)
    assert min(seen[:6]) > 40 and seen[6:] == [40, 40] and sum(seen) == ROWS * LENGTH * TOP_K + 80
    assert any(not torch.equal(fast[name], few[name]) for name in few if name.startswith("6."))
    assert all(torch.equal(fast[name], few[name]) for name in few if name.startswith("0."))


def test_importance_counts_the_tokens_that_an_expert_sees_and_not_who_shows_them() -> None:
    """Routed tokens without the rows that pad them, and the further ones alike, on whichever rank they are."""

    def sums(further: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        experts = make_experts()
        hooks, calibration = watch(experts), ExpertCalibration()
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(experts[3], leaf)
            linear.quantization_scheme.weights.observer = "nvfp4_weighted"
            initialize_observer(linear, "weight")
        with torch.no_grad(), calibration.installed():
            experts(hidden, index, torch.ones_like(index, dtype=torch.bfloat16))
            for part in further:
                calibration.show(experts, 3, part)
        found = {leaf: weighted_observer(getattr(experts[3], leaf)) for leaf in ("gate_proj", "up_proj", "down_proj")}
        del hooks
        return {leaf: observer.importance.sums for leaf, observer in found.items()}  # type: ignore[misc,union-attr]

    hidden, index = rows()[0][1], torch.arange(LENGTH * TOP_K).reshape(LENGTH, TOP_K) % EXPERTS
    more = rows()[1][1]
    whole, parts = sums([more]), sums([more[:3], more[3:]])
    assert all(torch.equal(whole[leaf], parts[leaf]) for leaf in whole)
    seen = torch.cat([hidden[(index == 3).any(1)], more]).double().square().sum(0)
    coarse, fine = whole["gate_proj"].double()
    assert torch.allclose(coarse * 2.0**10 + fine / 2.0**40, seen, rtol=1e-6)
