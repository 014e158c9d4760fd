"""What a verification knows beside the checkpoint itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.plan.plan import Plan


@dataclass(frozen=True)
class Known:
    """Nothing, if a directory comes alone. `plan` is what had to be done to `source`, `digests` those of the shards as the
    run wrote them: shard -> sha256 hex or `crc32:<hex>:<bytes>`."""

    plan: Plan | None = None
    source: Formats | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def original(self) -> Checkpoint | None:
        """The source's files, if there is a source."""
        return self.source.checkpoint if self.source is not None else None
