"""Sources in other libraries' stored forms, from the recipe to the checkpoint that the real vLLM serves beside its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.converted import LINEAR
from tests.integration.whole_runs import SERVING, run, write_recipe
from tests.models import stored_forms
from tests.reference.engine import PROCESSOR

COMPARED = {"serving": SERVING | {"text": "bundled", "windows": 2, "compare": "auto"}}
CASES: dict[str, dict[str, Any]] = {
    "fp8_channel": {},
    "int4": {},
    "nvfp4_modelopt": {"method": "convert", "calibration": None},
}


@pytest.mark.parametrize("form", CASES)
def test_a_stored_form_is_quantized_and_served_beside_its_source(form: str, tmp_path: Path) -> None:
    source = stored_forms.write(tmp_path / "source", "llama", form)
    sections = {key: value for key, value in CASES[form].items() if value is not None}
    recipe = write_recipe(tmp_path, source, LINEAR, verify=COMPARED, **sections)
    done = run(recipe, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdicts"]["structure"] == "PASS"
    checks = {c["id"]: c for c in json.loads((tmp_path / "output.run" / "verify.json").read_text())["checks"]}
    # modelopt's input scales are carried as they are, and those of this source are made up.
    doubtful = {"fidelity.input_scales"} if form == "nvfp4_modelopt" else set()
    fidelity = {id for id, c in checks.items() if id.startswith("fidelity.") and c["verdict"] != "PASS"}
    assert fidelity == doubtful and not [c for c in checks.values() if c["verdict"] == "FAIL"]
    assert checks["serving.source"]["verdict"] == "PASS" and checks["serving.w4a4"]["verdict"] == "PASS"
    result_of_engine = json.loads((tmp_path / "output.run" / "serving.json").read_text())
    told = result_of_engine["engine"]["processor"]
    has_amx = torch.cpu._is_amx_tile_supported()
    assert told["amx"] == ("hidden" if PROCESSOR.get("amx", has_amx) != has_amx else "yes" if has_amx else "no")
    served = result_of_engine["source"]
    # Random weights: 4-bit activations move the distributions, and not far.
    assert served["ok"] and 0 < served["agreement"]["kl"] < 0.5 and served["agreement"]["top1"] > 0.3
    print(form, served["agreement"], result["samples"][0])
