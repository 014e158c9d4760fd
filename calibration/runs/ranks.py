"""The interface of a run's ranks: batches of each rank, collectives, and how all of them end together.

Each rank calibrates every world-size-th batch; the extremes that observers saw are reduced over all ranks, so that the
scales equal those of a single rank, bit for bit. Each rank observes and packs the weights it owns; rank 0 alone writes.
Without torchrun there is one rank, and these methods do nothing; with torchrun see `calibration.runs.torchrun`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from recipes.errors import WorkflowError

T = TypeVar("T")
#: Seconds that the others wait for a living rank: longer than its part of the slowest block takes.
PATIENCE = 24 * 3600.0


@dataclass(frozen=True)
class Failure:
    """Why a run ends: reported by the rank that failed, or found by another rank if that one is `lost`."""

    rank: int
    exit_code: int
    problems: list[str]
    lost: bool = False


class Ended(WorkflowError):
    """The error that all ranks of a run end with."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.problems)
        self.exit_code = failure.exit_code


class Ranks:
    """The only rank of a run without torchrun; `torchrun.connect` returns the ranks of a run with it."""

    rank, size = 0, 1
    #: What ended the run, as soon as this rank knows of it.
    failure: Failure | None = None

    @property
    def writes(self) -> bool:
        """Whether this rank writes shards, journal and events and talks to the operator."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank reports to the operator how the run ended: rank 0, or the first one still alive."""
        return True

    @property
    def local(self) -> int:
        """How many ranks share this host's memory."""
        return 1

    @property
    def device(self) -> torch.device | None:
        """The accelerator of this rank; None leaves the choice to torch."""
        return None

    def owns(self, batch: int) -> bool:
        """Whether the `batch`-th batch of the run (from 0) is this rank's."""
        return batch % self.size == self.rank

    def start(self) -> None:
        """Opens the channel for tensors, all ranks together. Raises EnvironmentProblem if a rank has no device."""

    def stop(self) -> None:
        """Closes the channel, all ranks together."""

    def all_gather(self, what: str, value: T, patience: float = PATIENCE) -> list[T]:
        """The values of all ranks, in rank order. Raises EnvironmentProblem that names `what` and the late ranks after
        `patience` seconds."""
        return [value]

    def any(self, what: str, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return any(self.all_gather(what, flag))

    def all_reduce_min(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` (on this rank's device) by the minimum over all ranks, element by element."""

    def all_reduce_sum(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` (integers, on this rank's device) by the sum over all ranks, element by element."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replaces `tensor` by that of rank `source`, of the same shape and dtype."""

    def send(self, tensor: torch.Tensor, target: int = 0) -> None:
        """Sends a tensor to rank `target`, which calls `receive` with its shape and dtype."""
        raise NotImplementedError

    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor that rank `source` sends next."""
        raise NotImplementedError

    def failing(self) -> bool:
        """Whether another rank has failed, so that this one has nothing left to finish."""
        return False

    def agree(self, error: WorkflowError) -> WorkflowError:
        """Publishes that this rank ends with `error`. Returns the error that all ranks end with: the one that was
        published first."""
        return error

    def end(self) -> None:
        """Ends this rank's part; after a failure it first waits until every other rank knows of it."""
