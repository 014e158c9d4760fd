"""Verdicts, process handling and the worker's own arithmetic; the engine itself is in tests/integration."""

from __future__ import annotations

import enum
import json
import math
import os
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.runtime import cache_dir_utils

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.convert import pipeline as convert
from calibration.plan.task import Task
from recipes.checks import Serving, Verify
from recipes.errors import EnvironmentProblem, RecipeError
from recipes.schema import Recipe
from tests.models import deepseek_v4, standard
from tests.unit.serving.results import NVFP4_CONFIG, UNREACHED, finished, judged, verdicts
from verify.__main__ import main
from verify.inside_vllm import prompts as vllm_prompts
from verify.inside_vllm import sentinel as vllm_sentinel
from verify.inside_vllm import watch as vllm_watch
from verify.inside_vllm import worker as vllm_worker
from verify.serving import engine, serving
from verify.serving.samples import complaint, repeated_tail
from workflows.run.plain_copy import source_to_serve


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
    assert "perplexity" not in verdicts(finished()) and "not judged" in judged(finished())["logprobs"].figure
    assert verdicts(finished(), max_perplexity=8)["perplexity"] == "PASS"
    assert verdicts(finished(), max_perplexity=7)["perplexity"] == "FAIL"
    assert verdicts(finished(perplexity="inf"), max_perplexity=7)["perplexity"] == "FAIL"
    assert verdicts(finished(perplexity=None), max_perplexity=7)["perplexity"] == "UNCHECKED"
    # The prompts' perplexity is not the text's.
    assert verdicts(finished(windows=[]), max_perplexity=8)["perplexity"] == "UNCHECKED"


def test_what_was_not_reached_is_unchecked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first line\n" * engine.TAIL + "last line\n")
    crashed = finished(
        ok=False, stage="load", exit_code=-9, log=str(log), source={"ok": False, "why": "not served"}, **UNREACHED
    )
    found = judged(crashed, NVFP4_CONFIG | {"num_experts": 8}, max_perplexity=8)
    text = found["load"].figure
    assert found.pop("load").verdict == "FAIL"
    assert {c.verdict for c in found.values()} == {"UNCHECKED"} and set(found) >= {"coherent", "source", "input_scales"}
    assert "SIGKILL" in text and "out of memory" in text and text.count("first line") == engine.TAIL - 1
    assert "last line" in text

    in_forward = finished(ok=False, stage="forward", exit_code=-11, prompts=[])
    assert verdicts(in_forward)["load"] == "PASS" and verdicts(in_forward)["logprobs"] == "FAIL"
    assert verdicts(in_forward)["generate"] == "UNCHECKED" and verdicts(in_forward)["finite"] == "UNCHECKED"


def test_a_model_that_vllm_does_not_have_for_this_machine_is_unchecked_not_failed() -> None:
    """DeepSeek-V4.1 in vLLM 0.32: nvidia and amd, no CPU."""
    message = (
        "vLLM 0.32.0 has no cpu variant of DeepseekV41ForCausalLM: vllm.models.deepseek_v41 is there for nvidia alone"
    )
    error = {"type": "NoVariant", "message": message, "traceback": []}
    result = finished(
        ok=False,
        stage="load",
        error=error,
        **UNREACHED,
    )
    checks = judged(result)
    assert {check.verdict for check in checks.values()} == {"UNCHECKED"}
    assert {check.figure for check in checks.values()} == {message}


ROUTER = [
    "  File cpu_router.py, in select_experts",
    '    assert self.scoring_func == "softmax"',
    "    ^^^^",
    "AssertionError",
]


CONVOLUTION = [
    '  File "mamba_mixer.py", line 289, in forward_impl',
    "    self.conv1d.weight.size(0), self.conv1d.weight.size(2)",
    "                                ^^^^^^^^^^^^^^^^^^^^^^^^^^",
    '  File "parameter.py", line 124, in __torch_function__',
    "    return super().__torch_function__(func, types, args, kwargs)",
    "           ^^^^^^^^",
    "IndexError: Dimension out of range",
]


