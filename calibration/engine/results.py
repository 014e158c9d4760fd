"""What a calibration run reports to its caller: each finished block, and the totals at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from calibration.engine.smoothing import Factors
from calibration.runs.resume import Boundary


@dataclass
class BlockResult:
    """A calibrated block, valid during `on_block` only: its weights leave memory afterwards.

    `modules` maps source module names to the calibrated linear layers with their scales as parameters; `block` counts
    from 0 and is None for the modules before the first block; modules after the last block come with the last block.
    `tokens_per_expert` counts the tokens routed to each expert, `topped_up` those it was shown beyond them.
    `factors` are those that smoothing multiplied each source module by, in `modules` or outside. `parity` is the largest
    absolute difference to the model's own forward. Times in seconds; `peak_rss` in bytes of anonymous memory, the
    highest sample of this block.
    """

    block: int | None
    blocks: int
    name: str
    modules: dict[str, nn.Module]
    factors: dict[str, Factors]
    tokens_per_expert: dict[int, int]
    topped_up: dict[int, int]
    filled_experts: list[int]
    rounded_to_nearest: list[str]
    parity: float
    seconds: float
    peak_rss: int

    def facts(self) -> dict[str, Any]:
        """What the run's summary needs of this block, as JSON; `CalibrationSummary.take` reads it."""
        return {
            "modules": len(self.modules),
            "tokens_per_expert": {str(expert): count for expert, count in self.tokens_per_expert.items()},
            "topped_up": {str(expert): count for expert, count in self.topped_up.items()},
            "filled_experts": self.filled_experts,
            "rounded_to_nearest": self.rounded_to_nearest,
            "parity": self.parity,
            "peak_rss": self.peak_rss,
        }


@dataclass
class Callbacks:
    """The functions through which a run reports to its caller. `on_block` receives each finished block with its
    weights. `on_finished` follows with the block's number, its `BlockResult.facts` (None if the block was finished
    before and only its outputs were computed again) and the saved activations that enter the next block; after it
    returns, the previous activations are removed. `on_progress` receives small JSON-ready facts, with `event` one of
    trace, load, batch, block, log. If `should_stop` returns true, the run ends after the block with Interrupted."""

    on_block: Callable[[BlockResult], None]
    on_progress: Callable[[dict[str, Any]], None] = lambda event: None
    on_finished: Callable[[int, dict[str, Any] | None, Boundary | None], None] = lambda block, facts, boundary: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass
class CalibrationSummary:
    """The totals of a run; `tokens_per_expert` and `topped_up` by block and expert, `parity` by block."""

    blocks: int = 0
    batches: int = 0
    modules: int = 0
    tokens_per_expert: dict[int, dict[int, int]] = field(default_factory=dict)
    topped_up: dict[int, dict[int, int]] = field(default_factory=dict)
    filled_experts: dict[int, list[int]] = field(default_factory=dict)
    rounded_to_nearest: list[str] = field(default_factory=list)
    parity: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss: int = 0

    def take(self, block: int, facts: dict[str, Any]) -> None:
        """Adds one block, from its `BlockResult.facts`; a journal may lack some of them."""
        facts = {"modules": 0, "peak_rss": 0, "rounded_to_nearest": [], "parity": 0.0, "tokens_per_expert": {},
                 "topped_up": {}, "filled_experts": [], **facts}  # fmt: skip
        self.peak_rss = max(self.peak_rss, facts["peak_rss"])
        self.modules += facts["modules"]
        self.rounded_to_nearest += facts["rounded_to_nearest"]
        self.parity[block] = facts["parity"]
        if facts["tokens_per_expert"]:
            self.tokens_per_expert[block] = {int(e): count for e, count in facts["tokens_per_expert"].items()}
        if facts["topped_up"]:
            self.topped_up[block] = {int(e): count for e, count in facts["topped_up"].items()}
        if facts["filled_experts"]:
            self.filled_experts[block] = facts["filled_experts"]
