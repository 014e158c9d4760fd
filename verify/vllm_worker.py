"""Load a checkpoint in the real vLLM, run it, and write what was seen as JSON: `PYTHON vllm_worker.py REQUEST RESULT`.

Runs inside vLLM's own interpreter as a script: imports the standard library, torch, vLLM and the two plugin files
next to it. `verify.serving` starts it, sets its environment and turns the result into verdicts.

REQUEST.json
    checkpoint          directory
    prompts             [{kind, text | token_ids | messages, repeat?: tokens, limit?: tokens}]
    max_tokens          greedy tokens per prompt
    dtype               "auto" | "float32" | "bfloat16"
    max_model_len       tokens (prompts are cut to fit)
    trust_remote_code   bool
    seed                int
    capture_logits      path of a .safetensors file for `prompt.<i>.token_ids` [T] and `prompt.<i>.logits` [T, V]
                        (float32, row t predicts token t + 1), or null
    kv_cache_bytes      size of the KV cache on a CPU, or null for vLLM's default
    moe_input_scales    "stored" | "collapsed" (see vllm_cpu_nvfp4.register; CPU only)

RESULT.json (written .partial and renamed at every stage and at the end, also after an exception; keys always there)
    format 1; ok: no exception. stage: the stage reached, one of STAGES; error: null | {type, message, traceback}
    engine              {name, version, torch, python, platform, emulations, dtype, kv_cache_dtype}; emulations: what
                        ran as a torch emulation of ours because the platform has no kernel, [] on a GPU
    load                {seconds, tensors, missing: [{name, share, where}], missing_total}; share 1.0: never written.
                        Anything missing ends the run after the load with error type UnwrittenParameters
    layers              [{kind, cls, method, scheme, kernel, format, activations_quantized, count, example}]
    w4a4                true: every NVFP4 layer quantizes its activations; false: one does not; null: no such layer, or
                        a kernel this file does not know
    prompts             [{kind, tokens, nll, perplexity, text, sample_ids, sample, skipped}]; nll is the mean natural-log
                        loss per predicted token, null for one token; not finite values are written as strings
    perplexity          over all predicted tokens of all prompts
    nonfinite           null | {module, cls, kind, values}: the first module whose output held NaN or infinity
    seconds             {import, load, forward, generate}
    peak_rss_bytes      of this process
    logits              the path written, or null
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

STAGES = ("request", "import", "load", "forward", "generate", "done")
NOT_LOADED = ("k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point", "q_zero_point")
"""Parameters vLLM creates for every attention and fills itself when a checkpoint has none."""
WEIGHT_ONLY = ("MARLIN", "W4A16", "HUMMING")
QUANTIZING = ("EMULATION", "CUTLASS", "FLASHINFER", "FBGEMM", "B12X", "TORCHNVFP4", "CPUNVFP4", "CUTEDSL", "TRTLLM")
"""Marks in kernel and backend names, upper case: these run NVFP4 with weights only, these with activations too."""
MAX_REPORTED = 50


def main(request_path: str, result_path: str) -> int:
    """Run the stages and write RESULT; 0 when all ran, 1 when one raised."""
    result: dict[str, Any] = {
        "format": 1, "ok": False, "stage": STAGES[0], "error": None, "engine": {}, "load": {}, "layers": [],
        "w4a4": None, "prompts": [], "perplexity": None, "nonfinite": None, "seconds": {}, "peak_rss_bytes": 0,
        "logits": None,
    }  # fmt: skip
    try:
        run(json.loads(Path(request_path).read_text()), result, Path(result_path))
        result["ok"] = True
    except BaseException as error:  # the result must be written whatever happened, SystemExit included
        result["error"] = {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc().splitlines()[-40:],
        }
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(Path(result_path), result)
    return 0 if result["ok"] else 1


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
    """All stages; fills `result` as they go, so that it says how far they got when one raises."""

    def stage(name: str) -> float:
        result["stage"] = name
        write_json(result_path, result)  # what is known so far survives a crash of the engine
        print(f"[vllm_worker] {name}", flush=True)
        return time.monotonic()

    began = stage("import")
    emulations, vllm = import_engine(request)
    import torch
    from vllm.platforms import current_platform

    result["engine"] = {
        "name": "vllm", "version": vllm.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "platform": device_name(current_platform), "emulations": emulations, "dtype": None, "kv_cache_dtype": None,
    }  # fmt: skip
    result["seconds"]["import"] = time.monotonic() - began

    began = stage("load")
    load: dict[str, Any] = {"seconds": None, "tensors": 0, "missing": [], "missing_total": 0}
    result["load"] = load
    watch_loading(load)
    llm = build_engine(vllm, request, on_cpu=current_platform.is_cpu())
    result["seconds"]["load"] = load["seconds"] = time.monotonic() - began
    config = llm.llm_engine.vllm_config
    result["engine"] |= {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": config.cache_config.cache_dtype,
    }
    result["layers"] = llm.apply_model(describe_layers)[0]
    result["w4a4"] = all_activations_quantized(result["layers"])
    if load["missing"]:
        raise UnwrittenParameters(
            f"{load['missing_total']} parameters were not written, first {load['missing'][0]['name']}"
        )

    began = stage("forward")
    watch = ForwardWatch(result)
    llm.apply_model(watch.install)
    prompts = tokenize(llm, request, config.model_config)
    result["prompts"] = [entry for entry, _ in prompts]
    logits: dict[str, Any] = {}
    for number, (entry, ids) in enumerate(prompts):
        if ids:
            watch.begin(entry["kind"], len(ids), capture=bool(request.get("capture_logits")))
            score(llm, vllm, entry, ids)
            if watch.logits is not None:
                logits |= {f"prompt.{number}.logits": watch.logits, f"prompt.{number}.token_ids": torch.tensor(ids)}
    result["seconds"]["forward"] = time.monotonic() - began
    losses = [(e["nll"], e["tokens"] - 1) for e in result["prompts"] if e["nll"] is not None]
    if losses:
        result["perplexity"] = perplexity(sum(nll * n for nll, n in losses) / sum(n for _, n in losses))
    if logits:
        result["logits"] = write_logits(Path(request["capture_logits"]), logits)

    began = stage("generate")
    runnable = [(entry, ids) for entry, ids in prompts if ids]
    watch.begin("generation", 0, capture=False)
    sampling = vllm.SamplingParams(max_tokens=request["max_tokens"], temperature=0.0)
    outputs = llm.generate([{"prompt_token_ids": ids} for _, ids in runnable], sampling, use_tqdm=False)
    for (entry, _), output in zip(runnable, outputs, strict=True):
        entry["sample_ids"] = list(output.outputs[0].token_ids)
        entry["sample"] = output.outputs[0].text
    result["seconds"]["generate"] = time.monotonic() - began
    stage("done")


class UnwrittenParameters(Exception):
    """The checkpoint left parameters of the model unwritten; running it would prove nothing."""


def device_name(current_platform: Any) -> str:
    """The accelerator's name, or the platform's where it has none."""
    try:
        return str(current_platform.get_device_name())
    except (NotImplementedError, RuntimeError):
        return str(current_platform.device_type)


def import_engine(request: dict[str, Any]) -> tuple[list[str], Any]:
    """vLLM with the CPU plugin registered; returns what the plugin emulates (nothing on other platforms), and vLLM."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [p for p in sys.path if p and str(Path(p).resolve()) != here]
    import vllm

    sys.path.insert(0, here)
    try:
        import vllm_cpu_deepseek_v4
        import vllm_cpu_nvfp4
    finally:
        sys.path.remove(here)  # the names of the files next to this one must not shadow vLLM's imports
    emulations: list[str] = vllm_cpu_nvfp4.register(request.get("moe_input_scales", "stored"))
    config = json.loads((Path(request["checkpoint"]) / "config.json").read_text())
    if config.get("model_type") == "deepseek_v4":
        emulations += vllm_cpu_deepseek_v4.register(float32=request["dtype"] == "float32")
    return emulations, vllm


