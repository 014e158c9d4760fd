"""Serving: the real vLLM loads the checkpoint in its own interpreter and process, and what it says becomes verdicts.

The work inside the engine is `vllm_worker.py`, which also documents the JSON that passes between the two. Nothing
here imports vLLM. A crash, a lack of memory or a time-out of the engine is a FAIL with the log's last lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from recipes.errors import EnvironmentProblem
from recipes.schema import Serving
from verify.checks import Check, Verdict

WORKER = Path(__file__).with_name("vllm_worker.py")
REMEDY = "run `make venv-vllm`, or name another interpreter in verify.serving.python"
PROMPT_ROOM = 512
"""Prompt tokens that the default context length leaves beside the sample; more than DeepSeek-V4's windows of 128."""

CHECKS = {
    "serving.load": ("the engine builds the model and loads the checkpoint", "no error"),
    "serving.tensors": ("every parameter of the engine's model was written by the checkpoint", "0 left unwritten"),
    "serving.w4a4": ("the kernels that ran quantize the activations too", "every NVFP4 layer"),
    "serving.finite": ("no NaN and no infinity in the output of any module", "0"),
    "serving.logprobs": ("every prompt token has a finite log-probability", "all"),
    "serving.generate": ("the engine generates greedily for every kind of prompt", "a sample for each"),
}
HOW = {
    "serving.load": "vLLM in its own process, eager",
    "serving.tensors": "parameters filled with NaN or 0x5a before loading, searched after it",
    "serving.w4a4": "classes of the layers and kernels that vLLM chose",
    "serving.finite": "forward hooks on every module, all prompts and all generated tokens",
    "serving.logprobs": "the engine's prompt log-probabilities, one prompt at a time",
    "serving.generate": "one batch of all prompts, temperature 0",
}


def default_prompts() -> list[dict[str, Any]]:
    """One prompt of every built-in kind, as `vllm_worker` takes them."""
    days = (f"On day {n} the ship sailed {7 * n} miles and the crew counted {3 * n + 1} birds." for n in range(1, 61))
    code = "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +"
    return [
        {"kind": "short", "text": "The capital of France is"},
        {"kind": "long", "text": " ".join(days)},
        {"kind": "chat", "messages": [{"role": "user", "content": "Name three colors of the rainbow."}]},
        {"kind": "code", "text": code},
        {"kind": "repeated token", "text": " the", "repeat": 64},
        {"kind": "single token", "text": "The", "limit": 1},
    ]


