"""The smallest recipe that quantizes, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MODULES = {"targets": ["re:.*proj$"], "scheme": "NVFP4"}


def write(directory: Path, modifier: dict[str, Any] = MODULES, **sections: Any) -> Path:
    body = {
        "source": {"checkpoint": "models/source"}, "output": "models/output", "calibration": {"dataset": "bundled"},
        "modifiers": [{"QuantizationModifier": modifier}],
    }  # fmt: skip
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(body | sections))
    return path
