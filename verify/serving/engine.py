"""Starts, watches and ends the serving engine's process: vLLM in its own interpreter. Nothing here imports vLLM.

The work inside is `verify/inside_vllm/worker.py`, which also documents the JSON files between the two. A crash, an
out-of-memory error or a timeout of the engine becomes a result, not an exception.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import read_json_or_none, read_text
from recipes.checks import Serving
from recipes.errors import EnvironmentProblem, SourceError

WORKER = Path(__file__).parents[1] / "inside_vllm" / "worker.py"
TASKS = WORKER.with_name("accuracy.py")
_TASKS_SECONDS = 1800.0
REMEDY = "run `make venv-vllm`, or name another interpreter in verify.serving.python"
#: Prints the version of vLLM last. Without a library of the system vLLM's import succeeds: it loads its kernels later, and logs
#: why it could not. Looking for garbage among what it imports, then and at the end, would take 1.6 of 4.2 CPU-s.
_TRY = """
import contextlib, gc
gc.disable()
import vllm
with contextlib.suppress(Exception):
    from vllm.platforms import current_platform
    current_platform.import_kernels()
print(vllm.__version__)
gc.freeze()
"""
_NOT_LOADED = re.compile(r"(lib[\w.+-]+): cannot open shared object file")
#: Libraries of the system that the engine's compiled code needs, and who has them.
_PACKAGES = {"libnuma.so.1": "libnuma1 (`apt-get install libnuma1`; numactl-libs of Fedora and Red Hat)"}
Run = Callable[[list[str], Path, float], tuple[int, bool]]
"""Runs (command, log, timeout in seconds) with the output in the log; returns the exit code and whether it timed
out."""
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
TAIL = 12
"""Number of lines of the engine's log that a verdict quotes."""
NO_MEMORY = (
    "MemoryError", "OutOfMemoryError", "DefaultCPUAllocator", "out of memory", "Cannot allocate memory", "Available memory",
)  # fmt: skip
"""What Python, torch, the C library and vLLM print if memory runs out."""

CPU_REFUSALS = (
    "Sparse Attention is not supported on CPU",  # platforms/cpu.py: DeepSeek-V3.2's and GLM-5's indexers
    "is_act_and_mul=False is supported only for CUDA",  # fused_moe/config.py: Nemotron-H's experts without gate
    'assert self.scoring_func == "softmax"',  # fused_moe/router/cpu_router.py: sigmoid without groups or bias
    "self.conv1d.weight.size(0), self.conv1d.weight.size(2)",  # mamba/mamba_mixer.py: Mamba-1's kernel, which utils.py packs
    "module 'triton' has no attribute 'set_allocator'",  # triton_utils/allocation.py: OLMo-Hybrid's kernels
    "'_C' object has no attribute 'selective_scan_fwd'",  # _custom_ops.py: Mamba-1's scan (Jamba), in float32
)
"""What vLLM 0.32 raises on a CPU for a part of a model that it has for GPUs only, whatever the checkpoint holds: a text of the
error's message, or of the line of vLLM that raised it."""
PACKAGE_REFUSALS = (
    "AmbiguousGlobalPerLayerAttributeError",  # transformers 5.19, blocks with different numbers of heads (Step-3.7)
    "has no attribute 'media_tokens_calculator'",  # models/kimi_k25.py: without numba, transformers' own image processor
)
"""What vLLM 0.32 raises on every platform beside these versions of other packages, or without one, whatever the checkpoint
holds; as CPU_REFUSALS."""
_REFUSED = (
    (CPU_REFUSALS, "vLLM runs this model on other hardware only; on a CPU it raises"),
    (PACKAGE_REFUSALS, "vLLM does not start this model with the packages that are installed beside it; it raises"),
)
_NOT_IMPORTED = ("ImportError", "ModuleNotFoundError", "RuntimeError", "OSError")
"""What an import raises; torch's libraries raise the last two if they do not fit each other."""
RAISED = 4
"""Lines at the end of a traceback that show the one that raised."""


