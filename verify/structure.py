"""Structure: the output checkpoint against its plan, or, without a source, against its own config.

Headers first, then one streaming read of every tensor; memory is one tensor at a time.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from calibration.checkpoint.config import output_config
from calibration.checkpoint.families import Family, family_of
from calibration.checkpoint.formats import Formats, module_of
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import INDEX_NAME, Checkpoint
from calibration.checkpoint.nvfp4 import GROUP
from calibration.checkpoint.plan import Plan
from recipes.errors import SourceError, WorkflowError
from verify.checks import Check, Verdict

Progress = Callable[[int, int], None]
_SCALES = (".weight_scale", ".weight_global_scale", ".input_global_scale")


def verify_structure(
    directory: Path, plan: Plan | None = None, source: Checkpoint | None = None, progress: Progress | None = None
) -> list[Check]:
    """Checks the checkpoint in `directory`. With `plan` and `source` it must equal the plan; without them what needs a
    source is UNCHECKED. `progress(done, total)` counts bytes read. Never raises for a broken checkpoint."""
    try:
        output = Checkpoint.open(directory)
    except SourceError as error:
        return [_check("structure.open", "headers, index and shards fit together", error.problems, "headers")]
    checks = [_check("structure.open", "headers, index and shards fit together", [], "headers")]
    checks.append(
        _check("structure.files", "no shard beside the index, nothing half written", _stray(output), "listing")
    )
    try:
        family = family_of(output.config)
        formats = Formats(output)
    except WorkflowError as error:
        return [
            *checks,
            _check("structure.formats", "every low-bit weight has its companions", error.problems, "headers"),
        ]
    checks.append(_check("structure.formats", "every low-bit weight has its companions", [], "headers"))
    checks += _against_plan(output, plan, source)
    checks.append(_check("structure.companions", "NVFP4 sets are complete and fit", _companions(output), "headers"))
    checks.append(_check("structure.targets", "config targets name what is quantized, and only that",
                         _target_problems(output, family), "config.json against headers"))  # fmt: skip
    return checks + _values(output, formats, family, plan, source, progress)


def _check(id: str, what: str, problems: list[str], how: str) -> Check:
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    return Check(id, "FAIL" if problems else "PASS", what, shown or "no problem", "no problem", how)


def _unchecked(id: str, what: str, why: str) -> Check:
    return Check(id, "UNCHECKED", what, why, "", "not run")


def _stray(output: Checkpoint) -> list[str]:
    expected = set(output.shards)
    return [
        f"{path.name}: {'left half written' if path.suffix == '.partial' else 'not in the index'}"
        for path in sorted(output.directory.iterdir())
        if path.suffix == ".partial" or (path.suffix == ".safetensors" and path.name not in expected)
    ]


def _against_plan(output: Checkpoint, plan: Plan | None, source: Checkpoint | None) -> list[Check]:
    tensors, bits = "every planned tensor, nothing else, right dtype, shape and shard", "bits per parameter as planned"
    config, total = "config.json is the source's but for what serving needs", "index total_size equals the bytes"
    checks = [_check("structure.total_size", total, _total_size(output), "headers against index")]
    if plan is None or source is None:
        why = "no source given: the plan cannot be made"
        return [*checks, *(_unchecked(f"structure.{id}", what, why)
                for id, what in (("tensors", tensors), ("config", config), ("bits", bits)))]  # fmt: skip
    problems = [f"{name}: missing" for name in plan.outputs.keys() - output.tensors.keys()]
    problems += [f"{name}: not in the plan" for name in output.tensors.keys() - plan.outputs.keys()]
    for name in plan.outputs.keys() & output.tensors.keys():
        wanted, found = plan.outputs[name], output.tensors[name]
        if (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
            problems.append(f"{name}: {found.dtype} {list(found.shape)}, planned {wanted.dtype} {list(wanted.shape)}")
        if found.shard != plan.weight_map[name]:
            problems.append(f"{name}: lies in {found.shard}, planned {plan.weight_map[name]}")
    checks.append(_check("structure.tensors", tensors, sorted(problems), "headers against the plan"))
    wanted_config = output_config(plan, source.config)
    changed = [
        f"{key}: {_short(output.config.get(key))}, planned {_short(wanted_config.get(key))}"
        for key in sorted(wanted_config.keys() | output.config.keys())
        if output.config.get(key) != wanted_config.get(key)
    ]
    checks.append(_check("structure.config", config, changed, "config.json against the source's"))
    actual = output.total_bytes * 8 / plan.parameters if plan.parameters else 0.0
    planned = plan.bits_per_parameter
    verdict: Verdict = "PASS" if abs(actual - planned) <= 0.001 * planned else "FAIL"
    checks.append(Check("structure.bits", verdict, bits, f"{actual:.4f}", f"{planned:.4f} +- 0.1 %", "headers"))
    return checks


def _total_size(output: Checkpoint) -> list[str]:
    import json

    path = output.directory / INDEX_NAME
    if not path.exists():
        return []
    total = json.loads(path.read_text()).get("metadata", {}).get("total_size")
    return [] if total == output.total_bytes else [f"index says {total}, the shards hold {output.total_bytes}"]


def _companions(output: Checkpoint) -> list[str]:
    problems: list[str] = []
    for name, packed in output.tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        module, (rows, half) = module_of(name), packed.shape
        wanted = {
            "weight_scale": ("F8_E4M3", (rows, half * 2 // GROUP)),
            "weight_global_scale": ("F32", (1,)),
            "input_global_scale": ("F32", (1,)),
        }
        if not _needs_input_scale(output, module):
            del wanted["input_global_scale"]
        for suffix, (dtype, shape) in wanted.items():
            found: TensorHeader | None = output.tensors.get(f"{module}.{suffix}")
            if found is None:
                problems.append(f"{module}.{suffix}: missing")
            elif (found.dtype, found.shape) != (dtype, shape):
                problems.append(f"{found.name}: {found.dtype} {list(found.shape)}, needs {dtype} {list(shape)}")
        if f"{module}.weight" in output.tensors:
            problems.append(f"{module}: both weight and weight_packed")
    quantized_scales = {n for n in output.tensors if n.endswith(_SCALES)}
    modules = {module_of(n) for n in output.tensors if n.endswith((".weight_packed", ".weight"))}
    problems += [f"{name}: a scale without a weight" for name in quantized_scales if module_of(name) not in modules]
    return sorted(problems)


def _config_groups(output: Checkpoint) -> dict[str, dict[str, object]]:
    config = output.config.get("quantization_config")
    groups = config.get("config_groups") if isinstance(config, dict) else None
    return groups if isinstance(groups, dict) else {}


def _matches(targets: Iterable[str], module: str) -> bool:
    return any(re.match(t[3:], module) if t.startswith("re:") else t == module for t in targets)


def _group_of(output: Checkpoint, module: str) -> dict[str, object] | None:
    for group in _config_groups(output).values():
        targets = group.get("targets")
        if isinstance(targets, list) and ("Linear" in targets or _matches(targets, module)):
            return group
    return None


def _needs_input_scale(output: Checkpoint, module: str) -> bool:
    group = _group_of(output, module)
    activations = group.get("input_activations") if group else None
    return isinstance(activations, dict) and activations.get("dynamic") is not True


def _target_problems(output: Checkpoint, family: Family) -> list[str]:
    config = output.config.get("quantization_config")
    quantized = {module_of(name) for name in output.tensors if name.endswith(".weight_packed")}
    kept_fp8 = {
        module_of(name)
        for name, header in output.tensors.items()
        if name.endswith(".weight") and header.dtype == "F8_E4M3" and not family.place(name).mtp
    }
    if config is None and not quantized and not kept_fp8:
        return []
    if not isinstance(config, dict) or config.get("quant_method") != "compressed-tensors":
        return ["quantization_config: quant_method is not compressed-tensors"]
    ignore = config.get("ignore") or []
    problems = []
    for module in sorted(quantized | kept_fp8):
        if family.place(module).mtp:
            continue
        group = _group_of(output, module)
        if group is None or _matches(ignore, module):
            problems.append(f"{module}: stored quantized, no target of quantization_config names it")
    weights = {module_of(name) for name in output.tensors if name.endswith(".weight")} - kept_fp8
    for name, group in _config_groups(output).items():
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else []:
            hits = [m for m in quantized | kept_fp8 if _matches([target], m)]
            if target != "Linear" and not hits:
                problems.append(f"{name}: target {target!r} names nothing that is quantized")
            wrong = [m for m in weights if _matches([target], m) and not _matches(ignore, m)]
            problems += [f"{name}: target {target!r} names {m}, which is not quantized" for m in sorted(wrong)[:3]]
    return problems


def _values(
    output: Checkpoint, formats: Formats, family: Family, plan: Plan | None, source: Checkpoint | None,
    progress: Progress | None,
) -> list[Check]:  # fmt: skip
    """One read of every tensor: finite values, positive scales, equal shared scales, copies equal to the source."""
    not_finite: list[str] = []
    bad_scales: list[str] = []
    differing: list[str] = []
    zero_groups = groups = copied = 0
    single: dict[str, float] = {}
    copies = {o.name: s.source for s in plan.steps.values() if s.action == "copy" for o in s.outputs} if plan else {}
    done = 0
    for name, tensor in _tensors(output):
        done += tensor.nbytes
        if progress is not None:
            progress(done, output.total_bytes)
        if tensor.is_floating_point():
            # FP8 has no isfinite kernel; an F8_E8M0 scale of 2^127 stays finite in float32.
            finite = torch.isfinite(tensor.to(torch.float32) if tensor.element_size() == 1 else tensor)
            if not bool(finite.all()):
                not_finite.append(f"{name}: {int((~finite).sum())} NaN or Inf")
        if name.endswith(_SCALES):
            value = tensor.to(torch.float32)
            if bool((value <= 0).any()):
                bad_scales.append(f"{name}: {int((value <= 0).sum())} of {value.numel()} zero or negative")
            if value.numel() == 1:
                single[name] = value.item()
        if name.endswith(".weight_packed"):
            magnitudes = (tensor & 0x77).reshape(tensor.shape[0], -1, GROUP // 2)
            zero_groups += int((magnitudes == 0).all(-1).sum())
            groups += magnitudes.shape[0] * magnitudes.shape[1]
        if name in copies and source is not None and copies[name] in source.tensors:
            copied += 1
            if output.read_bytes(name) != source.read_bytes(copies[name]):
                differing.append(f"{name}: differs from the source's {copies[name]}")
    how = "every tensor read once"
    checks = [
        _check("structure.finite", "no NaN and no Inf in any tensor", not_finite, how),
        _check("structure.scales", "every scale positive", bad_scales, how),
        _check("structure.fused", "fused projections share their weight global scale",
               _unequal(family.fused(m for m in _quantized(output)), single, "weight_global_scale"), how),
    ]  # fmt: skip
    shared = "input global scales shared as promised"
    if plan is None:
        checks.append(_check("structure.input_scales", "fused projections share their input global scale",
                             _unequal(family.fused(_quantized(output)), single, "input_global_scale"), how))  # fmt: skip
    else:
        checks.append(_check("structure.input_scales", shared,
                             _unequal(plan.shared_input_scales(), single, "input_global_scale"), how))  # fmt: skip
    if groups:
        share = zero_groups / groups
        checks.append(Check("structure.zero_groups", "PASS" if share < 0.01 else "WARN", "few groups are wholly zero",
                            f"{share:.4%}", "< 1 %", how))  # fmt: skip
    what = "copied tensors are byte-identical to the source's"
    if plan is None or source is None:
        checks.append(_unchecked("structure.copies", what, "no source given"))
    else:
        check = _check("structure.copies", what, differing, "bytes compared")
        figure = check.figure if differing else f"{copied} tensors equal"
        checks.append(Check(check.id, check.verdict, what, figure, check.threshold, check.how))
    return checks


def _tensors(output: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for name in output.tensors:
        yield name, output.read(name)


def _quantized(output: Checkpoint) -> list[str]:
    return [module_of(name) for name in output.tensors if name.endswith(".weight_packed")]


def _unequal(groups: Iterable[tuple[str, ...]], single: dict[str, float], suffix: str) -> list[str]:
    problems = []
    for group in groups:
        values: dict[float, list[str]] = defaultdict(list)
        for module in group:
            if f"{module}.{suffix}" in single:
                values[single[f"{module}.{suffix}"]].append(module)
        if len(values) > 1:
            counts = Counter({value: len(modules) for value, modules in values.items()})
            usual = counts.most_common(1)[0][0]
            odd = next(m for value, modules in values.items() if value != usual for m in modules)
            problems.append(f"{odd}.{suffix}: {single[f'{odd}.{suffix}']:g}, its group has {usual:g}")
    return problems


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
