"""What would fail in the morning fails in the evening: before the first block, in one message, with nothing in the output."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from calibration.runs.journal import RunDirectory
from tests.integration.interrupted_runs import start
from tests.integration.mornings import BROKEN, MORNINGS, long_night, sound_source
from tests.integration.whole_runs import LINEAR

SECONDS = 900  # vLLM starts in 20 s on an idle machine


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if morning.serves else ()) for name, morning in MORNINGS.items()]
)
def test_fails_in_the_evening(name: str, tmp_path: Path) -> None:
    morning, recipe, log = MORNINGS[name], tmp_path / "recipe.yaml", tmp_path / "log"
    source = sound_source(tmp_path / "source", morning)
    body = {
        "source": {"checkpoint": str(source)},
        "output": str(tmp_path / "output"),
        "modifiers": [{"QuantizationModifier": {"targets": LINEAR, "scheme": "NVFP4"}}],
        "calibration": {"dataset": "bundled", "num_samples": 4, "max_seq_length": 64},
        "verify": {"fidelity": False},
    }
    recipe.write_text(yaml.safe_dump(body | morning.make(source, tmp_path / "output")))
    process = start([str(recipe)], log, long_night)
    process.join(SECONDS)
    text = log.read_text()
    assert process.exitcode == morning.code, text
    said = text[text.index("error: ") :]
    assert all(part in said for part in morning.said), said
    assert "Traceback" not in text
    assert ("dress rehearsal: " in said) == (morning.code == BROKEN), said
    run = RunDirectory(tmp_path / "output")
    assert not (tmp_path / "output").exists() and not run.facts()
    assert not [event for event in run.events() if event["event"] == "stage_started" and event["stage"] == "calibrate"]
    assert not list(run.path.glob("miniature*"))


def test_the_table_in_docs_lists_every_morning() -> None:
    text = (Path(__file__).parents[2] / "docs" / "overnight.md").read_text()
    assert [name for name in MORNINGS if f"| {name} |" not in text] == []
