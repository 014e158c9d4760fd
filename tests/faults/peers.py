"""What plain vLLM, or plain transformers with compressed-tensors, says of each checkpoint: run by `python -m tests.faults`.

    PYTHON peers.py vllm|transformers REQUEST.json RESULT.json

Runs in the peer's own interpreter. The peer is imported once and forked for every checkpoint. Plain vLLM means: our
emulation of NVFP4 kernels, without which it has none on a CPU, and no sentinel, no hooks, no prompts of ours. REQUEST:
[[name, directory]]; RESULT: name -> {outcome: runs | raises | dies | hangs, message, warnings, text}.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

SECONDS = 300.0
PROMPT = list(range(7, 27))


def vllm(directory: str) -> str:
    """Loads and generates; the text."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "verify" / "inside_vllm"))
    import worker

    request = {
        "checkpoint": directory, "dtype": "bfloat16", "max_model_len": 256, "prompts": [{}], "trust_remote_code": False,
        "seed": 0, "kv_cache_bytes": 64 << 20, "moe_input_scales": "stored",
    }  # fmt: skip
    _, engine = worker.import_engine(request)
    llm = worker.build_engine(engine, request, on_cpu=True)
    sampling = engine.SamplingParams(max_tokens=8, temperature=0.0)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return str(list(output.outputs[0].token_ids))


def transformers(directory: str) -> str:
    """Loads; keys that the loading report names count as a warning. No generation: of DeepSeek-V4 with FP8 attention it
    can run none, and of experts in NVFP4 it drops the global scales."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, output_loading_info=True)
    for kind, keys in sorted(info.items()):
        for key in sorted(map(str, keys)):
            print(f"WARNING {kind} {key}")
    return type(model).__name__


def preload(peer: str) -> None:
    """Imports what every child needs."""
    if peer == "vllm":
        torchvision = Path(__file__).parents[2] / "verify" / "inside_vllm" / "torchvision_operators.py"
        runpy.run_path(str(torchvision))["declare"]()
        import vllm.entrypoints.llm
        import vllm.model_executor.models.registry  # noqa: F401
    else:
        import compressed_tensors
        import torch
        import transformers.integrations.compressed_tensors  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

        torch.set_num_threads(1)
        assert compressed_tensors


def version(peer: str) -> str:
    """The peer's version; vLLM's CPU build is a distribution of another name."""
    try:
        return installed(peer)
    except PackageNotFoundError:
        return installed(f"{peer}-cpu")


def ask(run: Callable[[str], str], directory: str, log: Path) -> dict[str, Any]:
    """Forks, runs, and reads what the child wrote and logged."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            found = {"outcome": "runs", "message": "", "text": run(directory)}
        except BaseException as error:
            traceback.print_exc()
            found = {"outcome": "raises", "message": f"{type(error).__name__}: {error}", "text": ""}
        answer.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)
    began = time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > SECONDS:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return {"outcome": "hangs", "message": f"after {SECONDS:.0f} s", "text": "", "warnings": []}
        time.sleep(0.05)
    found = {"outcome": "dies", "message": "", "text": ""}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(answer.read_text())
    lines = log.read_text(errors="replace").splitlines()
    warned = {
        re.sub(r"^.*?(WARNING|ERROR)\s*(\d\d-\d\d \S+ )?", "", line)
        for line in lines
        if re.search("WARNING|ERROR", line)
    }
    return found | {"warnings": sorted(line.replace(directory, "DIRECTORY") for line in warned)}


def main(peer: str, request: str, result: str) -> None:
    """Asks about every checkpoint of the request."""
    run = {"vllm": vllm, "transformers": transformers}[peer]
    preload(peer)
    found: dict[str, dict[str, Any]] = {"version": {"text": version(peer)}}
    if Path(result).exists():
        found |= json.loads(Path(result).read_text())
    for name, directory in json.loads(Path(request).read_text()):
        if name in found:
            continue
        found[name] = ask(run, directory, Path(f"{result}.now.log"))
        Path(result).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
