"""Further tokens for routed experts that few tokens are routed to (`calibration.experts: {topped_up: N}`).

Every expert is shown the tokens that the model routes to it. An expert with fewer than N of them in the whole
calibration is then also shown the tokens for which its router ranks it highest, up to N. They are chosen after the pass
over all batches, from the candidates of all ranks, so that neither the size nor the order of the batches nor the number
of ranks changes the choice, and the outputs of the block stay those of the model's own routing.

The ranking is the very tensor whose `topk` chose the experts: scores with the router's bias and its excluded groups
(-inf, never chosen). Routers without one (DeepSeek-V4's hash layers, where the token's id decides) have no next token.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from compressed_tensors.utils import patch_attr
from torch import nn

#: How many of the last `topk` calls may have been the router's.
_RECALLED = 4

#: Sorts candidates: negative score, digest of the row's token ids, position in the row.
Rank = tuple[float, int, int]


class Candidate(NamedTuple):
    """A token that an expert may be shown: its rank, and the input of the experts for it, [D]."""

    rank: Rank
    hidden: torch.Tensor


class TopUp:
    """Collects candidates for each module of experts while batches pass, and chooses among them at the end.

    `wanted` is the number of tokens that every expert sees at least, if the calibration has as many.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        #: The scores and indices of the last `topk` calls.
        self._choices: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=_RECALLED)
        #: Tokens of the calibration, on all ranks.
        self.tokens = 0
        self._rows: list[list[int]] = []
        self._batch = 0
        self._pools: dict[nn.Module, dict[int, list[Candidate]]] = {}
        self._unranked: set[nn.Module] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, it sees what routers choose. (A TorchFunctionMode would see every operation, at 6 % of a run's time.)"""

        def seen(function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function)
            def topk(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)
                self._choices.append((args[0] if args else kwargs["input"], result[1]))
                return result

            return topk

        with patch_attr(torch, "topk", seen(torch.topk)), patch_attr(torch.Tensor, "topk", seen(torch.Tensor.topk)):
            yield

    @property
    def least(self) -> int:
        """Tokens that every expert must see: those that are wanted, or all that there are."""
        return min(self.wanted, self.tokens)

    def add_batch(self, input_ids: torch.Tensor, own: bool) -> None:
        """Registers the next batch, token ids [rows, tokens]; only this rank's `own` are entered later. A row is known by
        its content, whatever batch it is in."""
        self.tokens += input_ids.numel()
        if not own:
            return
        rows = input_ids.to("cpu", torch.int64).contiguous().numpy()
        self._rows.append([int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8]) for row in rows])

    def enter_batch(self, batch: int) -> None:
        """Says that the experts are called with the `batch`-th registered batch from now on."""
        self._batch = batch
        self._choices.clear()

    def offer(self, experts: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, counts: Sequence[int]) -> None:
        """Keeps the best tokens of one call, hidden [T, D], for the experts that are short of tokens. `chosen` [T, k] are
        the experts that the router chose, `counts` the tokens of each expert so far, this call's included."""
        pools = self._pools.setdefault(experts, {number: [] for number in range(len(counts))})
        for number in [number for number in pools if counts[number] >= self.wanted]:
            del pools[number]
        if not pools:
            return
        scores, rows = self._scores(chosen, len(counts)), self._rows[self._batch]
        if scores is None or len(hidden) % len(rows):
            self._unranked.add(experts)
            return
        length, numbers = len(hidden) // len(rows), list(pools)
        others = torch.ones_like(scores, dtype=torch.bool).scatter_(1, chosen, False)
        value = torch.where(others & scores.isfinite(), scores.float(), -torch.inf).t()[numbers]
        # By row and position first, so that the stable sort leaves equal scores in this order.
        order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), device=value.device)[:, None] * length
        order = (order + torch.arange(length, device=value.device)).flatten()
        best, place = value[:, order].sort(dim=1, descending=True, stable=True)
        most = max(self.wanted - counts[number] for number in numbers)
        copies: dict[int, torch.Tensor] = {}  # one for all experts, freed with the last candidate that holds it

        def fresh(values: list[float], tokens: list[int]) -> Iterator[Candidate]:
            for score, token in zip(values, tokens, strict=True):
                if score == -torch.inf:
                    return
                if token not in copies:
                    copies[token] = hidden[token].clone()
                yield Candidate((-score, rows[token // length], token % length), copies[token])

        found = zip(numbers, best[:, :most].tolist(), order[place[:, :most]].tolist(), strict=True)
        for number, values, tokens in found:
            ranked = merge(pools[number], fresh(values, tokens), key=itemgetter(0))
            pools[number] = list(islice(ranked, self.wanted - counts[number]))

    def ranks(self, experts: nn.Module) -> dict[int, list[Rank]]:
        """Expert number -> the ranks of its candidates, best first."""
        return {number: [candidate.rank for candidate in pool] for number, pool in self._pools.get(experts, {}).items()}

    def choose(
        self, experts: nn.Module, counts: Mapping[int, int], offers: Sequence[Mapping[int, Sequence[Rank]]], own: int
    ) -> tuple[dict[int, torch.Tensor], dict[int, int]]:
        """Chooses among the `offers` of all ranks (their `ranks`), of which the `own`-th is this rank's. `counts` are
        the tokens routed to each expert on all ranks. Returns by expert number the tokens to show here, [n, D] in order of
        row and position, and the number of tokens shown on all ranks."""
        shown, added = {}, {}
        for number, count in counts.items():
            best = sorted((rank, owner) for owner, offer in enumerate(offers) for rank in offer.get(number, ()))
            best = best[: max(self.wanted - count, 0)]
            if best:
                added[number] = len(best)
            mine = self._pools.get(experts, {}).get(number, [])[: sum(owner == own for _, owner in best)]
            if mine:
                mine.sort(key=lambda candidate: candidate.rank[1:])
                shown[number] = torch.stack([candidate.hidden for candidate in mine])
        return shown, added

    def is_unranked(self, experts: nn.Module) -> bool:
        """Whether an expert was short of tokens in a call in which no ranking chose the experts."""
        return experts in self._unranked

    def forget(self, experts: nn.Module) -> None:
        """Drops the candidates of a module."""
        self._pools.pop(experts, None)
        self._unranked.discard(experts)

    def _scores(self, chosen: torch.Tensor, experts: int) -> torch.Tensor | None:
        """The scores [T, E], or more than E, from which the router chose `chosen` [T, k]; None if no ranking did."""
        for scores, indices in reversed(self._choices):
            # Scores of experts that return their input follow (LongCat-Flash).
            if scores.shape[:-1] != indices.shape[:-1] or scores.shape[-1] < experts:
                continue
            indices = indices.reshape(-1, indices.shape[-1])
            if indices.shape == chosen.shape and torch.equal(indices, chosen.to(indices.dtype)):
                return scores.reshape(-1, scores.shape[-1])
        return None
