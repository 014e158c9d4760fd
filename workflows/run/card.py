"""The model card README.md of an output checkpoint: how to serve and to verify it, what was proven, how it was made."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence

import yaml

from calibration.checkpoint.files import is_file, read_json_or_none
from calibration.families.family import ROUTED
from calibration.families.registry import language_config
from calibration.families.serving import GPU_BYTES, gpus, serve_arguments
from calibration.plan.task import Task
from calibration.plan.versions import versions
from recipes.portable import portable_recipe, revision, source_name
from recipes.units import size
from verify.accuracy.recovery import Recovery, recoveries
from verify.checks import Check, level_verdicts
from verify.report.facts import Facts, measured_quality, was_served
from verify.report.tables import markdown, markdown_text
from workflows.inspect_checkpoint import headroom
from workflows.run.card_metadata import metadata

#: Stands in a card for the repository until it is published (`workflows.publish`).
REPOSITORY = "OWNER/NAME"
#: A line that Markdown does not show: the repository that the card names now.
MARK = "[//]: # (repository: {})"
_UNVERIFIED = "Not verified yet: every level is UNCHECKED."


def model_card(task: Task, checks: Sequence[Check], facts: Mapping[str, str], measured: Facts | None = None) -> str:
    """The card as Markdown. `facts` are additional rows of its table (calibration data, tokens per expert); `measured` is what
    serving measured. Names of files and of data stand in it, no path of the machine."""
    recipe, measured = task.recipe, measured or Facts()
    scored = recoveries(measured.served) if was_served(checks) else []
    yaml_text = yaml.safe_dump(portable_recipe(recipe), sort_keys=False, width=120).rstrip()
    verdicts = ", ".join(f"{level} {verdict}" for level, verdict in level_verdicts(checks).items())
    sections = {
        "Serve": _serve(task),
        "Measured": _measured(checks, measured),
        "Accuracy": _accuracy(scored),
        f"Verification: {verdicts}": markdown(checks) if checks else _UNVERIFIED,
        "Limits": _limits(checks),
        "Verify it yourself": _verify(),
        "Recipe": _fenced(yaml_text, "yaml"),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"""---
{yaml.safe_dump(metadata(task, scored), sort_keys=False, allow_unicode=True).rstrip()}
---

{MARK.format(REPOSITORY)}

# {markdown_text(recipe.output.rstrip("/").rpartition("/")[2])}

Tensor names are the source's own. {_kept(task)}

| | |
|---|---|
{_table(task, facts)}

{body}
"""


def _kept(task: Task) -> str:
    """What became of the tensors that are not quantized."""
    plan = task.plan
    counts = Counter(step.action for step in plan.steps.values() if step.outputs)
    other = [
        (counts["rescale"], "that smoothing multiplied by powers of two"),
        (counts["cast"], f"written in {task.recipe.export.plain_dtype}"),
    ]
    told = " and ".join(f"{count:,} tensors {what}" for count, what in other if count)
    return f"What is not quantized is byte-identical to the source{f', but for {told}' if told else ''}."


def _table(task: Task, facts: Mapping[str, str]) -> str:
    recipe, plan, source = task.recipe, task.plan, task.source
    groups = "; ".join(f"{name}: {s.name}, {len(plan.modules(name)):,} modules" for name, s in plan.groups.items())
    commit, place = revision(recipe.source), recipe.calibration.dataset if recipe.calibration else ""
    name = portable_recipe(recipe).get("calibration") or {}
    rows = {
        "source": source_name(recipe.source) + (f" @ {commit}" if commit else ""),
        "family": plan.family.described,
        "quantized": groups,
        "parameters": f"{plan.parameters:,}",
        "size": f"{plan.output_bytes:,} bytes (source {source.total_bytes:,}), {plan.bits_per_parameter:.3f} bits per parameter",
        **({"input scales": headroom(plan.input_headroom)} if plan.input_headroom else {}),
        **{key: value.replace(place, name["dataset"]) if place else value for key, value in facts.items()},
        "versions": ", ".join(f"{package} {number}" for package, number in versions().items()),
        "plan": plan.digest,
    }
    return "\n".join(f"| {key} | {markdown_text(value)} |" for key, value in rows.items())


def _serve(task: Task) -> str:
    config, nbytes = language_config(task.source.config), task.plan.output_bytes
    chats = task.family.encoding is not None or _has_template(task)
    experts = any(task.family.place(module).part == ROUTED for module in task.plan.quantized)
    words = [f"vllm serve {REPOSITORY}", *serve_arguments(config, nbytes, chats, experts)]
    command = re.sub(r" (?=--)", " \\\n    ", " ".join(words[:1] + [shlex.quote(word) for word in words[1:]]))
    count = gpus(config, nbytes)
    fit = (
        f"{count} GPU{'s' if count > 1 else ''} of {size(GPU_BYTES)}"
        if count
        else f"more than this command names ({size(GPU_BYTES)} each)"
    )
    return f"""{_fenced(command, "sh")}

