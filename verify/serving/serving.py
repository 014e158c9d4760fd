"""Serving: the real vLLM loads the checkpoint and, if it fits, its source, and runs both on the same tokens.

This module makes the requests; `engine` runs them, `verdicts` judges the results.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import read_json_or_none
from calibration.checkpoint.formats import Formats
from calibration.families.registry import language_config
from recipes.checks import Accuracy, Serving
from recipes.errors import EnvironmentProblem, RecipeError
from recipes.places import is_inside
from verify.accuracy.recovery import standard_error
from verify.accuracy.tasks import request as request_tasks
from verify.checks import Check
from verify.serving.draft_head import draft_head_checks
from verify.serving.engine import check_environment, check_tasks, run_engine
from verify.serving.verdicts import judge
from verify.unseen_text import help_text

PROMPT_ROOM = 512
"""Prompt tokens in the default context length, besides the sample; more than DeepSeek-V4's windows of 128."""
TASK_ROOM = 2048
"""Tokens in the default context length if tasks are scored; longer samples lose their beginning."""
AUTO_BYTES = 2 * 2**30
"""Largest source, in BF16 bytes, that `compare: auto` serves: larger ones need an explicit `compare: true`."""
LONGEST_TOKEN = 32
"""Characters of text that are read per token; runs of blanks have the most characters per token."""
_AROUND = 8
"""Tokens that a tokenizer may put around a text."""
DAYS = " ".join(
    f"On day {n} the ship sailed {7 * n} miles and the crew counted {3 * n + 1} birds." for n in range(1, 13)
)
CODE = "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +"
#: A directory in the logs, which may be the user's: it is removed with its contents, so its name must be ours alone.
_LOGITS = "logits-of-this-verification"


@dataclass(frozen=True)
class SourceToServe:
    """The source in a form that vLLM loads, or None and the reason; too_large: no comparison is wanted."""

    directory: Path | None
    why: str = ""
    too_large: bool = False


@dataclass(frozen=True)
class Extras:
    """What is asked beside the recipe's `serving`: the tasks to score, and whether the checkpoint's own code may run."""

    accuracy: Accuracy | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Experiment:
    """Options of the engine for tests and benchmarks, which recipes do not have; `verify/inside_vllm/worker.py`
    explains each.

    prompts: instead of the built-in kinds and the recipe's own. processor: what the CPU is pretended to have or lack.
    """

    prompts: list[dict[str, Any]] | None = None
    write_logits: Path | None = None
    moe_input_scales: str = "stored"
    processor: Mapping[str, bool] = field(default_factory=dict)


def default_prompts() -> list[dict[str, Any]]:
    """One prompt of every built-in kind, in the worker's format."""
    return [
        {"kind": "short", "text": "The capital of France is"},
        {"kind": "long", "text": DAYS},
        {"kind": "chat", "messages": [{"role": "user", "content": "Name three colors of the rainbow."}]},
        {"kind": "code", "text": CODE},
        {"kind": "repeated token", "text": " the", "repeat": 64},
        {"kind": "single token", "text": "The", "limit": 1},
        {"kind": "maximum length", "text": DAYS, "fill": True},
    ]


def check_serving(options: Serving, accuracy: Accuracy | None, *strangers: Path) -> str:
    """The version of vLLM. Raises EnvironmentProblem if there is none, if lm-eval cannot make the tasks of `accuracy`, or if
    the interpreter is inside one of the `strangers`, directories that could provide one of their own; RecipeError if the
    text to score or a task's file cannot be read. Takes seconds."""
    read_text(options)
    for directory in strangers:
        # Only the parent is resolved: an environment's python is a link to the system's.
        if is_inside(Path(options.python).absolute().parent, directory):
            raise EnvironmentProblem(
                f"{options.python}: lies inside the checkpoint {directory} (verify.serving.python), and would run what it "
                "brings; run the command from another directory, or name an interpreter outside"
            )
    version = check_environment(options.python)
    if accuracy is not None:
        check_tasks(options.python, request_tasks(accuracy))
    return version


def read_text(options: Serving) -> str | None:
    """As much of the recipe's text as its windows can use. Raises RecipeError for a file that cannot be read."""
    if options.text is None:
        return None
    most = options.windows * options.window_tokens * LONGEST_TOKEN
    if options.text == "bundled":
        return help_text()[:most]
    try:
        with Path(options.text).open(encoding="utf-8") as file:
            text = file.read(most)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"verify.serving.text: {options.text}: cannot be read as UTF-8 text: {error}; name a text file, or `bundled`"
        ) from None
    if not text.strip():
        raise RecipeError(f"verify.serving.text: {options.text}: holds no text; name another file, or `bundled`")
    return text


