"""Turns the serving engine's result into verdicts: one table of checks, one function per judgment."""

from __future__ import annotations

from typing import Any

from calibration.checkpoint.dialect import is_nvidia
from calibration.checkpoint.source_config import routed_experts
from recipes.checks import Accuracy, Serving
from verify.accuracy.recovery import judge_accuracy
from verify.checks import Check, Verdict
from verify.serving import engine
from verify.serving.samples import complaint

#: id -> (what it proves, threshold, how).
CHECKS = {
    "load": (
        "the engine builds the model and loads the checkpoint", "no error", "vLLM in its own process, eager",
    ),
    "tensors": (
        "every parameter of the engine's model was written by the checkpoint", "0 left unwritten",
        "parameters filled with NaN or 0x5a before loading, searched after it",
    ),
    "w4a4": (
        "the kernels that ran quantize the activations too", "every NVFP4 layer",
        "classes of the layers and kernels that vLLM chose",
    ),
    "finite": (
        "no NaN and no infinity in the output of any module", "0",
        "forward hooks on every module, all prompts, windows of text and generated tokens",
    ),
    "logprobs": (
        "every token of prompts and text has a finite log-probability", "all",
        "the engine's prompt log-probabilities, one prompt or window at a time",
    ),
    "input_scales": (
        "experts' activation scales mean the same to kernels that keep one per expert and one per layer",
        "equal inside every layer, or within max_perplexity in both modes",
        "input global scales as the engine loaded them; where they differ the text is scored in both modes",
    ),
    "saturated_inputs": (
        "no NVFP4 layer is given values beyond what its input scale admits", "",
        "inputs in front of the engine's kernels (experts: of gate/up), all prompts, windows of text and generated tokens",
    ),
    "generate": (
        "the engine generates greedily for every kind of prompt", "a sample for each",
        "one batch of all prompts, temperature 0",
    ),
    "coherent": (
        "no sample is empty, loops or is no text, and no text is worse than guessed, unless the source's is too", "",
        "longest repeated cycle at the end of the sample's tokens; characters of its text; perplexity of the text against "
        "the vocabulary",
    ),
    "perplexity": (
        "the perplexity of the text is as low as the recipe asks", "", "windows of the text, mean over predicted tokens",
    ),
    "source": (
        "the served model predicts like its served source", "",
        "the source in vLLM in a process of its own, same tokens: full distributions, KL(source || output)",
    ),
    "accuracy": (
        "the served output scores in the recipe's tasks as its source does", "",
        "lm-eval on both in vLLM, same samples; share of the source's score, standard error paired by sample",
    ),
}  # fmt: skip
SATURATED = 1e-3
"""Share of a layer's input values beyond what its scale admits, above which a doubt is told (as fidelity.saturated_inputs)."""
FOREIGN = 0.1
"""Share above which the scale does not belong to what the layer is given: calibrated ones leave out a few outliers."""
NAMED = 3
"""Layers that the figure of saturated inputs names."""
Outcome = tuple[Verdict, str]
MAY_LOOP = ("repeated token", "single token")
"""Kinds of prompts with too little content to continue: an unquantized model loops there too."""


def judge(
    result: dict[str, Any], options: Serving, config: dict[str, Any], accuracy: Accuracy | None = None
) -> list[Check]:
    """The verdicts of one run (see `verify_serving` for `result`). Stages that the run did not reach are UNCHECKED;
    what does not concern the checkpoint, or was not requested by the recipe, has no check."""
    unserved = engine.platform_refusal(result)
    failure = None if unserved else engine.failure(result)
    found = _stages(result, options, failure)
    found |= {
        "coherent": _coherent(result, options, int(config.get("vocab_size") or 0)),
        "input_scales": _input_scales(result, options),
        "saturated_inputs": _saturated_inputs(result),
    }
    thresholds = {
        "coherent": f"loop <= {options.require.max_loop:.0%}, unprintable <= {options.require.max_unprintable:.0%}, "
        "perplexity < vocabulary",
        "saturated_inputs": f"<= {SATURATED:.1%} in each layer, FAIL > {FOREIGN:.0%}",
    }
    if_asked = ("w4a4", "input_scales", "saturated_inputs", "perplexity", "source", "accuracy")
    wanted = [name for name in CHECKS if name not in if_asked]
    if _asks_for_w4a4(config):
        wanted += ["w4a4", "saturated_inputs"]
        if result.get("input_scales") or (not result.get("layers") and routed_experts(config)):
            wanted.append("input_scales")
    if options.require.max_perplexity is not None:
        wanted.append("perplexity")
        found["perplexity"] = _perplexity(result, options, options.require.max_perplexity)
        thresholds["perplexity"] = f"<= {options.require.max_perplexity:g}"
    if result.get("source") is not None:
        wanted.append("source")
        found["source"], thresholds["source"] = _source(result["source"], result.get("perplexity"), options)
    if accuracy is not None:
        wanted.append("accuracy")
        thresholds["accuracy"] = f">= {accuracy.min_recovery:.1%} in every task"
        found["accuracy"] = judge_accuracy(result, accuracy) if result.get("accuracy") else None
    reason = f"not reached: {failure.splitlines()[0]}" if failure else "not reached"
    stopped: Outcome = ("UNCHECKED", unserved or reason)
    checks = []
    for name, (what, threshold, how) in CHECKS.items():
        if name in wanted:
            verdict, figure = found.get(name) or stopped
            checks.append(Check(f"serving.{name}", verdict, what, figure, thresholds.get(name, threshold), how))
    return checks


