"""Verdicts, process handling and the worker's own arithmetic; the engine itself is in tests/integration."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.errors import EnvironmentProblem
from recipes.schema import Require, Serving
from verify import serving, vllm_worker

NVFP4_CONFIG = {
    "quantization_config": {
        "config_groups": {
            "experts": {
                "weights": {"num_bits": 4, "type": "float"},
                "input_activations": {"num_bits": 4, "type": "float"},
            }
        }
    }
}


def finished(**changes: Any) -> dict[str, Any]:
    """A worker's result in which everything went well."""
    layer = {
        "kind": "experts", "cls": "RoutedExperts", "method": "M", "scheme": "", "kernel": "MARLIN", "format": "nvfp4",
        "activations_quantized": True, "count": 2, "example": "e",
    }  # fmt: skip
    prompt = {
        "kind": "short", "tokens": 5, "nll": 2.0, "perplexity": 7.39, "text": "x", "sample_ids": [1], "sample": "y",
        "skipped": None,
    }  # fmt: skip
    return {
        "ok": True, "stage": "done", "error": None, "exit_code": 0, "timed_out": False, "log": "L",
        "engine": {"version": "0.32.0", "platform": "cpu", "dtype": "bfloat16"},
        "load": {"seconds": 1.0, "tensors": 9, "missing": [], "missing_total": 0},
        "layers": [layer], "w4a4": True, "prompts": [prompt], "perplexity": 7.39, "nonfinite": None,
    } | changes  # fmt: skip


def verdicts(result: dict[str, Any], config: dict[str, Any] = NVFP4_CONFIG, **require: Any) -> dict[str, str]:
    options = Serving(require=Require(**require))
    return {check.id.split(".")[1]: check.verdict for check in serving.judge(result, options, config, ["last line"])}


def test_a_good_run_passes_everything() -> None:
    assert set(verdicts(finished()).values()) == {"PASS"}
    assert "w4a4" in verdicts(finished()) and "w4a4" not in verdicts(finished(), config={})


@pytest.mark.parametrize(("w4a4", "verdict"), [(True, "PASS"), (False, "UNCHECKED"), (None, "UNCHECKED")])
def test_weight_only_kernels_leave_w4a4_unchecked(w4a4: bool | None, verdict: str) -> None:
    assert verdicts(finished(w4a4=w4a4))["w4a4"] == verdict


def test_an_engine_that_runs_no_nvfp4_layer_fails_an_nvfp4_checkpoint() -> None:
    assert (
        verdicts(finished(w4a4=None, layers=finished()["layers"] and [{**finished()["layers"][0], "format": ""}]))[
            "w4a4"
        ]
        == "FAIL"
    )


def test_nan_fails_unless_the_recipe_tolerates_it() -> None:
    bad = finished(nonfinite={"module": "model.layers.0", "cls": "C", "kind": "short", "values": 3})
    assert verdicts(bad)["finite"] == "FAIL"
    assert verdicts(bad, finite=False)["finite"] == "WARN"
    nan = finished(prompts=[{**finished()["prompts"][0], "nll": "nan"}])
    assert verdicts(nan)["logprobs"] == "FAIL"


def test_perplexity_is_judged_only_when_asked() -> None:
    assert "perplexity" not in verdicts(finished())
    assert verdicts(finished(), max_perplexity=8)["perplexity"] == "PASS"
    assert verdicts(finished(), max_perplexity=7)["perplexity"] == "FAIL"
    assert verdicts(finished(perplexity="inf"), max_perplexity=7)["perplexity"] == "FAIL"
    assert verdicts(finished(perplexity=None), max_perplexity=7)["perplexity"] == "UNCHECKED"


def test_what_was_not_reached_is_unchecked() -> None:
    crashed = finished(ok=False, stage="load", exit_code=-9, layers=[], w4a4=None, prompts=[], perplexity=None)
    found = {c.id.split(".")[1]: c for c in serving.judge(crashed, Serving(), NVFP4_CONFIG, ["last line"])}
    assert found.pop("load").verdict == "FAIL"
    assert {c.verdict for c in found.values()} == {"UNCHECKED"}
    text = serving.judge(crashed, Serving(), NVFP4_CONFIG, ["last line"])[0].figure
    assert "SIGKILL" in text and "out of memory" in text and "last line" in text

    in_forward = finished(ok=False, stage="forward", exit_code=-11, prompts=[])
    assert verdicts(in_forward)["load"] == "PASS" and verdicts(in_forward)["logprobs"] == "FAIL"
    assert verdicts(in_forward)["generate"] == "UNCHECKED" and verdicts(in_forward)["finite"] == "UNCHECKED"