def refused(type: str, message: str, traceback: list[str], **load: Any) -> dict[str, Any]:
    error = {"type": type, "message": message, "traceback": traceback}
    load = {"seconds": None, "tensors": 9, "missing": [], "missing_total": 0} | load
    return finished(
        ok=False,
        stage="load",
        error=error,
        load=load,
        **UNREACHED,
    )


@pytest.mark.parametrize(
    "error",
    [
        ("NotImplementedError", "Sparse Attention is not supported on CPU.", []),
        ("NotImplementedError", "is_act_and_mul=False is supported only for CUDA, XPU and ROCm for now", []),
        (
            "IndexError",
            "Dimension out of range",
            ["    self.conv1d.weight.size(0), self.conv1d.weight.size(2)", "", ""],
        ),
        ("AttributeError", "module 'triton' has no attribute 'set_allocator'", []),
        ("AttributeError", "'_OpNamespace' '_C' object has no attribute 'selective_scan_fwd'", []),
        ("AssertionError", "", ROUTER),
    ],
)
def test_what_vllm_has_for_gpus_only_is_unchecked_with_its_own_words(error: tuple[str, str, list[str]]) -> None:
    checks = judged(refused(*error))
    assert {check.verdict for check in checks.values()} == {"UNCHECKED"}
    assert all(
        re.search(
            "on a CPU it raises: (Sparse Att|is_act|assert self.scoring|self.conv1d|module 'triton'|'_C' object)",
            c.figure,
        )
        for c in checks.values()
    )


@pytest.mark.parametrize(
    "error",
    [
        ("AmbiguousGlobalPerLayerAttributeError", "'num_attention_heads' is a per-layer attribute and may vary"),
        ("AttributeError", "'Kimi_K25ImageProcessor' object has no attribute 'media_tokens_calculator'"),
    ],
)
def test_what_vllm_does_not_start_with_the_packages_there_is_unchecked(error: tuple[str, str]) -> None:
    checks = judged(refused(*error, []))
    assert {check.verdict for check in checks.values()} == {"UNCHECKED"}
    assert all("with the packages that are installed beside it" in check.figure for check in checks.values())


@pytest.mark.parametrize(
    "error",
    [
        ("NotImplementedError", "Sparse weights are not supported", []),
        ("AssertionError", "", ['    assert self.scoring_func == "sigmoid"', "AssertionError"]),
        (
            "ValueError",
            "no such shape",
            [*ROUTER, "During handling of the above:", "  a", "  b", "ValueError: no such shape"],
        ),
    ],
)
def test_every_other_error_of_the_engine_is_a_failure(error: tuple[str, str, list[str]]) -> None:
    assert judged(refused(*error))["load"].verdict == "FAIL"


def test_a_refusal_of_the_platform_hides_no_unwritten_parameter() -> None:
    missing = [{"name": "model.norm.weight", "share": 1.0, "where": ""}]
    checks = judged(refused("AssertionError", "", ROUTER, missing=missing, missing_total=1))
    assert (checks["tensors"].verdict, checks["load"].verdict) == ("FAIL", "UNCHECKED")


def test_a_prompt_without_a_sample_fails() -> None:
    prompt = finished()["prompts"][0]
    assert verdicts(finished(prompts=[prompt, {**prompt, "sample_ids": []}]))["generate"] == "FAIL"
    skipped = {**prompt, "sample_ids": [], "nll": None, "tokens": 0, "skipped": "no chat template"}
    assert verdicts(finished(prompts=[prompt, skipped]))["generate"] == "PASS"


def test_a_missing_interpreter_or_one_without_vllm_names_the_remedy(tmp_path: Path) -> None:
    absent = str(tmp_path / "no" / "python")
    for python in (absent, sys.executable):
        with pytest.raises(EnvironmentProblem, match="make venv-vllm") as caught:
            engine.check_environment(python)
        assert python in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EnvironmentProblem, match="no such interpreter"):
        serving.verify_serving(tmp_path, Serving(python=absent), tmp_path / "logs")
    with pytest.raises(EnvironmentProblem, match="vLLM cannot be imported"):
        serving.verify_serving(tmp_path, Serving(python=sys.executable), tmp_path / "logs")