def _stages(result: dict[str, Any], options: Serving, failure: str | None) -> dict[str, Outcome | None]:
    """The outcomes of the engine's stages: load, tensors, w4a4, finite, logprobs, generate."""
    verdicts: dict[str, Outcome | None] = {}
    load, prompts = result.get("load", {}), result.get("prompts", [])
    loaded, missing = bool(result.get("layers")), load.get("missing", [])
    if loaded:
        about = result.get("engine", {})
        described = f"vLLM {about.get('version')} on {about.get('platform')}, {about.get('dtype')}"
        kernels = _kernels(result["layers"], "fp8")
        notes = [f"FP8: {kernels}"] if kernels else []
        notes += [
            f"{name} {answer}" for name, answer in about.get("processor", {}).items() if answer in ("hidden", "claimed")
        ]
        verdicts["load"] = ("PASS", "; ".join([f"{described}, {load.get('seconds') or 0:.1f} s", *notes]))
    elif failure is not None:
        verdicts["load"] = ("FAIL", failure)
    if missing:
        names = ", ".join(
            f"{m['name']} ({m['share']:.0%}{' at ' + m['where'] if m['where'] else ''})" for m in missing[:5]
        )
        verdicts["tensors"] = ("FAIL", f"{load.get('missing_total', len(missing))} left: {names}")
    elif loaded:
        verdicts["tensors"] = ("PASS", f"0 of {load.get('tensors', 0)}")
        verdicts["w4a4"] = _w4a4(result)

    bad, windows = result.get("nonfinite"), result.get("windows", [])
    generated = [p for p in prompts if p.get("sample_ids")]
    if bad is not None:
        strict: Verdict = "FAIL" if options.require.finite else "WARN"
        where = f"{bad['values']} values in {bad['module']} ({bad['cls']}), prompt: {bad['kind']}"
        verdicts["finite"] = (strict, where)
    elif result.get("ok"):
        text = f", {len(windows)} windows of text" if windows else ""
        verdicts["finite"] = ("PASS", f"0 in {len(generated)} prompts and their samples{text}")
    unscored = [p["kind"] for p in (*prompts, *windows) if isinstance(p.get("nll"), str)]
    ran = result.get("stage") in ("generate", "accuracy", "done")
    if unscored:
        verdicts["logprobs"] = ("FAIL", f"not finite: {', '.join(unscored)}")
    elif result.get("perplexity") is not None and ran:
        judged = "" if options.require.max_perplexity is not None else "; not judged, require.max_perplexity is not set"
        verdicts["logprobs"] = ("PASS", f"perplexity {_number(result['perplexity'])} {_measured(result)}{judged}")
    skipped = [f"{p['kind']}: {p['skipped']}" for p in prompts if p.get("skipped")]
    if result.get("ok"):
        note = f"; not run: {'; '.join(skipped)}" if skipped else ""
        every = len(generated) == len(prompts) - len(skipped) and generated
        verdicts["generate"] = ("PASS" if every else "FAIL", f"{len(generated)} samples{note}")
    elif loaded and not missing and failure is not None:
        verdicts["generate" if ran else "logprobs"] = ("FAIL", failure)
    return verdicts


