"""What vLLM accepts in silence or dies of, and the verdict that comes out: the real engine on damaged checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calibration.checkpoint.files import read_json_or_none
from tests.models import standard
from tests.reference.engine import FORKED_PYTHON, VLLM_PYTHON, random_prompts, serve
from tests.reference.rtn import load, write_nvfp4
from verify.serving import serving

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight_packed"
SCALE = "model.layers.0.self_attn.o_proj.input_global_scale"
GATE_UP = r"model\.layers\.1\.mlp\.experts\.\d+\.(gate|up)_proj\.input_global_scale"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3_moe")
    standard.write(directory / "source", "qwen3_moe")
    write_nvfp4(directory / "source", directory / "output", r"layers\.\d+\..*_proj$", [r"re:.*layers.*_proj$"])
    return directory / "output"


def variant(checkpoint: Path, directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of the checkpoint with other tensors; everything else is linked."""
    directory.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            os.link(path, directory / path.name)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_missing_tensors_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """vLLM loads all three in silence; the sentinel names each parameter and, in a stack of experts, the expert."""
    tensors = load(checkpoint)
    for name in (EXPERT, SCALE, NORM):
        del tensors[name]
    checks, result, _, _ = serve(variant(checkpoint, tmp_path / "damaged", tensors), tmp_path, random_prompts(1024))
    assert checks["serving.load"].verdict == "PASS"
    found = checks["serving.tensors"]
    assert found.verdict == "FAIL" and found.figure.startswith("3 left"), found
    missing = {entry["name"]: entry for entry in result["load"]["missing"]}
    assert set(missing) == {
        "model.layers.1.mlp.experts.routed_experts.w13_weight_packed",
        "model.layers.0.self_attn.o_proj.input_global_scale",
        "model.layers.2.input_layernorm.weight",
    }
    assert missing[NORM]["share"] == 1.0
    packed = missing["model.layers.1.mlp.experts.routed_experts.w13_weight_packed"]
    assert packed["share"] == pytest.approx(1 / 16) and packed["where"].startswith("index 3 ")
    assert {checks[name].verdict for name in ("serving.finite", "serving.logprobs", "serving.generate")} == {
        "UNCHECKED"
    }


def test_infinity_is_traced_to_its_module(checkpoint: Path, tmp_path: Path) -> None:
    """Every value in the file is finite; what the engine makes of them is not."""
    tensors = load(checkpoint)
    tensors[SCALE.replace("input_global_scale", "weight_global_scale")] = torch.tensor([2e-38])
    checks, result, _, _ = serve(
        variant(checkpoint, tmp_path / "damaged", tensors), tmp_path, random_prompts(1024, (5,))
    )
    assert checks["serving.tensors"].verdict == "PASS"
    assert checks["serving.finite"].verdict == "FAIL"
    assert result["nonfinite"]["module"] == "model.layers.0.self_attn.o_proj"
    assert checks["serving.logprobs"].verdict == "FAIL"


def test_inputs_beyond_what_their_scale_admits_are_traced_to_their_layer(checkpoint: Path, tmp_path: Path) -> None:
    """The scales of one linear layer and of one block's experts admit an eighth of what they did: 1, where 8 was."""
    prompts = random_prompts(1024, (40,))
    good, result, _, _ = serve(checkpoint, tmp_path, prompts)
    watched = result["given_inputs"]
    assert good["serving.saturated_inputs"].verdict == "PASS" and watched["not_looked_at"] == {}, watched
    nvfp4 = [entry for entry in result["layers"] if entry["format"] == "nvfp4"]
    assert {entry["kind"] for entry in nvfp4} == {"linear", "experts"}
    assert watched["layers"] == sum(entry["count"] for entry in nvfp4)

    tensors = load(checkpoint)
    tensors |= {name: scale * 8 for name, scale in tensors.items() if re.fullmatch(f"{SCALE}|{GATE_UP}", name)}
    checks, result, _, _ = serve(variant(checkpoint, tmp_path / "damaged", tensors), tmp_path, prompts)
    found, (experts, linear, *others) = checks["serving.saturated_inputs"], result["given_inputs"]["worst"]
    assert found.verdict == "FAIL" and found.figure.startswith("2 of 9 layers"), found
    assert experts["module"] == "model.layers.1.mlp.experts.routed_experts" and experts["module"] in found.figure
    assert linear["module"] == "model.layers.0.self_attn.o_proj" and linear["module"] in found.figure
    # The norm's weights are about 1, so that its outputs are normal: a third of those lies beyond 1.
    assert experts["share"] == pytest.approx(0.317, abs=0.03) and 1e-3 < linear["share"] < 0.1, (experts, linear)
    assert [entry["admitted"] for entry in (experts, linear, *others)] == pytest.approx([1, 1, 8, 8, 8])
    assert {c.id for c in checks.values() if c.verdict not in ("PASS", "UNCHECKED")} == {found.id}, checks


def test_a_checkpoint_that_does_not_load_fails_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    damaged = variant(checkpoint, tmp_path / "damaged", load(checkpoint))
    shard = damaged / "model.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    checks, _, _, _ = serve(damaged, tmp_path, random_prompts(1024, (5,)))
    assert checks["serving.load"].verdict == "FAIL"
    assert "Safetensor" in checks["serving.load"].figure or "incomplete" in checks["serving.load"].figure
    assert {c.verdict for c in checks.values() if c.id != "serving.load"} == {"UNCHECKED"}


def test_a_chat_template_without_end_takes_neither_memory_nor_the_run(checkpoint: Path, tmp_path: Path) -> None:
    """vLLM renders the checkpoint's template when it starts, if it is not given another: here that took 3 GB more, and
    with a larger number the machine's memory."""
    hostile = variant(checkpoint, tmp_path / "hostile", load(checkpoint))
    config = hostile / "tokenizer_config.json"
    content = json.loads(config.read_text()) | {"chat_template": "{{ 'x' * (3 * 10**9) }}"}
    config.unlink()
    config.write_text(json.dumps(content))
    chat = {"kind": "chat", "messages": [{"role": "user", "content": "Hello"}]}
    checks, result, _, _ = serve(hostile, tmp_path, [chat, *random_prompts(1024, (5,))])
    assert checks["serving.generate"].verdict == "PASS", checks
    assert result["prompts"][0]["skipped"] == "no chat template: the template takes more than 1024 MiB of memory"
    assert result["peak_rss_bytes"] < 3e9


@pytest.mark.parametrize(("python", "timeout"), [(VLLM_PYTHON, 1.0), (FORKED_PYTHON, 0.1)], ids=["process", "fork"])
def test_time_out_stops_the_engine(checkpoint: Path, tmp_path: Path, python: str, timeout: float) -> None:
    """Before it has served: a fork does that in a second."""
    checks, result, _, _ = serve(checkpoint, tmp_path, random_prompts(1024, (5,)), python=python, timeout=timeout)
    assert result["timed_out"] and result["seconds"]["wall"] < 30
    assert checks["serving.load"].verdict == "FAIL" and "time-out" in checks["serving.load"].figure
    assert {c.verdict for c in checks.values() if c.id != "serving.load"} == {"UNCHECKED"}
    assert json.loads((tmp_path / "serving-request.json").read_text())["checkpoint"] == str(checkpoint)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_or_crashed_engine_is_a_verdict(checkpoint: Path, tmp_path: Path, sent: signal.Signals) -> None:
    """The real worker process dies while it imports vLLM, as one that the kernel or a kernel's bug ends would."""
    killer = threading.Thread(target=_kill_worker, args=(tmp_path / "serving-result.json", sent))
    killer.start()
    checks, result, _, _ = serve(checkpoint, tmp_path, random_prompts(1024, (5,)), python=VLLM_PYTHON)
    killer.join()
    assert result["exit_code"] == -sent and not result["timed_out"]
    found = checks["serving.load"]
    assert found.verdict == "FAIL" and f"killed by {sent.name} in stage import" in found.figure
    assert "[vllm_worker] import" in found.figure and str(tmp_path / "serving.log") in found.figure
    assert {c.verdict for c in checks.values() if c.id != "serving.load"} == {"UNCHECKED"}


def _kill_worker(result: Path, sent: signal.Signals) -> None:
    """Sends the signal to the process whose command line names `result`, as soon as it is in stage import."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if (read_json_or_none(result) or {}).get("stage") != "import":
            continue
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(result).encode() in entry.read_bytes().split(b"\0"):
                    os.kill(int(entry.parent.name), sent)
                    return


def test_no_memory_is_a_verdict(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's process may have 6 GB of address space (vLLM alone takes some 4) and asks for a cache of 16."""
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -v 6000000\nexec {VLLM_PYTHON} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(serving, "kv_cache_bytes", lambda config, length: 16 << 30)
    checks, result, _, _ = serve(checkpoint, tmp_path, random_prompts(1024, (5,)), python=str(limited))
    found = checks["serving.load"]
    assert found.verdict == "FAIL" and "stage load: out of memory" in found.figure, found
    assert result["exit_code"] == 1 and {c.verdict for c in checks.values() if c.id != "serving.load"} == {"UNCHECKED"}