- Minimum memory: {size(nbytes)} for the weights on all GPUs together, and a third more for KV cache and activations: {fit}.
- NVFP4 with quantized activations (W4A4) needs Blackwell. Other GPUs serve it with BF16 activations.
- The arguments are those of vLLM 0.32. Raise `--max-model-len` as far as memory admits."""


def _has_template(task: Task) -> bool:
    directory = task.source.directory
    if any(is_file(path) for path in directory.glob("chat_template*")):
        return True
    return bool((read_json_or_none(directory / "tokenizer_config.json") or {}).get("chat_template"))


def _measured(checks: Sequence[Check], measured: Facts) -> str:
    quality = measured_quality(checks, measured)
    if quality is None:
        return ""

    def shown(value: float | None, form: str) -> str:
        return "not finite" if value is None else format(value, form)

    rows = {
        "perplexity": (shown(quality.source_perplexity, ".3f"), shown(quality.perplexity, ".3f")),
        "mean loss, nats per token": ("", f"{shown(quality.difference, '+.4f')} +- {shown(quality.error, '.4f')}"),
        "KL(source, output), nats": ("", shown(quality.kl, ".4f")),
        "same most likely token": ("", shown(quality.top1, ".1%")),
    }
    lines = [f"| {name} | {source} | {output} |" for name, (source, output) in rows.items()]
    head = "On the same text, source and output served by vLLM:\n\n| | source | this model |\n|---|---|---|"
    return "\n".join([head, *lines, f"\nQuality: {quality.grade}."])


def _accuracy(scored: Sequence[Recovery]) -> str:
    if not scored:
        return ""

    def row(found: Recovery) -> str:
        error = f" +- {found.error:.1%}" if found.error is not None else ""
        source = f"{found.source:.3f}" if found.source is not None else ""
        kept = f"{found.recovered:.1%}{error}" if found.recovered is not None else found.open
        cells = (f"{found.task} ({found.metric})", source, f"{found.output:.3f}", kept, f"{found.samples}")
        return "| " + " | ".join(map(markdown_text, cells)) + " |"

    head = "lm-eval, on the same samples:\n\n| task | source | this model | kept | samples |\n|---|---|---|---|---|"
    return "\n".join([head, *map(row, scored)])


def _limits(checks: Sequence[Check]) -> str:
    """What was not proven, and what gave a doubt: nobody should have to look for it in a table of passes."""
    found = [check for check in checks if check.verdict in ("UNCHECKED", "WARN", "FAIL")]
    lines = [f"- {check.verdict} {check.id}: {markdown_text(check.figure[:400])}" for check in found]
    missing = [level for level, verdict in level_verdicts(checks).items() if verdict == "UNCHECKED"]
    silent = [level for level in missing if not any(check.id.startswith(f"{level}.") for check in checks)]
    return "\n".join([*lines, *(f"- UNCHECKED {level}: it was not run" for level in silent)])


def _verify() -> str:
    command = f"python -m verify {REPOSITORY}\npython -m verify {REPOSITORY} --source SOURCE --prove"
    return (
        "With the project that made it (nvfp4-workflows). The second command derives again from the source every byte that "
        f"follows from it and the recipe; `provenance.json` says how it was made.\n\n{_fenced(command, 'sh')}"
    )


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