def check_environment(python: str) -> None:
    """Raise EnvironmentProblem unless `python` is an interpreter that imports vLLM; takes seconds."""
    try:
        done = subprocess.run(
            [python, "-c", "import vllm; print(vllm.__version__)"],
            capture_output=True, text=True, timeout=300, env=environment(), check=False,
        )  # fmt: skip
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise EnvironmentProblem(f"{python}: no such interpreter (verify.serving.python); {REMEDY}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"{python}: cannot be run (verify.serving.python): {error}; {REMEDY}") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentProblem(f"{python}: `import vllm` fails there (verify.serving.python): {last}; {REMEDY}")


def environment() -> dict[str, str]:
    """The engine's environment: this one without what would leak our interpreter, plus what vLLM needs here."""
    leaks = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSAFEPATH"}
    leaks.add("PYTHONDONTWRITEBYTECODE")  # importing vLLM takes 24 s without bytecode, 6 s with it
    inherited = {name: value for name, value in os.environ.items() if name not in leaks}
    threads = str(max(1, (os.cpu_count() or 1) // 2))  # more threads than free cores make MoE decoding 40 x slower
    defaults = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "VLLM_NO_USAGE_STATS": "1"}
    fixed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the hooks live in the engine's process
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | inherited | fixed


def verify_serving(
    checkpoint: Path,
    options: Serving,
    log_dir: Path,
    *,
    trust_remote_code: bool = False,
    prompts: list[dict[str, Any]] | None = None,
    capture_logits: Path | None = None,
    moe_input_scales: str = "stored",
) -> tuple[list[Check], dict[str, Any]]:
    """Serve `checkpoint` once and judge what happened.

    Writes `serving-request.json`, `serving-result.json` and `vllm.log` into `log_dir`. Returns the checks and the
    worker's result, with `samples` [{kind, prompt, text}], `seconds.wall`, `exit_code`, `timed_out` and `log` added.
    prompts: instead of the built-in kinds and `options.prompts`. capture_logits, moe_input_scales: see the worker.
    Raises EnvironmentProblem when there is no vLLM to ask.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    request_path, result_path, log = (
        (log_dir / name).resolve() for name in ("serving-request.json", "serving-result.json", "vllm.log")
    )
    config = _read_json(checkpoint / "config.json") or {}
    own = [{"kind": f"recipe {n}", "text": text} for n, text in enumerate(options.prompts, 1)]
    length = options.max_model_len or min(
        PROMPT_ROOM + options.max_tokens, int(config.get("max_position_embeddings") or PROMPT_ROOM + options.max_tokens)
    )
    request = {
        "checkpoint": str(checkpoint.resolve()),
        "prompts": default_prompts() + own if prompts is None else prompts,
        "max_tokens": options.max_tokens,
        "dtype": options.dtype,
        "max_model_len": length,
        "trust_remote_code": trust_remote_code,
        "seed": 0,
        "capture_logits": str(capture_logits.resolve()) if capture_logits else None,
        "kv_cache_bytes": kv_cache_bytes(config, length),
        "moe_input_scales": moe_input_scales,
    }
    request_path.write_text(json.dumps(request, indent=1))
    result_path.unlink(missing_ok=True)
    began = time.monotonic()
    command = [options.python, str(WORKER), str(request_path), str(result_path)]
    try:
        exit_code, timed_out = _run(command, log, options.timeout)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise EnvironmentProblem(f"{options.python}: no such interpreter (verify.serving.python); {REMEDY}") from None
    result = _read_json(result_path) or {"ok": False, "stage": "request", "error": None}
    error = result.get("error") or {}
    if result.get("stage") == "import" and error.get("type") in ("ImportError", "ModuleNotFoundError"):
        raise EnvironmentProblem(
            f"{options.python}: vLLM cannot be imported there (verify.serving.python): {error['message']}; {REMEDY}"
        )
    result |= {"exit_code": exit_code, "timed_out": timed_out, "log": str(log), "samples": samples(result)}
    result.setdefault("seconds", {})["wall"] = time.monotonic() - began
    return judge(result, options, config, _tail(log)), result


def kv_cache_bytes(config: dict[str, Any], length: int) -> int:
    """A CPU KV cache for two sequences of `length` tokens in float32, at least 64 MiB; upper bound for any family."""
    heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)
    width = int(config.get("head_dim") or config.get("hidden_size", 0) // int(config.get("num_attention_heads") or 1))
    return max(64 << 20, 2 * length * int(config.get("num_hidden_layers") or 1) * 2 * heads * width * 4)


def samples(result: dict[str, Any]) -> list[dict[str, Any]]:
    """`[{kind, prompt, text}]` of the generated samples, most readable kinds first."""
    found = [
        {"kind": p["kind"], "prompt": p.get("text") or f"{p['tokens']} tokens", "text": p["sample"]}
        for p in result.get("prompts", [])
        if p.get("sample_ids")
    ]
    return sorted(found, key=lambda s: not s["kind"].startswith("recipe"))


def _run(command: list[str], log: Path, timeout: float) -> tuple[int, bool]:
    """Run in a process group of its own with its output in `log`; kill the group at the time-out or on any exception.

    Returns the exit code (negative: the signal) and whether time ran out.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(),
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout), False
        except subprocess.TimeoutExpired:
            return 0, True
        finally:  # also what the engine left running after its own end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def judge(result: dict[str, Any], options: Serving, config: dict[str, Any], tail: list[str]) -> list[Check]:
    """The verdicts of one run. A requirement that the run did not reach is UNCHECKED."""
    verdicts: dict[str, tuple[Verdict, str]] = {}
    engine, load, prompts = result.get("engine", {}), result.get("load", {}), result.get("prompts", [])
    failure = _failure(result, tail)
    loaded = bool(result.get("layers"))
    missing = load.get("missing", [])

    if loaded:
        described = f"vLLM {engine.get('version')} on {engine.get('platform')}, {engine.get('dtype')}"
        verdicts["serving.load"] = ("PASS", f"{described}, {load.get('seconds') or 0:.1f} s")
    elif failure is not None:
        verdicts["serving.load"] = ("FAIL", failure)
    if missing:
        names = ", ".join(
            f"{m['name']} ({m['share']:.0%}{' at ' + m['where'] if m['where'] else ''})" for m in missing[:5]
        )
        verdicts["serving.tensors"] = ("FAIL", f"{load.get('missing_total', len(missing))} left: {names}")
    elif loaded:
        verdicts["serving.tensors"] = ("PASS", f"0 of {load.get('tensors', 0)}")

    kernels = _kernels(result.get("layers", []))
    if loaded and result.get("w4a4") is True:
        verdicts["serving.w4a4"] = ("PASS", kernels)
    elif loaded and not kernels:
        verdicts["serving.w4a4"] = ("FAIL", "config.json says NVFP4, but the engine runs no NVFP4 layer")
    elif loaded:
        why = "weight-only kernel, activations stay unquantized" if result.get("w4a4") is False else "unknown kernel"
        verdicts["serving.w4a4"] = ("UNCHECKED", f"{why}: {kernels}")

    bad = result.get("nonfinite")
    generated = [p for p in prompts if p.get("sample_ids")]
    scored = [p for p in prompts if p.get("nll") is not None]
    if bad is not None:
        strict: Verdict = "FAIL" if options.require.finite else "WARN"
        verdicts["serving.finite"] = (
            strict, f"{bad['values']} values in {bad['module']} ({bad['cls']}), prompt: {bad['kind']}",
        )  # fmt: skip
    elif result.get("ok"):
        verdicts["serving.finite"] = ("PASS", f"0 in {len(generated)} prompts and their samples")
    unscored = [p["kind"] for p in scored if not isinstance(p["nll"], int | float)]
    ran = result.get("stage") in ("generate", "done")
    if unscored:
        verdicts["serving.logprobs"] = ("FAIL", f"not finite: {', '.join(unscored)}")
    elif scored and ran:
        verdicts["serving.logprobs"] = (
            "PASS", f"perplexity {_number(result.get('perplexity'))} over {sum(p['tokens'] - 1 for p in scored)} tokens",
        )  # fmt: skip
    skipped = [f"{p['kind']}: {p['skipped']}" for p in prompts if p.get("skipped")]
    if result.get("ok"):
        note = f"; not run: {'; '.join(skipped)}" if skipped else ""
        every = len(generated) == len(prompts) - len(skipped) and generated
        verdicts["serving.generate"] = ("PASS" if every else "FAIL", f"{len(generated)} samples{note}")
    elif loaded and not missing and failure is not None:
        reached = "serving.generate" if ran else "serving.logprobs"
        verdicts[reached] = ("FAIL", failure)

    wanted = [name for name in CHECKS if name != "serving.w4a4" or _asks_for_w4a4(config)]
    stopped = f"not reached: {failure.splitlines()[0]}" if failure else "not reached"
    checks = [_make(name, verdicts.get(name, ("UNCHECKED", stopped))) for name in wanted]
    limit = options.require.max_perplexity
    if limit is not None:
        checks.append(_perplexity(result.get("perplexity"), limit, stopped))
    return checks


def _make(name: str, outcome: tuple[Verdict, str]) -> Check:
    what, threshold = CHECKS[name]
    return Check(name, outcome[0], what, outcome[1], threshold, HOW[name])


def _perplexity(found: Any, limit: float, stopped: str) -> Check:
    what = "the perplexity of the prompts is as low as the recipe asks"
    verdict: Verdict = "UNCHECKED"
    if isinstance(found, int | float):
        verdict = "PASS" if found <= limit else "FAIL"
    figure = stopped if found is None else _number(found)
    verdict = "FAIL" if isinstance(found, str) else verdict  # "nan" or "inf"
    return Check("serving.perplexity", verdict, what, figure, f"<= {limit:g}", HOW["serving.logprobs"])


def _failure(result: dict[str, Any], tail: list[str]) -> str | None:
    """Why the run ended early, with the log's last lines; None when it did not."""
    if result.get("ok"):
        return None
    code, stage = int(result.get("exit_code") or 0), result.get("stage")
    if result.get("timed_out"):
        first = f"no end within the time-out, stopped in stage {stage}"
    elif code < 0:
        name = signal.Signals(-code).name
        first = f"killed by {name} in stage {stage}" + (" (out of memory?)" if name == "SIGKILL" else "")
    elif result.get("error"):
        return f"stage {stage}: {result['error']['type']}: {result['error']['message']}"
    else:
        first = f"exit code {code} in stage {stage}"
    return "\n".join([first, *tail, f"log: {result.get('log')}"])


def _kernels(layers: list[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for layer in layers:
        if layer["format"] == "nvfp4":
            name = f"{layer['kind']} {layer['kernel'] or layer['method']}"
            counts[name] = counts.get(name, 0) + int(layer["count"])
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _asks_for_w4a4(config: dict[str, Any]) -> bool:
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    for group in groups.values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        if (weights.get("num_bits"), weights.get("type"), inputs.get("num_bits")) == (4, "float", 4):
            return True
    return False


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _tail(log: Path, lines: int = 12) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []
