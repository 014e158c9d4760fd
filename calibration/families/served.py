"""What vLLM's own class of a model said once (`verify.serving.wants`), kept so that a plan needs no vLLM at hand: one row of
served.json a model type, with the vLLM release and the config that it was asked about. `python -m tests.served` writes it,
`tests/integration/test_wants.py` holds it against the installed vLLM."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

FILE = Path(__file__).with_name("served.json")
_REASON = "vLLM runs it unquantized"


class Served(BaseModel):
    """One row. `config` is the sha256 of config.json, `architecture` the class; names are those of a block, with N for
    every other number: `fused` leaves that are one matrix, `parents` that the class calls otherwise than the hub,
    `unquantized` linear layers for which it never looks up a quantization, or not under a name in a block (Falcon-H1's
    mamba: `model.<number of blocks + N>.mixer`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vllm: str
    config: str
    architecture: str
    fused: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[str, str], ...]
    unquantized: tuple[str, ...]

    @property
    def serving_parents(self) -> tuple[tuple[str, str], ...]:
        """The parents as pattern and replacement (`Family.serving_parents`)."""
        return tuple((rf"\.{re.escape(hub)}\.", f".{named}." if named else ".") for hub, named in self.parents)

    @property
    def never_quantized(self) -> tuple[tuple[str, str], ...]:
        """The unquantized layers as pattern and reason (`Family.never_quantized`)."""
        return tuple((rf"\.\d+\.{re.escape(name).replace('N', '[0-9]+')}$", _REASON) for name in self.unquantized)


@cache
def rows() -> dict[str, Served]:
    """Every row, by model type."""
    return {name: Served.model_validate(row) for name, row in json.loads(FILE.read_text()).items()}