def test_packages_that_do_not_fit_each_other_are_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    def failing(command: list[str], log: Path, timeout: float) -> tuple[int, bool]:
        error = {"type": "RuntimeError", "message": "operator torchvision::nms does not exist"}
        Path(command[3]).write_text(json.dumps({"ok": False, "stage": "import", "error": error}))
        return 1, False

    with pytest.raises(EnvironmentProblem, match=r"cannot be imported there.*torchvision::nms"):
        engine.run_engine({}, Serving(python=sys.executable), tmp_path, "serving", failing)


def test_time_out_kills_the_whole_process_group(tmp_path: Path) -> None:
    child = "import os, subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    log = tmp_path / "log"
    _, timed_out = engine.run_process([sys.executable, "-c", child], log, timeout=2.0)
    assert timed_out
    pid = int(log.read_text())
    deadline = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < deadline, "the engine's child outlived the time-out"
        time.sleep(0.05)
    assert engine.run_process([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log, timeout=60) == (
        -9,
        False,
    )
    assert engine.run_process([sys.executable, "-c", "raise SystemExit(3)"], log, timeout=60) == (3, False)


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
    found = engine.environment()
    assert "PYTHONPATH" not in found and found["OMP_NUM_THREADS"] == "3"
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_what_torch_compiles_for_one_processor_is_not_found_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    cache = engine.environment()["TORCHINDUCTOR_CACHE_DIR"]
    assert cache == engine.environment()["TORCHINDUCTOR_CACHE_DIR"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert engine.environment()["TORCHINDUCTOR_CACHE_DIR"] != cache
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache_dir_utils.default_cache_dir())  # as torch does in this process
    assert engine.environment()["TORCHINDUCTOR_CACHE_DIR"] == str(engine.compile_cache())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    assert engine.environment()["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"


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
    assert vllm_watch.quantizes(kernel, use_a16) is expected


def test_sentinels_find_what_was_not_written() -> None:
    written = torch.arange(64, dtype=torch.float32).reshape(4, 16)
    assert vllm_sentinel.unwritten("w", written) is None
    half = written.clone()
    half[2] = float("nan")
    assert vllm_sentinel.unwritten("w", half) == {"name": "w", "share": 0.25, "where": "index 2 of dimension 0"}

    packed = torch.randint(0, 256, (4, 3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed[0, 0, :8] = 0x5A  # data may hold the sentinel byte
    assert vllm_sentinel.unwritten("p", packed) is None
    packed[1, 2] = 0x5A
    found = vllm_sentinel.unwritten("p", packed)
    assert found is not None and found["share"] == pytest.approx(1 / 12) and found["where"] == "index 1 of dimension 0"

    codes = torch.ones(2, 8).to(torch.float8_e4m3fn)
    assert vllm_sentinel.unwritten("s", codes) is None
    codes.view(torch.uint8)[1, 3] = 0x7F
    assert vllm_sentinel.unwritten("s", codes) is not None
    table = torch.zeros(4, 2, dtype=torch.int32)
    assert vllm_sentinel.unwritten("t", table) is None
    table[3, 1] = 0x5A5A5A5A
    assert vllm_sentinel.unwritten("t", table) is not None


def test_results_are_strict_json_and_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    vllm_worker.write_json(path, {"a": [float("nan"), float("inf"), 1.5], "b": (1,)})
    assert json.loads(path.read_text()) == {"a": ["nan", "inf", 1.5], "b": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert vllm_worker.main(str(tmp_path / "absent.json"), str(path)) == 1
    failed = json.loads(path.read_text())
    assert failed["ok"] is False and failed["stage"] == "request" and failed["error"]["type"] == "FileNotFoundError"
    assert set(failed) >= {"engine", "load", "layers", "w4a4", "prompts", "nonfinite", "seconds", "peak_rss_bytes"}


def test_a_served_source_is_compared_and_a_figure_without_threshold_is_no_pass() -> None:
    agreement = {"tokens": 4088, "kl": 0.2, "top1": 0.8}
    source = {"ok": True, "agreement": agreement, "perplexity": 7.0, "nll_difference": 0.05, "nll_error": 0.01,
              "nonfinite": None}  # fmt: skip
    result = finished(source=source)
    assert verdicts(result)["source"] == "PASS"
    assert "+0.050 +- 0.010 nats" in judged(result)["source"].figure
    assert verdicts(result, max_kl=0.1)["source"] == "FAIL"
    assert verdicts(result, min_top1=0.9)["source"] == "FAIL"
    assert verdicts(result, max_kl=None, min_top1=0.7)["source"] == "PASS"
    better = finished(source=source, perplexity=10.0)  # 70 % kept
    assert verdicts(better, min_kept=0.71)["source"] == "FAIL" and verdicts(better, min_kept=0.7)["source"] == "PASS"
    assert verdicts(finished(source=source, perplexity="nan"), min_kept=0.1)["source"] == "FAIL"
    assert verdicts(result, max_kl=None)["source"] == "UNCHECKED"
    assert verdicts(finished(source=source | {"agreement": agreement | {"kl": "nan"}}))["source"] == "FAIL"
    broken = source | {"nonfinite": {"module": "m"}, "agreement": agreement | {"kl": "nan"}}
    assert verdicts(finished(source=broken))["source"] == "UNCHECKED"
    killed = {"ok": False, "stage": "load", "exit_code": -9, "agreement": None, "log": "L"}
    assert "SIGKILL" in judged(finished(source=killed))["source"].figure
    assert "source" not in verdicts(finished())


def test_input_scales_that_differ_warn_and_fail_where_one_mode_is_worse_than_allowed() -> None:
    scales = {"layers": 2, "experts": 16, "shared": 2, "mode": "stored", "other": None}
    assert "16 experts in 2 layers" in judged(finished(input_scales=scales))["input_scales"].figure
    assert verdicts(finished(input_scales=scales))["input_scales"] == "PASS"
    other = {"mode": "collapsed", "perplexity": 9.0, "tokens": 4, "kl": 0.1, "top1": 0.9}
    differ = finished(input_scales=scales | {"shared": 1, "other": other})
    assert verdicts(differ)["input_scales"] == "WARN" and "in 1 of 2 layers" in judged(differ)["input_scales"].figure
    assert verdicts(differ, max_perplexity=8)["input_scales"] == "FAIL"
    broken = finished(input_scales=scales | {"shared": 1, "other": other | {"perplexity": "nan"}})
    assert verdicts(broken)["input_scales"] == "FAIL"
    on_gpu = finished(input_scales=scales | {"shared": 1, "mode": "kernel"})
    assert verdicts(on_gpu)["input_scales"] == "UNCHECKED" and "MARLIN" in judged(on_gpu)["input_scales"].figure


@pytest.mark.parametrize(
    ("ids", "text", "expected"),
    [
        ([], "", "empty"),
        ([7, 8], " \n", "empty"),
        ([5] * 20, "a" * 20, "one token over and over for 20 of 20"),
        ([1, 2, 3, *[4, 5, 6] * 6], "x y z", "3 tokens over and over for 18 of 21"),
        ([*range(30), *[4, 5, 6] * 6], "x y z", None),  # the loop is the smaller part
        ([9] * 6, "------", None),  # too short to tell
        ([7, 7, 8] * 6 + [9], ",,-" * 6 + "x", "one token makes up 12 of 19"),
        (list(range(20)), "\ufffd\x13\ufffd abc", "43% unprintable characters"),
        (list(range(20)), "ab\ufffd", None),  # the last token cut a character
        (list(range(20)), "Tabs\tand lines\n are text.", None),
    ],
)
def test_samples_that_look_broken(ids: list[int], text: str, expected: str | None) -> None:
    assert complaint(ids, text, 0.5, 0.3, may_loop=False) == expected


def test_repeated_tails() -> None:
    assert repeated_tail([1, 2, 3, 4]) == (0, 0)
    assert repeated_tail([9, 1, 2, 1, 2, 1, 2]) == (2, 6)
    assert repeated_tail([2, 9, 1, 2, 1, 2, 1]) == (0, 0)  # two and a half times
    assert complaint([5] * 20, "a" * 20, 0.5, 0.3, may_loop=True) is None


def test_broken_samples_warn_fail_or_are_the_sources_own() -> None:
    loop = {**finished()["prompts"][0], "sample_ids": [5] * 20, "sample": "a" * 20}
    assert verdicts(finished(prompts=[loop]))["coherent"] == "WARN"
    assert verdicts(finished(prompts=[loop]), coherent=True)["coherent"] == "FAIL"
    assert verdicts(finished(prompts=[loop]), max_loop=1.0)["coherent"] == "PASS"
    for kind in ("repeated token", "single token"):
        assert verdicts(finished(prompts=[{**loop, "kind": kind}]))["coherent"] == "PASS"
    well = {**loop, "source_text": "a sentence", "source_ids": [1, 2, 3]}
    ill = {**loop, "source_text": "b" * 20, "source_ids": [6] * 20}
    assert verdicts(finished(prompts=[well]), coherent=True)["coherent"] == "FAIL"
    inherited = judged(finished(prompts=[ill]), coherent=True)["coherent"]
    assert inherited.verdict == "PASS" and "source's own" in inherited.figure


def test_a_text_predicted_worse_than_by_guessing_warns_unless_the_source_does_it_too() -> None:
    config = NVFP4_CONFIG | {"vocab_size": 100}
    assert verdicts(finished(perplexity=99.0), config)["coherent"] == "PASS"
    assert verdicts(finished(perplexity=100.0), config)["coherent"] == "WARN"
    assert verdicts(finished(perplexity="nan"), config, coherent=True)["coherent"] == "FAIL"
    assert verdicts(finished(perplexity=100.0, windows=[]), config)["coherent"] == "PASS"
    for its, expected in ((101.0, "PASS"), (20.0, "WARN")):
        source = {"ok": True, "perplexity": its, "agreement": None, "why": "x"}
        assert verdicts(finished(perplexity=100.0, source=source), config)["coherent"] == expected


def test_agreement_is_the_mean_over_positions() -> None:
    found = vllm_prompts.Agreement()
    assert found.result() is None
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    found.add(logits, torch.zeros(2, 2))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.result() == {"tokens": 2, "kl": pytest.approx(expected / 2), "top1": 1.0}
    found.add(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert found.result()["top1"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="logits"):
        found.add(torch.zeros(2, 3), torch.zeros(2, 2))


def test_input_scales_are_read_as_the_engine_loaded_them() -> None:
    class Experts(torch.nn.Module):
        def __init__(self, gate_up: list[list[float]], a16: bool = False) -> None:
            super().__init__()
            self.w13_input_global_scale = torch.nn.Parameter(torch.tensor(gate_up))
            self.w2_input_global_scale = torch.nn.Parameter(torch.full((3,), 5.0))
            self.quant_method = type("Method", (), {"use_a16": a16})()

    # The smaller of gate and up counts: 2, 2, 2 are shared; 2, 1, 1 are not, though the larger ones are.
    shared, differing = [[2.0, 3.0], [2.0, 5.0], [4.0, 2.0]], [[2.0, 3.0], [1.0, 3.0], [3.0, 1.0]]
    assert vllm_sentinel.input_scales(torch.nn.Linear(2, 2)) is None
    assert vllm_sentinel.input_scales(torch.nn.ModuleList([Experts(shared, a16=True)])) is None
    model = torch.nn.ModuleList([Experts(shared), Experts(differing), Experts(differing)])
    assert vllm_sentinel.input_scales(model) == {"layers": 3, "experts": 9, "shared": 1}


def test_paired_differences_and_the_bundled_text() -> None:
    pairs = serving.nll_difference(
        [{"nll": 2.0}, {"nll": 3.0}, {"nll": "nan"}], [{"nll": 1.9}, {"nll": 2.7}, {"nll": 1}]
    )
    assert pairs == {"nll_difference": pytest.approx(0.2), "nll_error": pytest.approx(0.1)}
    assert serving.nll_difference([], []) == {"nll_difference": None, "nll_error": None}


@pytest.mark.parametrize(
    ("options", "context", "expected"),
    [
        ({}, 8192, (576, 64)),
        ({"window_tokens": 2048}, 8192, (2112, 64)),
        ({"window_tokens": 2048, "text": None}, 8192, (576, 64)),
        ({}, 64, (64, 32)),
        ({"max_model_len": 16}, 8192, (16, 8)),
    ],
)
def test_context_length_leaves_room_for_prompt_and_sample(
    options: dict[str, Any], context: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
    with pytest.raises(EnvironmentProblem):  # there is no interpreter; the request is written all the same
        serving.verify_serving(tmp_path, Serving(python=str(tmp_path / "absent"), **options), tmp_path / "logs")
    request = json.loads((tmp_path / "logs" / "serving-request.json").read_text())
    assert (request["max_model_len"], request["max_tokens"]) == expected


def test_prompts_that_do_not_fit_the_context_are_named_with_the_length_to_write() -> None:
    options = Serving(prompts=["no doubt", "ten " * 10, "x" * 600], max_model_len=64, max_tokens=50)
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return len(text.split()) if " " in text else len(text)

    assert serving.prompt_problems(options, {"max_position_embeddings": 650}, None, count) == [
        "verify.serving.prompts: prompt 3 has 600 tokens, and a context of 64 leaves 32 beside a sample of 32; shorten it, or "
        "set verify.serving.max_model_len: 650"
    ]
    assert counted == options.prompts[1:]  # eight bytes are eight tokens at most
    for config in ({"max_position_embeddings": 631}, {"max_position_embeddings": 64}):
        (problem,) = serving.prompt_problems(options, config, None, count)
        assert problem.endswith("; shorten it")
    chosen = options.model_copy(update={"max_model_len": None})
    (problem,) = serving.prompt_problems(chosen, {}, None, count)
    assert "a context of 562 leaves 512" in problem
    assert serving.prompt_problems(chosen.model_copy(update={"window_tokens": 600}), {}, None, count) == []


def test_a_text_that_cannot_be_read_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "good.txt").write_text("word " * 1000)
    for name in ("absent.txt", "empty.txt", "bytes.txt"):
        with pytest.raises(RecipeError, match=f"verify.serving.text: .*{name}"):
            serving.check_serving(Serving(text=str(tmp_path / name)), None)
    options = Serving(text=str(tmp_path / "good.txt"), windows=1, window_tokens=2)
    assert serving.read_text(options) == "word " * 12 + "word"
    assert serving.read_text(Serving(text=None)) is None


def test_no_calibration_text_is_in_the_evaluation_text() -> None:
    """No eight words in a row of the bundled evaluation text stand in the bundled calibration texts."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[n : n + 8]) for n in range(len(words) - 7)}

    evaluation = runs(serving.read_text(Serving()) or "")
    assert len(evaluation) > 5000
    calibration = (Path(serving.__file__).parents[2] / "calibration/data/bundled/texts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in calibration]
    texts = [row.get("text") or " ".join(message["content"] for message in row["messages"]) for row in rows]
    assert not [run for text in texts for run in runs(text) & evaluation]


def test_a_checkpoint_does_not_choose_the_interpreter_that_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "checkpoint" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        "{source: {checkpoint: s}, output: o, method: plain, verify: {serving: {python: /bin/chosen, max_tokens: 3}}}"
    )
    monkeypatch.chdir(tmp_path)
    assert main([str(recipe.parent)]) == EnvironmentProblem.exit_code
    assert ".venv-vllm/bin/python: no such interpreter" in capsys.readouterr().err
    assert main([str(recipe.parent), "--recipe", str(recipe)]) == EnvironmentProblem.exit_code
    assert "/bin/chosen: no such interpreter" in capsys.readouterr().err


def test_the_source_is_served_as_stored_or_as_a_plain_copy_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Formats(Checkpoint.open(standard.write(tmp_path / "plain", "llama")))
    low_bit = Formats(Checkpoint.open(deepseek_v4.write(tmp_path / "low_bit", "fp8_mxfp4")))
    assert serving.source_as_stored(plain, Serving()) == serving.SourceToServe(plain.checkpoint.directory)
    assert serving.source_as_stored(plain, Serving(compare=False)) is None
    stored = serving.source_as_stored(low_bit, Serving())
    assert stored is not None and stored.directory is None and "FP8 tiles 128x128, MXFP4" in stored.why

    def task(options: Serving | None) -> Task:
        body = {"source": {"checkpoint": str(tmp_path / "low_bit")}, "output": str(tmp_path / "o"), "method": "plain"}
        made = Recipe.model_validate(body).model_copy(update={"verify": Verify(serving=options)})
        return Task.of(made, low_bit)

    with source_to_serve(task(Serving()), tmp_path) as found:
        assert found is not None and found.directory is not None, found
        copy = Formats(Checkpoint.open(found.directory))
        main = [name for name in copy.checkpoint.tensors if not name.startswith("mtp.")]
        assert {copy.of(name).kind for name in main} == {"plain"} and copy.checkpoint.config[
            "model_type"
        ] == "deepseek_v4"
        assert torch.equal(
            copy.read("layers.0.ffn.experts.0.w1.weight"), low_bit.read("layers.0.ffn.experts.0.w1.weight")
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["low_bit", "plain"]
    for options in (None, Serving(compare=False)):
        with source_to_serve(task(options), tmp_path) as found:
            assert found is None
    monkeypatch.setattr(serving, "AUTO_BYTES", 1000)
    with source_to_serve(task(Serving()), tmp_path) as found:
        assert found is not None and found.directory is None and "compare: true serves it" in found.why
    large = serving.source_as_stored(plain, Serving(compare=True))
    assert large is not None and large.directory is not None
    monkeypatch.setattr(convert, "_SPARE", 1 << 60)
    with source_to_serve(task(Serving(compare=True)), tmp_path) as found:
        assert found is not None and found.directory is None and "no plain copy of the source" in found.why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["low_bit", "plain"]


def test_an_error_names_the_innermost_module_that_was_built() -> None:
    def layer(prefix: str) -> None:
        raise ValueError("32 is not divisible by block_n = 128")

    def block(prefix: str) -> None:
        layer(prefix=f"{prefix}.wq_a")

    with pytest.raises(ValueError, match="block_n") as raised:
        block("model.layers.3.attn")
    assert vllm_worker.module_of(raised.value) == "model.layers.3.attn.wq_a"
    with pytest.raises(ZeroDivisionError) as other:
        1 / 0  # noqa: B018
    assert vllm_worker.module_of(other.value) is None
    error = {"type": "ValueError", "message": "block_n = 128", "module": "model.layers.3.attn.wq_a"}
    said = engine.failure({"ok": False, "stage": "load", "exit_code": 1, "error": error})
    assert said == "stage load: ValueError: block_n = 128 (in model.layers.3.attn.wq_a)"


def test_attention_of_a_tower_is_described_by_the_name_of_its_backend() -> None:
    class Backend(enum.Enum):
        TORCH_SDPA = 1

    attention = torch.nn.Module()
    attention.attn_backend = Backend.TORCH_SDPA  # type: ignore[assignment]
    (entry,) = vllm_watch.describe_layers(torch.nn.Sequential(attention))
    assert (entry["kind"], entry["kernel"]) == ("attention", "TORCH_SDPA")


def test_experts_of_vllms_transformers_backend_are_experts() -> None:
    """Its TransformersRoutedExperts is a RoutedExperts: their method, not a kernel of a linear layer, says what runs."""

    class RoutedExperts(torch.nn.Module):
        quant_method = types.SimpleNamespace(backend_name="CPU emulation")

    class TransformersRoutedExperts(RoutedExperts):
        pass

    (entry,) = vllm_watch.describe_layers(torch.nn.Sequential(TransformersRoutedExperts()))
    assert (entry["kind"], entry["kernel"]) == ("experts", "CPU emulation")


@pytest.mark.parametrize(
    ("imported", "why"), [("torchvision_of_nobody", "no package 'torchvision_of_nobody'"), ("json", None)]
)
def test_a_package_that_the_model_s_class_lacks_is_why_it_is_not_served(
    imported: str, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"vision_{imported}.py").write_text(f"import {imported}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = types.SimpleNamespace(module_name=f"vision_{imported}")
    models = types.ModuleType("vllm.model_executor.models")
    models.ModelRegistry = types.SimpleNamespace(models={"Vision": entry})  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, models.__name__, models)
    here = types.SimpleNamespace(**{f"is_{name}": lambda: False for name in ("cuda", "rocm", "xpu", "cpu")})
    said = vllm_worker.no_variant({"architectures": ["Vision"]}, here)
    assert said is None if why is None else said is not None and why in said