def build_engine(vllm: Any, request: dict[str, Any], on_cpu: bool) -> Any:
    """`vllm.LLM` in this process, eager, without prefix caching, prefilling any prompt in one step."""
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    checkpoint = Path(request["checkpoint"])
    cache = {"kv_cache_memory_bytes": request["kv_cache_bytes"]} if on_cpu and request.get("kv_cache_bytes") else {}
    return vllm.LLM(
        model=str(checkpoint),
        dtype=request["dtype"],
        max_model_len=request["max_model_len"],
        max_num_batched_tokens=max(request["max_model_len"], 2 * len(request["prompts"])),
        max_num_seqs=max(8, len(request["prompts"])),
        trust_remote_code=request["trust_remote_code"],
        seed=request["seed"],
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=not any((checkpoint / name).exists() for name in tokenizer_files),
        **cache,
    )


def watch_loading(load: dict[str, Any]) -> None:
    """Fill every parameter with a sentinel before vLLM loads weights, and list what still holds it afterwards.

    vLLM allocates quantized parameters uninitialised and accepts a checkpoint that lacks some of them.
    Sentinels: NaN for floats (0x7f bytes in E4M3), 0x5a bytes for integers. For bytes, where 0x5a can be data, a
    whole row must hold it. Rotary tables and other buffers are computed, not loaded, and are left alone.
    """
    import torch
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.load_weights

    def watched(model: Any) -> dict[str, Any]:
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if not parameter.is_meta and parameter.numel() and name.rsplit(".", 1)[-1] not in NOT_LOADED
            and not name.endswith("attn_sink")  # padded with -inf on purpose
            and not unused_input_scale(model, name)
        }  # fmt: skip

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        with torch.no_grad():
            for parameter in watched(model).values():
                if parameter.dtype.is_floating_point and parameter.element_size() > 1:
                    parameter.data.fill_(float("nan"))
                else:
                    fill = 0x7F if parameter.dtype.is_floating_point else 0x5A
                    parameter.data.contiguous().view(torch.uint8).fill_(fill)
        original(self, model, model_config)
        after = watched(model)
        load["tensors"] = len(after)
        problems = [p for name, parameter in after.items() if (p := unwritten(name, parameter.data)) is not None]
        problems += [
            {"name": name, "share": 1.0, "where": ""}
            for name, parameter in model.named_parameters()
            if name.endswith("attn_sink") and bool(torch.isneginf(parameter).all())
        ]
        load["missing"] = sorted(problems, key=lambda p: str(p["name"]))[:MAX_REPORTED]
        load["missing_total"] = len(problems)

    DefaultModelLoader.load_weights = load_weights