def _w4a4(result: dict[str, Any]) -> Outcome:
    kernels = _kernels(result["layers"], "nvfp4")
    if not kernels:
        return "FAIL", "config.json says NVFP4, but the engine runs no NVFP4 layer"
    if result.get("w4a4") is True:
        return "PASS", kernels
    why = "weight-only kernel, activations stay unquantized" if result.get("w4a4") is False else "unknown kernel"
    return "UNCHECKED", f"{why}: {kernels}"


def _coherent(result: dict[str, Any], options: Serving, vocabulary: int) -> Outcome | None:
    if not result.get("ok"):
        return None
    limits = options.require
    own: list[str] = []
    inherited: list[str] = []
    total = 0
    for prompt in result["prompts"]:
        if prompt.get("skipped"):
            continue
        total += 1
        may_loop = prompt["kind"] in MAY_LOOP
        wrong = complaint(prompt["sample_ids"], prompt["sample"], limits.max_loop, limits.max_unprintable, may_loop)
        if wrong is None:
            continue
        text = prompt.get("source_text")
        ids = prompt.get("source_ids", [])
        excused = text is not None and complaint(ids, text, limits.max_loop, limits.max_unprintable, may_loop)
        (inherited if excused else own).append(f"{prompt['kind']}: {wrong}")
    source = result.get("source") or {}
    if result.get("windows") and vocabulary:
        total += 1
        if _guessed(result["perplexity"], vocabulary):
            text = f"text: perplexity {_number(result['perplexity'])}, worse than guessing among {vocabulary} tokens"
            (inherited if source.get("ok") and _guessed(source["perplexity"], vocabulary) else own).append(text)
    if own:
        unknown = "" if source.get("ok") else " (the source was not served: it may be the same there)"
        return ("FAIL" if limits.coherent else "WARN"), f"{len(own)} of {total}{unknown}: {'; '.join(own)}"
    if inherited:
        return "PASS", f"{len(inherited)} of {total}, and the source's own too: {'; '.join(inherited)}"
    return "PASS", f"none of {total}"


def _guessed(perplexity: Any, vocabulary: int) -> bool:
    return not (isinstance(perplexity, int | float) and perplexity < vocabulary)


def _input_scales(result: dict[str, Any], options: Serving) -> Outcome | None:
    scales = result.get("input_scales")
    if not scales:
        return None
    layers, shared = scales["layers"], scales["shared"]
    counted = f"{scales['experts']} experts in {layers} layers"
    if shared == layers:
        return "PASS", f"both modes are the same: {counted} hold one scale per layer for gate/up and one for down"
    differ = f"they differ in {layers - shared} of {layers} layers ({scales['experts']} experts)"
    other = scales.get("other")
    if other is None:
        if result.get("ok") and scales["mode"] == "kernel":
            return (
                "UNCHECKED",
                f"{differ}; the engine's kernels know one mode only: {_kernels(result['layers'], 'nvfp4')}",
            )
        return "UNCHECKED", differ
    here, there = result.get("perplexity"), other.get("perplexity")
    figure = (
        f"{differ}; perplexity {_number(here)} {scales['mode']}, {_number(there)} {other['mode']}, "
        f"KL {_number(other['kl'])}, top-1 {_percent(other['top1'])} over {other['tokens']} tokens; "
        "export.input_global_scale: shared makes both the same"
    )
    limit = options.require.max_perplexity
    broken = not _finite(there) or (limit is not None and there > limit)
    return ("FAIL" if broken else "WARN"), figure


def _saturated_inputs(result: dict[str, Any]) -> Outcome | None:
    found = result.get("given_inputs")
    if found is None:
        return ("UNCHECKED", "the engine runs no W4A4 layer") if result.get("ok") else None
    missed = ", ".join(f"{count} {why}" for why, count in found["not_looked_at"].items())
    if not found["layers"]:
        return "UNCHECKED", f"no layer could be looked at: {missed}"
    worst = [layer for layer in found["worst"] if layer["share"] > 0]
    share = worst[0]["share"] if worst else 0.0
    named = [layer for layer in worst[:NAMED] if layer["share"] > SATURATED] or worst[:1]
    figure = [f"{found['saturated']} of {found['layers']} layers are given such values"]
    figure += [
        f"{layer['module']}: {100 * layer['share']:.2g}% of its values, up to {_number(layer['seen'])} where "
        f"{_number(layer['admitted'])} is admitted"
        for layer in named
    ]
    figure += [f"not looked at: {missed}"] if missed else []
    return ("FAIL" if share > FOREIGN else "WARN" if share > SATURATED else "PASS"), "; ".join(figure)


