"""What a script imports of `calibration.data`."""

from __future__ import annotations

import subprocess
import sys

import calibration.data
from calibration.data import batches


def test_a_script_finds_its_functions_and_pays_for_torch_when_it_asks() -> None:
    assert calibration.data.load_batches is batches.load_batches
    assert calibration.data.load_tokenizer is batches.load_tokenizer
    assert not hasattr(calibration.data, "load_nothing")
    program = "import sys, calibration.data; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