def context(options: Serving, config: dict[str, Any], accuracy: Accuracy | None) -> tuple[int, int]:
    """The context length to serve with, and how much of it a sample takes, both in tokens; the rest is left to a prompt.
    `config` is the language model's."""
    room = max(PROMPT_ROOM, TASK_ROOM if accuracy else 0, options.window_tokens if options.text else 0)
    longest = int(config.get("max_position_embeddings") or room + options.max_tokens)
    length = options.max_model_len or min(room + options.max_tokens, longest)
    return length, min(options.max_tokens, length // 2)


def prompt_problems(
    options: Serving, config: dict[str, Any], accuracy: Accuracy | None, count: Callable[[str], int]
) -> list[str]:
    """The recipe's prompts that do not fit the context length. `count` gives a text's tokens, and is not called for one whose
    bytes already fit."""
    length, sample = context(options, config, accuracy)
    room, problems = length - sample, []
    for number, text in enumerate(options.prompts, 1):
        # A token is a byte or more, beside those that a tokenizer puts around a text.
        if len(text.encode()) + _AROUND <= room or (tokens := count(text)) <= room:
            continue
        longest = int(config.get("max_position_embeddings") or 0)
        wanted = tokens + options.max_tokens
        raising = f", or set verify.serving.max_model_len: {wanted}" if not 0 < longest < wanted else ""
        problems.append(
            f"verify.serving.prompts: prompt {number} has {tokens:,} tokens, and a context of {length:,} leaves {room:,} beside "
            f"a sample of {sample}; shorten it{raising}"
        )
    return problems


def source_as_stored(source: Formats, options: Serving) -> SourceToServe | None:
    """The source as stored, if vLLM can load that on any machine (BF16, F16, F32) and `compare` allows its size; None
    if the recipe wants no comparison."""
    if options.compare is False:
        return None
    size = 2 * source.parameters
    if options.compare == "auto" and size > AUTO_BYTES:
        why = f"the source takes {size:,} bytes in BF16, `compare: auto` serves {AUTO_BYTES:,}; compare: true serves it"
        return SourceToServe(None, why, too_large=True)
    kinds = sorted({source.of(name).label for name in source.checkpoint.tensors} - {"plain"})
    if kinds:
        return SourceToServe(None, f"the source is stored in {', '.join(kinds)}, and no plain copy of it was given")
    return SourceToServe(source.checkpoint.directory)


def verify_serving(
    checkpoint: Path,
    options: Serving,
    log_dir: Path,
    *,
    extras: Extras | None = None,
    source: SourceToServe | None = None,
    experiment: Experiment | None = None,
) -> tuple[list[Check], dict[str, Any]]:
    """Serve `checkpoint`, then `source` if there is one to serve, and judge the results.

    Leaves requests, results and logs of both processes in `log_dir`. Returns the checks and the worker's result without
    the prompts' token ids, with `samples` [{kind, prompt, text, source_text}], `text` (what was scored) and `source`
    added: None, or the source worker's result without its prompts and with `nll_difference` and `nll_error`, or `{"ok":
    false, "why": ...}`. experiment: options that recipes do not have. Raises EnvironmentProblem if there is no vLLM,
    RecipeError if the text cannot be read.
    """
    config = language_config(read_json_or_none(checkpoint / "config.json") or {})
    experiment, extras = experiment or Experiment(), extras or Extras()
    if extras.accuracy:
        options = options.model_copy(update={"timeout": options.timeout + extras.accuracy.timeout})
    own = [{"kind": f"recipe {n}", "text": text} for n, text in enumerate(options.prompts, 1)]
    length, sample = context(options, config, extras.accuracy)
    text = read_text(options)
    request: dict[str, Any] = {
        "checkpoint": str(checkpoint.resolve()),
        "prompts": default_prompts() + own if experiment.prompts is None else experiment.prompts,
        "windows": text and {"text": text, "count": options.windows, "tokens": options.window_tokens},
        "max_tokens": sample,
        "dtype": options.dtype,
        "max_model_len": length,
        "trust_remote_code": extras.trust_remote_code,
        "seed": 0,
        "write_logits": str(experiment.write_logits.resolve()) if experiment.write_logits else None,
        "compare_logits": None,
        "kv_cache_bytes": kv_cache_bytes(config, length),
        "moe_input_scales": experiment.moe_input_scales,
        "processor": dict(experiment.processor),
        "accuracy": request_tasks(extras.accuracy) if extras.accuracy else None,
    }
    if source is not None and source.directory is not None:
        room = options.windows * options.window_tokens * int(config.get("vocab_size") or 0) * 4
        log_dir.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(log_dir).free < 2 * room:
            source = SourceToServe(None, f"logits of {room:,} bytes do not fit beside {log_dir}")
        else:
            request["write_logits"] = str((log_dir / _LOGITS).resolve())
    try:
        result = run_engine(request, options, log_dir, "serving")
        result["source"] = None if source is None else _serve_source(source, request, result, options, log_dir)
    finally:
        shutil.rmtree(log_dir / _LOGITS, ignore_errors=True)
    result["text"] = options.text if result.get("windows") else None
    result["scored"] = _scored(result)
    result["samples"] = samples(result)
    checks = judge(result, options, config, extras.accuracy) + draft_head_checks(checkpoint, config)
    for entry in (*result.get("prompts", []), *result.get("windows", [])):  # they are in the worker's own result
        entry.pop("token_ids", None)
        entry.pop("source_ids", None)
    return checks, result


def _scored(result: dict[str, Any]) -> dict[str, Any]:
    """What the perplexity is of: windows of text or the prompts, their number, tokens, and SHA-256 of the token ids, by
    which runs on the same text are found."""
    kind = "windows" if result.get("windows") else "prompts"
    ids = [entry.get("token_ids") or [] for entry in result.get(kind) or []]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest() if ids else None
    return {"kind": kind, "count": len(ids), "tokens": sum(map(len, ids)), "digest": digest}


def _serve_source(
    source: SourceToServe, request: dict[str, Any], ours: dict[str, Any], options: Serving, log_dir: Path
) -> dict[str, Any]:
    """Runs the source on the tokens that `ours` ran on. Adds `source_text` to the prompts of `ours`."""
    if source.directory is None or not ours.get("ok"):
        return {"ok": False, "why": source.why or "the checkpoint itself was not served to the end"}
    config = language_config(read_json_or_none(source.directory / "config.json") or {})
    request = request | {
        "checkpoint": str(source.directory.resolve()),
        "prompts": [{key: p[key] for key in ("kind", "text", "token_ids")} for p in ours["prompts"]],
        "windows": {"token_ids": [w["token_ids"] for w in ours["windows"]]} if ours["windows"] else None,
        "write_logits": None,
        "compare_logits": request["write_logits"],
        "kv_cache_bytes": kv_cache_bytes(config, request["max_model_len"]),
    }
    result = run_engine(request, options, log_dir, "source")
    for mine, its in zip(ours["prompts"], result.get("prompts", []), strict=False):
        mine["source_text"], mine["source_ids"] = its["sample"], its["sample_ids"]
    measured = "windows" if ours["windows"] else "prompts"
    result |= nll_difference(ours[measured], result.get(measured, []))
    return {key: value for key, value in result.items() if key not in ("prompts", "windows")}


def nll_difference(ours: Sequence[dict[str, Any]], source: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """`nll_difference`: ours minus the source's, mean over the pairs of windows in nats per token; `nll_error`: its
    standard error. None if there are too few finite ones."""
    losses = [(a["nll"], b["nll"]) for a, b in zip(ours, source, strict=False)]
    found = [a - b for a, b in losses if isinstance(a, int | float) and isinstance(b, int | float)]
    mean = sum(found) / len(found) if found else None
    error = standard_error(found) if len(found) > 1 else None
    return {"nll_difference": mean, "nll_error": error}


def kv_cache_bytes(config: dict[str, Any], length: int) -> int:
    """A CPU KV cache for two sequences of `length` tokens in float32, at least 64 MiB; upper bound for any family."""
    heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)
    width = int(
        config.get("head_dim") or int(config.get("hidden_size") or 0) // int(config.get("num_attention_heads") or 1)
    )
    return max(64 << 20, 2 * length * int(config.get("num_hidden_layers") or 1) * 2 * heads * width * 4)


def samples(result: dict[str, Any]) -> list[dict[str, Any]]:
    """`[{kind, prompt, text, source_text}]` of the generated samples, the recipe's own first; source_text is None if
    the source was not served."""
    found = [
        {
            "kind": p["kind"], "prompt": p.get("text") or f"{p['tokens']} tokens", "text": p["sample"],
            "source_text": p.get("source_text"),
        }
        for p in result.get("prompts", [])
        if p.get("sample_ids")
    ]  # fmt: skip
    return sorted(found, key=lambda s: not str(s["kind"]).startswith("recipe"))