def check_environment(python: str) -> str:
    """The version of the vLLM that `python` imports. Raises EnvironmentProblem if it is no interpreter that does, or if a library
    of the system is missing; takes seconds."""
    try:
        done = subprocess.run(
            [python, "-c", _TRY], capture_output=True, text=True, timeout=300, check=False, env=environment()
        )
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise EnvironmentProblem(f"{python}: no such interpreter (verify.serving.python); {REMEDY}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"{python}: cannot be run (verify.serving.python): {error}; {REMEDY}") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentProblem(f"{python}: `import vllm` fails there (verify.serving.python): {last}; {REMEDY}")
    # A driver's own library may be missing where a job is submitted.
    missing = [name for name in _NOT_LOADED.findall(done.stdout + done.stderr) if not name.startswith("libcuda.")]
    if missing:
        package = _PACKAGES.get(missing[0], "the system's package that has it")
        raise EnvironmentProblem(
            f"{python}: vLLM's kernels need {missing[0]} (verify.serving.python); install {package}"
        )
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


def check_tasks(python: str, asked: dict[str, Any]) -> None:
    """Makes the tasks of an accuracy gate in the engine's environment, without a model; takes seconds, with a hub's data
    minutes. Raises EnvironmentProblem if lm-eval is not there, does not know a task, or cannot read its data."""
    with tempfile.TemporaryDirectory(prefix="tasks-") as place:
        request, result, log = (Path(place) / name for name in ("request.json", "result.json", "log"))
        request.write_text(json.dumps(asked))
        _, timed_out = run_process([python, str(TASKS), str(request), str(result)], log, _TASKS_SECONDS)
        found = read_json_or_none(result) or {"error": "timed out" if timed_out else "\n".join(_tail(log)[-1:])}
    if "error" in found:
        missing = "No module named 'lm_eval'" in found["error"]
        remedy = f"install it there: {python} -m pip install lm-eval" if missing else "name other tasks, or repair them"
        names = ", ".join(task["name"] for task in asked["tasks"])
        raise EnvironmentProblem(f"verify.accuracy.tasks: {names}: lm-eval in {python}: {found['error']}; {remedy}")


def environment() -> dict[str, str]:
    """The engine's environment variables: ours, without those of our interpreter, plus those that vLLM needs here."""
    leaks = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSAFEPATH"}
    leaks.add("PYTHONDONTWRITEBYTECODE")  # importing vLLM takes 24 s without bytecode, 6 s with it
    inherited = {name: value for name, value in os.environ.items() if name not in leaks}
    if inherited.get(_CACHE, "").startswith(str(Path(tempfile.gettempdir()) / "torchinductor_")):
        del inherited[_CACHE]  # torch's default, which torch itself writes into the environment of this process
    threads = str(max(1, (os.cpu_count() or 1) // 2))  # more threads than free cores make MoE decoding 40 x slower
    defaults = {
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",
        "VLLM_NO_USAGE_STATS": "1",
        _CACHE: str(compile_cache()),
    }
    fixed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the hooks need the model in the worker's own process
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | inherited | fixed


def compile_cache() -> Path:
    """The directory of torch's compiled code for the engine, one for each kind of processor. torch's default is one for
    all, and cached code for AVX-512 fails to compile if AVX-512 is disabled ("at::vec has not been declared")."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    kind = [platform.machine(), os.environ.get("ATEN_CPU_CAPABILITY", ""), *features]
    digest = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{digest}"


def run_engine(
    request: dict[str, Any], options: Serving, log_dir: Path, name: str, run: Run | None = None, script: Path = WORKER
) -> dict[str, Any]:
    """Runs one process of the engine. Returns the script's result, with `seconds.wall`, `exit_code`, `timed_out` and
    `log` added.

    run: instead of `run_process`. script: of `verify/inside_vllm`. Writes `<name>-request.json`, `<name>-result.json` and
    `<name>.log` into `log_dir`.
    Raises EnvironmentProblem if there is no vLLM.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    request_path, result_path, log = (
        (log_dir / f"{name}{suffix}").resolve() for suffix in ("-request.json", "-result.json", ".log")
    )
    request_path.write_text(json.dumps(request, indent=1))
    result_path.unlink(missing_ok=True)
    began = time.monotonic()
    command = [options.python, str(script), str(request_path), str(result_path)]
    try:
        exit_code, timed_out = (run or run_process)(command, log, options.timeout)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise EnvironmentProblem(f"{options.python}: no such interpreter (verify.serving.python); {REMEDY}") from None
    result = read_json_or_none(result_path) or {"ok": False, "stage": "request", "error": None}
    error = result.get("error") or {}
    if result.get("stage") == "import" and error.get("type") in _NOT_IMPORTED:
        raise EnvironmentProblem(
            f"{options.python}: vLLM cannot be imported there (verify.serving.python): {error['message']}; {REMEDY}"
        )
    result |= {"exit_code": exit_code, "timed_out": timed_out, "log": str(log)}
    result.setdefault("seconds", {})["wall"] = time.monotonic() - began
    return result


def run_process(command: list[str], log: Path, timeout: float) -> tuple[int, bool]:
    """Run in a process group of its own with its output in `log`; kill the group at the timeout or on any exception.

    Returns the exit code (negative: the signal) and whether it timed out.
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
        finally:  # also kills what the engine left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def platform_refusal(result: dict[str, Any]) -> str | None:
    """Why the engine has no code for the model on this machine, which says nothing about the checkpoint; None if that
    is not why the run ended. Only errors of CPU_REFUSALS and PACKAGE_REFUSALS count, with the text that was found."""
    error = result.get("error") or {}
    if error.get("type") == "NoVariant":
        return str(error["message"])
    lines = [f"{error.get('type')}: {error.get('message')}", *_raising(list(map(str, error.get("traceback", ()))))]
    found = ((why, text) for texts, why in _REFUSED for text in texts if any(text in line for line in lines))
    return next((f"{why}: {text}" for why, text in found), None)


def _raising(traceback: list[str]) -> list[str]:
    """The last lines of a traceback; vLLM's parameters pass every access through a frame of their own, which says nothing."""
    frames = [number for number, line in enumerate(traceback) if line.startswith("  File ")]
    if frames and traceback[frames[-1]].endswith("in __torch_function__"):
        traceback = traceback[: frames[-1]]
    return traceback[-RAISED:]


def failure(result: dict[str, Any]) -> str | None:
    """Why a run ended early, with the log's last lines; None if it did not."""
    if result.get("ok"):
        return None
    code, stage = int(result.get("exit_code") or 0), result.get("stage")
    if result.get("timed_out"):
        first = f"no end within the time-out, stopped in stage {stage}"
    elif code < 0:
        name = signal.Signals(-code).name
        first = f"killed by {name} in stage {stage}" + (" (out of memory?)" if name == "SIGKILL" else "")
    elif result.get("error"):
        text = f"{result['error']['type']}: {result['error']['message']}"
        memory = "out of memory: " if any(mark in text for mark in NO_MEMORY) else ""
        if module := result["error"].get("module"):
            text += f" (in {module})"
        return f"stage {stage}: {memory}{text}"
    else:
        first = f"exit code {code} in stage {stage}"
    return "\n".join([first, *_tail(Path(str(result.get("log")))), f"log: {result.get('log')}"])


def _tail(log: Path) -> list[str]:
    try:
        return read_text(log, errors="replace").splitlines()[-TAIL:]
    except SourceError:
        return []
