"""What lies in an output, to be compared with that of another run."""

from __future__ import annotations

import json
from pathlib import Path

from verify.proof.statistics import PROVENANCE_NAME


def contents(output: Path, place: Path) -> dict[str, bytes]:
    """Every file below an output; the path of `place`, which stands in recipe.yaml and README.md, left out, and the times of
    provenance.json."""
    found = {}
    for path in sorted(output.rglob("*")):
        if path.is_file():
            raw = path.read_bytes().replace(str(place).encode(), b"")
            if path.name == PROVENANCE_NAME:
                raw = json.dumps(json.loads(raw) | {"times": None}).encode()
            found[str(path.relative_to(output))] = raw
    return found