def unused_input_scale(model: Any, name: str) -> bool:
    """Whether the parameter is an input scale of weight-only experts: vLLM allocates it, no checkpoint has it."""
    method = getattr(model.get_submodule(name.rpartition(".")[0]), "quant_method", None)
    return name.endswith("input_global_scale") and bool(getattr(method, "use_a16", False))


def unwritten(name: str, data: Any) -> dict[str, Any] | None:
    """None when all of `data` was written, else `{name, share, where}`; where names the first indices left."""
    import torch

    if data.dtype.is_floating_point and data.element_size() > 1:
        left = torch.isnan(data)
    elif data.dtype.is_floating_point:
        left = data.contiguous().view(torch.uint8) & 0x7F == 0x7F
    elif data.element_size() > 1:
        left = data == int.from_bytes(b"\x5a" * data.element_size(), "little")
    else:
        same = data.contiguous().view(torch.uint8) == 0x5A
        left = same.all(dim=-1, keepdim=True).expand_as(same) if same.shape[-1] >= 8 else same.all().expand_as(same)
    count = int(left.sum())
    if count == 0:
        return None
    share = count / data.numel()
    where = ""
    if share < 1.0 and data.ndim:
        rows = left.reshape(data.shape[0], -1).any(dim=1).nonzero().flatten().tolist()
        where = f"index {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''} of dimension 0"
    return {"name": name, "share": share, "where": where}


def describe_layers(model: Any) -> list[dict[str, Any]]:
    """One entry per kind of linear, expert and attention layer: classes that run, how many, one name."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        backend = getattr(module, "attn_backend", None) or getattr(module, "backend_cls", None)
        if method is None and backend is None:
            continue
        scheme = getattr(module, "scheme", None)
        kernel = getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None)
        if backend is not None:
            kind, kernel_name = "attention", backend.get_name()
        elif type(module).__name__ == "RoutedExperts":
            kind = "experts"
            gpu_backend = getattr(method, "nvfp4_backend", None) or getattr(method, "unquantized_backend", None)
            experts = getattr(method, "experts_cls", None)
            names = (getattr(method, "backend_name", None), getattr(gpu_backend, "name", None))
            kernel_name = " ".join(filter(None, (*names, getattr(experts, "__name__", None))))
        else:
            kind = "embedding" if "Embedding" in type(module).__name__ else "linear"
            kernel_name = type(kernel).__name__ if kernel is not None else ""
        nvfp4 = "nvfp4" in f"{type(method).__name__} {type(scheme).__name__}".lower().replace("w4a4fp4", "nvfp4")
        use_a16 = bool(getattr(scheme, "use_a16", getattr(method, "use_a16", False)))
        key = (kind, type(module).__name__, type(method).__name__, type(scheme).__name__, kernel_name)
        entry = found.setdefault(
            key,
            {
                "kind": kind, "cls": key[1], "method": key[2] if method is not None else "",
                "scheme": key[3] if scheme is not None else "", "kernel": kernel_name,
                "format": "nvfp4" if nvfp4 else ("fp8" if "fp8" in f"{key[2]} {key[3]}".lower() else ""),
                "activations_quantized": quantizes(kernel_name, use_a16) if nvfp4 else None,
                "count": 0, "example": name,
            },
        )  # fmt: skip
        entry["count"] += 1
    return list(found.values())


def quantizes(kernel: str, use_a16: bool) -> bool | None:
    """Whether an NVFP4 kernel quantizes activations, by its name; None for a name not known."""
    name = kernel.upper()
    if use_a16 or any(mark in name for mark in WEIGHT_ONLY):
        return False
    return True if any(mark in name for mark in QUANTIZING) else None


def all_activations_quantized(layers: list[dict[str, Any]]) -> bool | None:
    """The `w4a4` of the result."""
    states = {entry["activations_quantized"] for entry in layers if entry["format"] == "nvfp4"}
    if not states:
        return None
    return False if False in states else (None if None in states else True)


class ForwardWatch:
    """Forward hooks on every module: the first output that is not finite, and the logits of a prompt's positions."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.kind = ""
        self.tokens = 0
        self.capture = False
        self.logits: Any = None

    def begin(self, kind: str, tokens: int, capture: bool) -> None:
        """Name what runs next; with `capture`, keep the logits of its first forward of `tokens` rows."""
        self.kind, self.tokens, self.capture, self.logits = kind, tokens, capture, None

    def install(self, model: Any) -> None:
        """Hook every module of `model`; children run before their parents, so the innermost one is named."""
        for name, module in model.named_modules():
            module.register_forward_hook(self._finite(name or "the model"))
        model.register_forward_hook(self._keep_logits)

    def _finite(self, name: str) -> Any:
        import torch

        def hook(module: Any, _inputs: Any, output: Any) -> None:
            if self.result["nonfinite"] is not None:
                return
            for tensor in output if isinstance(output, list | tuple) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.element_size() > 1:
                    bad = int((~torch.isfinite(tensor)).sum())
                    if bad:
                        self.result["nonfinite"] = {
                            "module": name, "cls": type(module).__name__, "kind": self.kind, "values": bad,
                        }  # fmt: skip
                        return

        return hook

    def _keep_logits(self, model: Any, _inputs: Any, output: Any) -> None:
        if self.capture and self.logits is None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.logits = model.compute_logits(hidden[: self.tokens]).float().cpu().contiguous()