def test_a_prompt_without_a_sample_fails() -> None:
    prompt = finished()["prompts"][0]
    assert verdicts(finished(prompts=[prompt, {**prompt, "sample_ids": []}]))["generate"] == "FAIL"
    skipped = {**prompt, "sample_ids": [], "nll": None, "tokens": 0, "skipped": "no chat template"}
    assert verdicts(finished(prompts=[prompt, skipped]))["generate"] == "PASS"


def test_a_missing_interpreter_or_one_without_vllm_names_the_remedy(tmp_path: Path) -> None:
    absent = str(tmp_path / "no" / "python")
    for python in (absent, sys.executable):
        with pytest.raises(EnvironmentProblem, match="make venv-vllm") as caught:
            serving.check_environment(python)
        assert python in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EnvironmentProblem, match="no such interpreter"):
        serving.verify_serving(tmp_path, Serving(python=absent), tmp_path / "logs")
    with pytest.raises(EnvironmentProblem, match="vLLM cannot be imported"):
        serving.verify_serving(tmp_path, Serving(python=sys.executable), tmp_path / "logs")


def test_time_out_kills_the_whole_process_group(tmp_path: Path) -> None:
    child = "import os, subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    log = tmp_path / "log"
    _, timed_out = serving._run([sys.executable, "-c", child], log, timeout=2.0)
    assert timed_out
    pid = int(log.read_text())
    deadline = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < deadline, "the engine's child outlived the time-out"
        time.sleep(0.05)
    assert serving._run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log, timeout=60) == (-9, False)
    assert serving._run([sys.executable, "-c", "raise SystemExit(3)"], log, timeout=60) == (3, False)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def test_the_environment_does_not_leak_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = serving.environment()
    assert "PYTHONPATH" not in found and found["OMP_NUM_THREADS"] == "3"
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_kv_cache_grows_with_the_model() -> None:
    small = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 32, "num_attention_heads": 4}
    assert serving.kv_cache_bytes(small, 512) == 64 << 20
    assert (
        serving.kv_cache_bytes(small | {"num_hidden_layers": 80, "head_dim": 128}, 4096) == 2 * 4096 * 80 * 2 * 256 * 4
    )


@pytest.mark.parametrize(
    ("kernel", "use_a16", "expected"),
    [
        ("CpuNvFp4LinearKernel", False, True),
        ("CPU_EMULATION", False, True),
        ("VLLM_CUTLASS", False, True),
        ("MarlinNvFp4LinearKernel", False, False),
        ("FlashInferCuteDslNvFp4W4A16LinearKernel", False, False),
        ("FLASHINFER_TRTLLM TrtLlmNvFp4Experts", True, False),
        ("SomethingNew", False, None),
    ],
)
def test_kernels_that_quantize_activations(kernel: str, use_a16: bool, expected: bool | None) -> None:
    assert vllm_worker.quantizes(kernel, use_a16) is expected


def test_sentinels_find_what_was_not_written() -> None:
    written = torch.arange(64, dtype=torch.float32).reshape(4, 16)
    assert vllm_worker.unwritten("w", written) is None
    half = written.clone()
    half[2] = float("nan")
    assert vllm_worker.unwritten("w", half) == {"name": "w", "share": 0.25, "where": "index 2 of dimension 0"}

    packed = torch.randint(0, 256, (4, 3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed[0, 0, :8] = 0x5A  # data may hold the sentinel byte
    assert vllm_worker.unwritten("p", packed) is None
    packed[1, 2] = 0x5A
    found = vllm_worker.unwritten("p", packed)
    assert found is not None and found["share"] == pytest.approx(1 / 12) and found["where"] == "index 1 of dimension 0"

    codes = torch.ones(2, 8).to(torch.float8_e4m3fn)
    assert vllm_worker.unwritten("s", codes) is None
    codes.view(torch.uint8)[1, 3] = 0x7F
    assert vllm_worker.unwritten("s", codes) is not None
    table = torch.zeros(4, 2, dtype=torch.int32)
    assert vllm_worker.unwritten("t", table) is None
    table[3, 1] = 0x5A5A5A5A
    assert vllm_worker.unwritten("t", table) is not None


def test_results_are_strict_json_and_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    vllm_worker.write_json(path, {"a": [float("nan"), float("inf"), 1.5], "b": (1,)})
    assert json.loads(path.read_text()) == {"a": ["nan", "inf", 1.5], "b": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert vllm_worker.main(str(tmp_path / "absent.json"), str(path)) == 1
    failed = json.loads(path.read_text())
    assert failed["ok"] is False and failed["stage"] == "request" and failed["error"]["type"] == "FileNotFoundError"
    assert set(failed) >= {"engine", "load", "layers", "w4a4", "prompts", "nonfinite", "seconds", "peak_rss_bytes"}
