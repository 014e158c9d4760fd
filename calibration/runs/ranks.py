"""The ranks of one run: what each of them takes, what they agree on, and how they end together.

Each rank calibrates every world-size-th batch; the extremes that observers saw are reduced over all ranks, so scales
are those of one rank, bit for bit. Weights are observed and packed in shares; rank 0 alone writes. Without torchrun
there is one rank, and nothing here does anything; with it, see `calibration.runs.torchrun`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from recipes.errors import WorkflowError

T = TypeVar("T")
#: Seconds that a living rank may let the others wait for it: its share of the slowest block.
PATIENCE = 24 * 3600.0


@dataclass(frozen=True)
class Failure:
    """What ends a run: told by the rank that failed, or found by another where that one is `lost`."""

    rank: int
    exit_code: int
    problems: list[str]
    lost: bool = False


class Ended(WorkflowError):
    """How all ranks of a run end."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.problems)
        self.exit_code = failure.exit_code


class Ranks:
    """The only rank of a run without torchrun; `torchrun.connect` gives the ranks of one with it."""

    rank, size = 0, 1
    #: What ended the run, once this rank knows of it.
    failure: Failure | None = None

    @property
    def writes(self) -> bool:
        """Whether this rank writes shards, journal and events and talks to the operator."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank tells the operator how the run ended: rank 0, or the first that is left."""
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
        """Opens the channel for tensors, all ranks together. Raises EnvironmentProblem where a rank has no device."""

    def stop(self) -> None:
        """Closes the channel, all ranks together."""

    def exchange(self, what: str, value: T, patience: float = PATIENCE) -> list[T]:
        """The values of all ranks in their order. EnvironmentProblem naming `what` and who is late after `patience` s."""
        return [value]

    def any(self, what: str, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.exchange(what, flag))

    def least(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` (on this rank's device) by the minimum over all ranks, element by element."""

    def send(self, tensor: torch.Tensor) -> None:
        """Sends a tensor to rank 0, which calls `receive` with its shape and dtype."""
        raise NotImplementedError

    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What rank `source` sends next."""
        raise NotImplementedError

    def failing(self) -> bool:
        """Whether another rank has failed, so that there is nothing left to finish."""
        return False

    def agree(self, error: WorkflowError) -> WorkflowError:
        """Tells all ranks that this one ends with `error`. Returns what all of them end with: the first error told."""
        return error

    def leave(self) -> None:
        """Ends this rank's part; after a failure it waits until every other rank knows of it."""
