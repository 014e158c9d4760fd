"""What a verification knows besides the checkpoint itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.plan.plan import Plan


@dataclass(frozen=True)
class Known:
    """What is known about a checkpoint; all fields are empty if only its directory is given. `plan` was to be executed
    on `source`; `digests` are those with which the run wrote the shards: shard -> sha256 hex or
    `crc32:<hex>:<bytes>`."""

    plan: Plan | None = None
    source: Formats | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def original(self) -> Checkpoint | None:
        """The source's files, if there is a source."""
        return self.source.checkpoint if self.source is not None else None
