"""torchvision in vLLM's environment: imported, and without its compiled part its operators raise."""

from __future__ import annotations

import json
import subprocess

from tests.reference.engine import VLLM_PYTHON
from verify.serving.engine import WORKER, environment

SCRIPT = """
import ctypes, importlib.util, json, runpy, sys
from pathlib import Path
import torch

def raised(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

compiled = Path(importlib.util.find_spec("torchvision").origin).with_name("_C.so")
declare = runpy.run_path(sys.argv[1])["declare"]
said = {"compiled": raised(lambda: ctypes.CDLL(str(compiled))), "left_out": declare(), "again": declare()}
from torchvision import ops
boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
said |= {
    "nms": raised(lambda: ops.nms(boxes, scores, 0.5)),
    "operator": raised(lambda: torch.ops.torchvision.nms(boxes, scores, 0.5)),
}
print(json.dumps(said))
"""


def test_torchvision_is_imported_and_says_what_it_lacks() -> None:
    path = str(WORKER.with_name("torchvision_operators.py"))
    done = subprocess.run(
        [VLLM_PYTHON, "-c", SCRIPT, path], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["left_out"] == said["again"]
    if said["compiled"] is None:
        assert said == {key: None if key not in ("left_out", "again") else [] for key in said}
    else:
        assert "libc10_cuda" in said["compiled"] and len(said["left_out"]) == 1
        assert "Couldn't load custom C++ ops" in said["nms"]
        assert said["operator"].startswith("NotImplementedError: Could not run 'torchvision::nms'")