def tokenize(llm: Any, request: dict[str, Any], model_config: Any) -> list[tuple[dict[str, Any], list[int]]]:
    """Token ids of every prompt, cut so that prompt and sample fit; an entry without ids says why in `skipped`.

    Without a tokenizer, text becomes as many seeded random token ids as it has words.
    """
    tokenizer = None if model_config.skip_tokenizer_init else llm.get_tokenizer()
    vocabulary = model_config.get_vocab_size()
    room = request["max_model_len"] - request["max_tokens"] - 1
    chooser = random.Random(request["seed"])
    prompts: list[tuple[dict[str, Any], list[int]]] = []
    for prompt in request["prompts"]:
        skipped, ids, text = None, [], prompt.get("text")
        if "token_ids" in prompt:
            ids = list(prompt["token_ids"])
        elif "messages" in prompt:
            try:
                assert tokenizer is not None, "no tokenizer"
                text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
                ids = list(tokenizer.encode(text, add_special_tokens=False))
            except (AssertionError, ValueError, TypeError) as error:  # transformers raises ValueError: no template
                skipped = f"no chat template: {str(error).splitlines()[0]}"
        elif tokenizer is None:
            ids = [chooser.randrange(vocabulary) for _ in str(text).split()]
        else:
            ids = list(tokenizer.encode(text))
        if "repeat" in prompt:
            ids = ids[-1:] * prompt["repeat"]
        ids = ids[-prompt["limit"] :] if "limit" in prompt else ids
        ids = ids[:room]
        if any(not 0 <= token < vocabulary for token in ids):
            skipped, ids = f"a token id lies outside the vocabulary of {vocabulary}", []
        entry = {
            "kind": prompt["kind"], "tokens": len(ids), "nll": None, "perplexity": None, "text": text,
            "sample_ids": [], "sample": "", "skipped": skipped or (None if ids else "no tokens"),
        }  # fmt: skip
        prompts.append((entry, ids))
    return prompts


def score(llm: Any, vllm: Any, entry: dict[str, Any], ids: list[int]) -> None:
    """One prefill of one prompt: its mean loss per predicted token, from the engine's prompt log-probabilities."""
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    found = [row[token].logprob for row, token in zip(output.prompt_logprobs, ids, strict=True) if row is not None]
    if found:
        entry["nll"] = -sum(found) / len(found)
        entry["perplexity"] = perplexity(entry["nll"])


def perplexity(nll: float) -> float:
    """exp, with infinity instead of an overflow."""
    return math.exp(nll) if nll < 700 else (nll if math.isnan(nll) else math.inf)


def write_logits(path: Path, tensors: dict[str, Any]) -> str:
    """Safetensors, `.partial` and rename."""
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    save_file(tensors, str(partial))
    partial.replace(path)
    return str(path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2]))