def _perplexity(result: dict[str, Any], options: Serving, limit: float) -> Outcome | None:
    found = result.get("perplexity")
    if found is None:
        return None
    if options.text is not None and not result.get("windows"):
        return "UNCHECKED", "the text was not scored: the checkpoint has no tokenizer"
    verdict: Verdict = "PASS" if _finite(found) and found <= limit else "FAIL"
    return verdict, f"{_number(found)} {_measured(result)}"


def _source(source: dict[str, Any], perplexity: Any, options: Serving) -> tuple[Outcome, str]:
    """Outcome and threshold of the comparison with the served source; `perplexity` is the output's."""
    limits = options.require
    wanted = [f"KL <= {limits.max_kl:g}"] if limits.max_kl is not None else []
    wanted += [f"top-1 >= {limits.min_top1:.1%}"] if limits.min_top1 is not None else []
    wanted += [f"perplexity kept >= {limits.min_kept:.1%}"] if limits.min_kept is not None else []
    threshold, found = ", ".join(wanted), source.get("agreement")
    if found is None:
        reason = source.get("why") or engine.failure(source) or "no common tokens"
        return ("UNCHECKED", reason if "why" in source else f"the source was not compared: {reason}"), threshold
    error = f" +- {source['nll_error']:.3f}" if _finite(source.get("nll_error")) else ""
    difference = f"{source['nll_difference']:+.3f}{error}" if _finite(source.get("nll_difference")) else "not finite"
    figure = (
        f"KL {_number(found['kl'])}, top-1 {_percent(found['top1'])} over {found['tokens']} tokens; source perplexity "
        f"{_number(source.get('perplexity'))}, output {difference} nats"
    )
    if source.get("nonfinite") is not None:
        return ("UNCHECKED", f"{figure}; the source itself is not finite in {source['nonfinite']['module']}"), threshold
    if not wanted:
        return ("UNCHECKED", f"{figure}; not judged, require.max_kl, min_top1 and min_kept are not set"), threshold
    far = limits.max_kl is not None and not (_finite(found["kl"]) and found["kl"] <= limits.max_kl)
    other = limits.min_top1 is not None and not found["top1"] >= limits.min_top1
    before = source.get("perplexity")
    kept = before / perplexity if _finite(before) and _finite(perplexity) and perplexity else 0.0
    lost = limits.min_kept is not None and not kept >= limits.min_kept
    return ("FAIL" if far or other or lost else "PASS", figure), threshold


def _measured(result: dict[str, Any]) -> str:
    """The tokens over which the perplexity of `result` was measured."""
    windows = result.get("windows") or []
    scored = [p for p in windows or result.get("prompts", []) if p.get("nll") is not None]
    tokens = sum(p["tokens"] - 1 for p in scored)
    return (
        f"over {tokens} tokens of {len(windows)} windows of text" if windows else f"over {tokens} tokens of the prompts"
    )


def _kernels(layers: list[dict[str, Any]], stored: str) -> str:
    """The number of layers of a format by kernel."""
    counts: dict[str, int] = {}
    for layer in layers:
        if layer["format"] == stored:
            name = f"{layer['kind']} {layer['kernel'] or layer['method']}"
            counts[name] = counts.get(name, 0) + int(layer["count"])
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _asks_for_w4a4(config: dict[str, Any]) -> bool:
    declared = config.get("quantization_config") or {}
    if is_nvidia(declared) and not declared.get("config_groups"):
        return "NVFP4" in (str(declared.get(key)).upper() for key in ("moe_quant_algo", "quant_algo"))
    groups = declared.get("config_groups") or {}
    for group in groups.values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        if (weights.get("num_bits"), weights.get("type"), inputs.get("num_bits")) == (4, "float", 4):
            return True
    return False


def _finite(value: Any) -> bool:
    # The worker writes values that are not finite as text.
    return isinstance(value, int | float)


def _number(value: Any) -> str:
    return f"{value:.4g}" if _finite(value) else str(value)


def _percent(value: Any) -> str:
    return f"{value:.1%}" if _finite(value) else str(value)
