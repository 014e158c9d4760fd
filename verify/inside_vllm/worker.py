"""Load a checkpoint in the real vLLM, run it, and write the results as JSON: `PYTHON worker.py REQUEST RESULT`.

Runs inside vLLM's own interpreter as a script: imports the standard library, torch, vLLM and the files next to it.
`verify.serving.engine` starts it and sets its environment; `verify.serving` turns the result into verdicts.

REQUEST.json
    checkpoint          directory
    prompts             [{kind, text | token_ids | messages, repeat?: tokens, limit?: tokens, fill?: true}]; fill repeats
                        the prompt until only the sample fits after it
    windows             null | {text, count, tokens} | {token_ids: [[...], ...]}: text scored window by window
    max_tokens          greedy tokens per prompt
    dtype               "auto" | "float32" | "bfloat16" | "float16"
    max_model_len       tokens (built-in prompts are cut to fit, the recipe's skipped)
    trust_remote_code   bool
    seed                int
    write_logits        directory for `window.<i>.safetensors`, or `prompt.<i>.safetensors` without windows:
                        token_ids [T], logits [T, V] (float32, row t predicts token t + 1); or null
    compare_logits      directory that another run wrote so: this run's distributions are the reference; or null
    kv_cache_bytes      size of the KV cache on a CPU, or null for vLLM's default
    moe_input_scales    "stored" | "collapsed" (see cpu_nvfp4.register; CPU only). Where the experts of a layer
                        differ in theirs, the windows are scored in the other mode too
    accuracy            null | {tasks, limit, fewshot, chat}: tasks of lm-eval to score, see accuracy
    processor           {feature: bool}: what the CPU is pretended to have or lack, {} for the truth (see processor)

RESULT.json (written .partial and renamed at every stage and at the end, also after an exception; keys always there)
    format 2; ok: no exception. stage: the stage reached, one of STAGES; error: null | {type, message, module, traceback};
                        module: the name of the module that vLLM was building or loading, null if it has none
    engine              {name, version, torch, python, platform, processor, emulations, dtype, kv_cache_dtype};
                        processor: {feature: yes | no | hidden | claimed} of the CPU, as vLLM sees it; emulations: what
                        ran as a torch emulation of ours because the platform has no kernel, [] on a GPU
    load                {seconds, tensors, missing: [{name, share, where}], missing_total}; share 1.0: never written.
                        Anything missing ends the run after the load with error type UnwrittenParameters; a model that
                        vLLM does not have for this platform ends it before the load with NoVariant
    layers              [{kind, cls, method, scheme, kernel, format, activations_quantized, count, example}]
    w4a4                true: every NVFP4 layer quantizes its activations; false: one does not; null: no such layer, or
                        a kernel that watch does not know
    input_scales        null (no W4A4 experts) | {layers, experts, shared, mode, other: null | {mode, perplexity,
                        nll_difference, tokens, kl, top1}}; shared: layers whose experts hold equal ones; other: against
                        this run's mode as the reference
    given_inputs        null (not reached, or no W4A4 layer) | {layers, saturated, not_looked_at: {why: layers}, worst:
                        [{module, admitted, seen, share}]}: the inputs of the W4A4 NVFP4 layers (experts: of gate/up) over
                        windows, prompts and samples. layers: looked at; saturated: those given a value beyond what
                        their input scale admits (2688 / scale); worst: the five with the largest share of such values;
                        seen: the largest magnitude, admitted: its limit. Not looked at: the scale is in no attribute
                        that watch knows, or nothing reached the kernel
    prompts, windows    [{kind, tokens, nll, perplexity, text, token_ids, sample_ids, sample, skipped}]; nll is the mean
                        natural-log loss per predicted token, null for one token; not finite values are written as strings
    perplexity          over all predicted tokens of the windows, or of the prompts if there are no windows
    agreement           null | {tokens, kl, top1} with compare_logits
    accuracy            null | {version, tasks: {name: {metric, value, scores, chance, samples}}} | {error}
    nonfinite           null | {module, cls, kind, values}: the first module whose output held NaN or infinity
    seconds             {import, load, forward, generate, accuracy}
    peak_rss_bytes      of this process
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import platform
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

STAGES = ("request", "import", "load", "forward", "generate", "accuracy", "done")
KEPT: list[Any] = []
"""The engine, to the end of the process: `end` leaves out what vLLM does if it is released."""


def main(request_path: str, result_path: str) -> int:
    """Run the stages and write RESULT; 0 when all ran, 1 when one raised."""
    result: dict[str, Any] = {
        "format": 2, "ok": False, "stage": STAGES[0], "error": None, "engine": {}, "load": {}, "layers": [],
        "w4a4": None, "input_scales": None, "given_inputs": None, "prompts": [], "windows": [], "perplexity": None,
        "agreement": None, "accuracy": None, "nonfinite": None, "seconds": {}, "peak_rss_bytes": 0,
    }  # fmt: skip
    try:
        run(json.loads(Path(request_path).read_text()), result, Path(result_path))
        result["ok"] = True
    except BaseException as error:  # the result must be written in any case, even for SystemExit
        result["error"] = {
            "type": type(error).__name__,
            "message": str(error),
            "module": module_of(error),
            "traceback": traceback.format_exc().splitlines()[-40:],
        }
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(Path(result_path), result)
    return 0 if result["ok"] else 1


def module_of(error: BaseException) -> str | None:
    """The module that was being built or loaded when `error` was raised: vLLM's constructors and quantization methods are handed
    its name as `prefix`, and its messages leave it out."""
    found, frame = None, error.__traceback__
    while frame is not None:
        prefix = frame.tb_frame.f_locals.get("prefix")
        found = prefix if isinstance(prefix, str) and prefix else found
        frame = frame.tb_next
    return found


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, `.partial`, fsync, rename; NaN and infinities become the strings "nan", "inf", "-inf"."""

    def strict(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return str(item)
        if isinstance(item, dict):
            return {key: strict(entry) for key, entry in item.items()}
        return [strict(entry) for entry in item] if isinstance(item, list | tuple) else item

    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        json.dump(strict(value), file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def run(request: dict[str, Any], result: dict[str, Any], result_path: Path) -> None:
    """Runs all stages and fills `result` meanwhile, so that it says how far they got if one raises."""

    def stage(name: str) -> float:
        result["stage"] = name
        write_json(result_path, result)  # so that the results so far survive a crash of the engine
        print(f"[vllm_worker] {name}", flush=True)
        return time.monotonic()

    began = stage("import")
    if request.get("accuracy"):
        sibling("accuracy").allow_downloads(request["accuracy"])
    processor = sibling("processor").set_features(request["processor"], request["dtype"])
    emulations, vllm = import_engine(request)
    import torch
    from vllm.platforms import current_platform

    sentinel, watch, prompts = sibling("sentinel"), sibling("watch"), sibling("prompts")
    result["engine"] = {
        "name": "vllm", "version": vllm.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "platform": device_name(current_platform), "processor": processor, "emulations": emulations, "dtype": None,
        "kv_cache_dtype": None,
    }  # fmt: skip
    result["seconds"]["import"] = time.monotonic() - began

    began = stage("load")
    checkpoint_config = json.loads((Path(request["checkpoint"]) / "config.json").read_text())
    if why := no_variant(checkpoint_config, current_platform):
        raise NoVariant(f"vLLM {vllm.__version__} {why}")
    load: dict[str, Any] = {"seconds": None, "tensors": 0, "missing": [], "missing_total": 0}
    result["load"] = load
    sentinel.watch_loading(load)
    llm = build_engine(vllm, request, on_cpu=current_platform.is_cpu())
    result["seconds"]["load"] = load["seconds"] = time.monotonic() - began
    config = llm.llm_engine.vllm_config
    result["engine"] |= {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": config.cache_config.cache_dtype,
    }
    result["layers"] = llm.apply_model(watch.describe_layers)[0]
    result["w4a4"] = watch.all_activations_quantized(result["layers"])
    if (scales := load.pop("input_scales", None)) is not None:
        mode = request["moe_input_scales"] if current_platform.is_cpu() else "kernel"
        result["input_scales"] = scales | {"mode": mode, "other": None}
    if load["missing"]:
        raise UnwrittenParameters(
            f"{load['missing_total']} parameters were not written, first {load['missing'][0]['name']}"
        )

    began = stage("forward")
    hooks = watch.ForwardWatch(result)
    llm.apply_model(hooks.install)
    result["windows"] = prompts.cut_windows(llm, request, config.model_config)
    result["prompts"] = prompts.tokenize(llm, request, config.model_config)
    measured = "windows" if result["windows"] else "prompts"
    measure(llm, vllm, request, result, hooks, measured)
    # A run that is a reference for another one only provides its windows and samples.
    for entry in result["prompts"] if measured == "windows" and not request.get("compare_logits") else []:
        hooks.begin(entry["kind"], 0, capture=False)
        if entry["token_ids"]:
            prompts.score(llm, vllm, entry)
    result["seconds"]["forward"] = time.monotonic() - began

    began = stage("generate")
    runnable = [entry for entry in result["prompts"] if entry["token_ids"]]
    hooks.begin("generation", 0, capture=False)
    sampling = vllm.SamplingParams(max_tokens=request["max_tokens"], temperature=0.0)
    inputs = [{"prompt_token_ids": entry["token_ids"]} for entry in runnable]
    for entry, output in zip(runnable, llm.generate(inputs, sampling, use_tqdm=False), strict=True):
        entry["sample_ids"] = list(output.outputs[0].token_ids)
        entry["sample"] = output.outputs[0].text
    result["given_inputs"] = hooks.inputs.summary()
    result["seconds"]["generate"] = time.monotonic() - began

    if request.get("accuracy"):
        began = stage("accuracy")
        hooks.begin("accuracy", 0, capture=False, inputs=False)
        engine = {key: request[key] for key in ("checkpoint", "dtype", "max_model_len", "trust_remote_code", "seed")}
        try:
            result["accuracy"] = sibling("accuracy").run_tasks(llm, request["accuracy"], engine)
        except Exception as error:  # lm-eval or its data, which says nothing about the checkpoint
            result["accuracy"] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        result["seconds"]["accuracy"] = time.monotonic() - began
    stage("done")


def measure(llm: Any, vllm: Any, request: dict[str, Any], result: dict[str, Any], hooks: Any, measured: str) -> None:
    """Scores the windows (or prompts) one by one: perplexity, and if requested writes their logits to disk and computes
    their agreement with another run, and with this checkpoint in the other mode of its experts' input scales."""
    prompts, nvfp4 = sibling("prompts"), sibling("cpu_nvfp4")
    scales = result["input_scales"]
    differ = scales is not None and scales["shared"] < scales["layers"] and scales["mode"] != "kernel"
    other_mode = next(m for m in nvfp4.MOE_INPUT_SCALES if not scales or m != scales["mode"])
    to, against = request.get("write_logits"), request.get("compare_logits")
    agreement, modes, in_other_mode = prompts.Agreement(), prompts.Agreement(), []

    def scored(entry: dict[str, Any], note: str = "") -> Any:
        # The other mode has other input scales than those that the watch compares with.
        hooks.begin(entry["kind"] + note, entry["tokens"], capture=bool(to or against or differ), inputs=not note)
        prompts.score(llm, vllm, entry)
        return hooks.logits

    def switch(mode: str) -> None:
        llm.apply_model(lambda model: nvfp4.use_input_scales(model, mode))

    for number, entry in enumerate(result[measured]):
        if not entry["token_ids"]:
            continue
        logits, name = scored(entry), f"{measured.removesuffix('s')}.{number}"
        if to:
            prompts.write_logits(Path(to), name, entry, logits)
        if against and (other := prompts.read_logits(Path(against), name)) is not None:
            agreement.add(logits, other)
        if differ:
            switch(other_mode)
            in_other_mode.append(dict(entry))
            modes.add(logits, scored(in_other_mode[-1], f", input scales {other_mode}"))
            switch(scales["mode"])
    nll = prompts.mean_nll(result[measured])
    result["perplexity"] = None if nll is None else prompts.perplexity(nll)
    result["agreement"] = agreement.result()
    if in_other_mode:
        other_nll = prompts.mean_nll(in_other_mode)
        facts = {} if other_nll is None else {
            "perplexity": prompts.perplexity(other_nll), "nll_difference": other_nll - nll
        }  # fmt: skip
        scales["other"] = {"mode": other_mode, **facts, **modes.result()}


def sibling(name: str) -> Any:
    """Imports a file next to this one. Its directory is not on sys.path, because names there (`prompts`, `processor`)
    must not shadow what vLLM imports."""
    module = f"inside_vllm.{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


class UnwrittenParameters(Exception):
    """Raised if the checkpoint left parameters of the model unwritten; running it would prove nothing."""


class NoVariant(Exception):
    """Raised if vLLM only has the model for other hardware, or lacks a package that the model's class imports. Neither says
    anything about the checkpoint."""


def no_variant(config: dict[str, Any], current_platform: Any) -> str | None:
    """Why vLLM cannot run this model here: its package (vllm.models.<model>) has a folder for each supported platform,
    but none for this one; or its module imports a package that is not installed (vision models: torchvision,
    mistral_common). Else None.

    deepseek_v41 of vLLM 0.32 has amd and nvidia; on a CPU its entry falls through to nvidia, which builds and then
    fails in a missing kernel."""
    from vllm.model_executor.models import ModelRegistry

    platforms = {"nvidia": "is_cuda", "amd": "is_rocm", "xpu": "is_xpu", "cpu": "is_cpu"}
    here = next((name for name, asked in platforms.items() if getattr(current_platform, asked)()), None)
    for architecture in config.get("architectures") or ():
        module = getattr(ModelRegistry.models.get(architecture), "module_name", None)
        spec = importlib.util.find_spec(module) if isinstance(module, str) else None
        folders = [Path(place) for place in (spec.submodule_search_locations or () if spec else ())]
        known = [name for name in platforms if any((folder / name).is_dir() for folder in folders)]
        if known and here is not None and here not in known:
            return f"has no {here} variant of {architecture}: {module} is there for {' and '.join(known)} alone"
        try:
            if spec is not None:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not str(error.name or "vllm").startswith(("vllm", "transformers")):
                return (
                    f"cannot import its {architecture}: no package {error.name!r} in that environment; install it there"
                )
    return None


def device_name(current_platform: Any) -> str:
    """The accelerator's name, or the platform's if there is none."""
    try:
        return str(current_platform.get_device_name())
    except (NotImplementedError, RuntimeError):
        return str(current_platform.device_type)


def import_engine(request: dict[str, Any]) -> tuple[list[str], Any]:
    """Imports vLLM and registers the CPU plugin; returns what the plugin emulates (nothing on other platforms), and
    vLLM."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [p for p in sys.path if p and str(Path(p).resolve()) != here]
    left_out = sibling("torchvision_operators").declare()
    gc.set_threshold(700, 10, 1000)  # full collections among what vLLM imports find nothing and take 2 of 9 CPU-s
    import vllm

    emulations: list[str] = (
        sibling("cpu_nvfp4").register(request["moe_input_scales"]) + sibling("cpu_repairs").register() + left_out
    )
    config = json.loads((Path(request["checkpoint"]) / "config.json").read_text())
    if config.get("model_type") == "deepseek_v4":
        emulations += sibling("cpu_deepseek_v4").register(request["dtype"])
    return emulations, vllm


def build_engine(vllm: Any, request: dict[str, Any], on_cpu: bool) -> Any:
    """`vllm.LLM` in this process, eager, without prefix caching, prefilling any prompt in one step."""
    if on_cpu:
        import torch

        # enforce_eager leaves single functions to torch.compile (counting ranks, grouped top-k): 1 CPU-s, without torch's
        # cache 12, and a C++ compiler, for what takes milliseconds.
        torch.compiler.set_stance("force_eager")
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    checkpoint = Path(request["checkpoint"])
    cache = {"kv_cache_memory_bytes": request["kv_cache_bytes"]} if on_cpu and request.get("kv_cache_bytes") else {}
    engine = vllm.LLM(
        model=str(checkpoint),
        load_format="safetensors",  # never loads a pickle beside the shards
        dtype=request["dtype"],
        max_model_len=request["max_model_len"],
        max_num_batched_tokens=max(request["max_model_len"], 2 * len(request["prompts"])),
        max_num_seqs=max(8, len(request["prompts"])),
        trust_remote_code=request["trust_remote_code"],
        seed=request["seed"],
        enforce_eager=True,
        enable_prefix_caching=False,
        # vLLM renders the checkpoint's own template once when it starts, without limits; prompts.render has limits.
        chat_template="{{ messages[0].content }}",
        skip_tokenizer_init=not any((checkpoint / name).exists() for name in tokenizer_files),
        **cache,
    )
    KEPT.append(engine)
    return engine


def remove_meeting_file() -> None:
    """Removes the rendezvous file of vLLM's ranks (one here) in the temporary directory, which torch only removes at a
    normal end."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return
    store = distributed.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if path := getattr(store, "path", None):
        Path(path).unlink(missing_ok=True)


def end(code: int) -> NoReturn:
    """End the process at once: the result is on disk, and shutting vLLM down costs 2 CPU-seconds."""
    remove_meeting_file()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main(sys.argv[1], sys.argv[2]))
