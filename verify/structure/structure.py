"""Structure: compares an output checkpoint with its plan and its own config, from headers and one streaming read.

Without a source the expected tensors come from config.json, quantization_config and the family's grammar; checks that
need a source are UNCHECKED.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from calibration.checkpoint.dialect import COMPRESSED_TENSORS, DIALECTS, NVIDIA, Dialect, is_nvidia
from calibration.checkpoint.files import read_json_object
from calibration.checkpoint.formats import Formats, module_of
from calibration.checkpoint.index import INDEX_NAME, Checkpoint
from calibration.checkpoint.nvfp4 import GROUP
from calibration.checkpoint.permissions import requests
from calibration.families.family import Family
from calibration.families.promised import ADDED, Wanted
from calibration.families.registry import expected_tensors, family_of, unstacked
from calibration.plan.draft_head import draft_head_doubts
from calibration.plan.plan import Plan
from recipes.errors import SourceError, WorkflowError
from verify.checks import Check, unchecked, verdict
from verify.known import Known
from verify.structure.nvidia import read_nvidia
from verify.structure.served_config import config_check
from verify.structure.side_files import files_check
from verify.structure.stored import COMPANIONS, Stored, compare, stored_tensors
from verify.structure.stream import Progress
from verify.structure.targets import Resolution, read_quantization
from verify.structure.tokenizer import tokenizer_check
from verify.structure.values import value_checks

#: Entries of `ignore` that are tried on the draft head; NVIDIA's files have four.
_MOST_IGNORED = 1_000
#: Stands for an unknown family: parts by their usual names, nothing fused, nothing expected.
_UNKNOWN = Family("unknown", (), r"layers\.(\d+)\.", (
    ("norm", r"norm\w*\.weight$"), ("routed expert", r"\.experts\.\d+\."), ("router", r"\.(gate|router)\.weight$"),
    ("embedding", r"embed\w*\.weight$"), ("head", r"head\.weight$"),
), (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")), lambda _: iter(()), mtp=r"^mtp\.(\d+)?")  # fmt: skip


def verify_structure(directory: Path, known: Known | None = None, progress: Progress | None = None) -> list[Check]:
    """Checks the checkpoint in `directory` against its own config, and against the plan if it is `known`. With a
    source, also compares copies, config and tokenizer. `progress(done, total)` counts bytes read. Never raises for a
    broken checkpoint."""
    known = known or Known()
    plan, source = known.plan, known.original
    what = "headers, index and shards fit together"
    try:
        output = Checkpoint.open(directory)
    except SourceError as error:
        return [verdict("structure.open", what, error.problems, [], "headers")]
    checks = [
        verdict("structure.open", what, [], [], "headers", f"{len(output.shards)} shards, {len(output.tensors)} tensors"),
        files_check(output, source),
        _requests(output, source),
        verdict("structure.total_size", "index total_size equals the bytes", _total_size(output), [], "headers and index"),
    ]  # fmt: skip
    try:
        family = family_of(output.config, names=output.tensors)
        wanted, lacking = expected_tensors(output.config, output.tensors)
    except SourceError:
        family, wanted, lacking = _UNKNOWN, {}, []
    try:
        stored, orphans = stored_tensors(unstacked(output), wanted)
    except SourceError:  # a stack that does not fit config.json: structure.tensors reports it
        stored, orphans = stored_tensors(output, wanted)
    nvidia = is_nvidia(output.config.get("quantization_config"))
    quantization = read_nvidia(output.config, family) if nvidia else read_quantization(output.config)
    resolution = Resolution(family, quantization, stored)
    checks += [
        _tensors(output, family, known, wanted, stored, orphans),
        _dialect(NVIDIA if nvidia else COMPRESSED_TENSORS, family, stored),
        _mtp(output, family, source, wanted),
        verdict("structure.companions", "every low-bit weight has its scales, of right dtype and shape",
                _companions(output, stored, resolution), [], "headers against quantization_config"),
        verdict("structure.targets", "targets and ignore name what is stored quantized, in vLLM's names",
                *resolution.problems(), "config.json against headers, matched as vLLM matches",
                f"{len(resolution.modules)} modules resolved"),
        config_check(output, family, plan, source, lacking),
        tokenizer_check(output.directory, output.config, source.directory if source else None),
        _bits(output, plan, stored, resolution),
    ]  # fmt: skip
    return checks + value_checks(output, family, known, progress)


def _requests(output: Checkpoint, source: Checkpoint | None) -> Check:
    asked, theirs = requests(output.directory), requests(source.directory) if source is not None else []
    problems = [str(request) for request in asked if request.kind == "path"]
    doubts = [f"{r}; not followed" for r in asked if r.kind != "path" and r not in theirs]
    what = "no file asks to run code, to download or to open a path outside"
    return verdict("structure.requests", what, problems, doubts, "JSON files of the checkpoint")


def _total_size(output: Checkpoint) -> list[str]:
    path = output.directory / INDEX_NAME
    if not path.exists():
        return []
    metadata = read_json_object(path).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return [] if total == output.total_bytes else [f"index says {total}, the shards hold {output.total_bytes}"]


def _tensors(
    output: Checkpoint, family: Family, known: Known, wanted: dict[str, Wanted], stored: dict[str, Stored],
    orphans: list[str],
) -> Check:  # fmt: skip
    plan, source = known.plan, known.original
    what = "every expected tensor, nothing else, right dtype and shape"
    id, figure = "structure.tensors", f"{len(output.tensors)} tensors"
    against = {
        "the plan": plan is not None,
        "the source": plan is None and source is not None,
        "config.json": bool(wanted),
    }
    how = f"headers against {' and '.join(name for name, given in against.items() if given)}"
    if not any(against.values()):
        model_type = output.config.get("model_type")
        unknown = family is _UNKNOWN
        why = f"model_type {model_type!r} is not known here" if unknown else "config.json is not whole"
        return unchecked(id, what, f"{why}: the expected tensors cannot be derived; give the source")
    missing_mtp = not any(re.search(family.mtp, name) for name in stored)
    derived = {n: w for n, w in wanted.items() if not (missing_mtp and re.search(family.mtp, n))}
    problems, dtypes, doubts = compare(derived, stored, orphans, output.config) if wanted else ([], [], [])
    if source is None:
        problems += dtypes
    else:
        different = _plan_problems(output, plan) if plan is not None else _source_problems(output, source, stored)
        # An engine casts a dtype that is the source's own, but it cannot load names and shapes that config.json does
        # not promise, even if the source has them.
        doubts = [] if different else dtypes + doubts
        problems = list(dict.fromkeys(different + problems))
    return verdict(id, what, problems, doubts, how, figure)


def _plan_problems(output: Checkpoint, plan: Plan) -> list[str]:
    problems = [f"{name}: missing" for name in plan.outputs.keys() - output.tensors.keys()]
    problems += [f"{name}: not in the plan" for name in output.tensors.keys() - plan.outputs.keys()]
    for name in plan.outputs.keys() & output.tensors.keys():
        want, found = plan.outputs[name], output.tensors[name]
        if (want.dtype, want.shape) != (found.dtype, found.shape):
            problems.append(f"{name}: {found.dtype} {list(found.shape)}, planned {want.dtype} {list(want.shape)}")
    return sorted(problems)


def _source_problems(output: Checkpoint, source: Checkpoint, stored: dict[str, Stored]) -> list[str]:
    """Without a plan the output must have every logical tensor of the source and no other, except those that writers
    omit."""
    theirs, _ = stored_tensors(source, stored)
    free = ("lm_head.weight",) if source.config.get("tie_word_embeddings") is True else ()
    problems = [f"{name}: missing" for name in sorted(theirs.keys() - stored.keys()) if not name.endswith(ADDED + free)]
    problems += [
        f"{n}: the source has none" for n in sorted(stored.keys() - theirs.keys()) if not n.endswith(ADDED + free)
    ]
    for name in sorted(theirs.keys() & stored.keys()):
        if theirs[name].shape != stored[name].shape:
            problems.append(f"{name}: {list(stored[name].shape)}, the source has {list(theirs[name].shape)}")
        elif (
            stored[name].header.dtype != theirs[name].header.dtype
            and not stored[name].low_bit
            and not theirs[name].low_bit
        ):
            problems.append(f"{name}: {stored[name].header.dtype}, the source has {theirs[name].header.dtype}")
    return problems


def _dialect(declared: Dialect, family: Family, stored: dict[str, Stored]) -> Check:
    """The check that all weights are in the dialect of config.json, whose names an engine looks for. The draft head is
    not judged."""
    spelled = {n: found.dialect for n, found in stored.items() if found.dialect and not family.place(n).mtp}
    other = [n for n, dialect in spelled.items() if dialect is not declared]
    problems = [f"{stored[n].header.name}: is spelled in the dialect {spelled[n].name}" for n in other]
    return verdict("structure.dialect", f"NVFP4 weights are spelled as config.json says, in {declared.name}", problems, [],
                   "headers against quantization_config", f"{len(spelled)} weights")  # fmt: skip


def _mtp(output: Checkpoint, family: Family, source: Checkpoint | None, wanted: dict[str, Wanted]) -> Check:
    id, what = "structure.mtp", "MTP blocks are there where they should be"
    # Counted from the tensors, because num_nextn_predict_layers is 1 for the three blocks of a DSpark head.
    promised, found = (len(family.mtp_blocks(names)) for names in (wanted, output.tensors))
    had = source is not None and any(family.place(name).mtp for name in source.tensors)
    figure = f"{found} found, config.json promises {promised}"
    if found or not promised:
        misread = _misread_draft(output, family)
        if is_nvidia(output.config.get("quantization_config")):
            return verdict(id, what, [], misread, "headers", figure)
        return verdict(id, what, [], [], "headers", figure + (f"; {misread[0]}" if misread else ""))
    problem = ["dropped: the source has MTP tensors, the output has none"] if had else []
    doubt = [f"config.json promises {promised} and there is no mtp tensor: speculative decoding is lost"]
    # Some sources have none.
    return verdict(id, what, problem, [] if source is not None else doubt, "headers", figure)


def _misread_draft(output: Checkpoint, family: Family) -> list[str]:
    """Why vLLM could not read the draft head as it is stored. Of a compressed-tensors config that is the rule, and no fault of
    the checkpoint: the target is served."""
    declared = output.config.get("quantization_config")
    if family.fp8_dialect is None or not isinstance(declared, dict):
        return []
    kept = {name: header for name, header in output.tensors.items() if family.place(name).mtp}
    ignore = declared.get("ignore")
    entries = [e for e in ignore[:_MOST_IGNORED] if isinstance(e, str)] if isinstance(ignore, list) else []
    try:
        formats = Formats(Checkpoint(output.directory, output.config, kept, output.shards))
    except WorkflowError:  # structure.companions reports the problem
        return []
    return draft_head_doubts(formats, family, NVIDIA if is_nvidia(declared) else COMPRESSED_TENSORS, entries)


def _companions(output: Checkpoint, stored: dict[str, Stored], resolution: Resolution) -> list[str]:
    problems, tensors, native = list[str](), output.tensors, set[str]()
    nvidia = is_nvidia(output.config.get("quantization_config"))
    for name, found in stored.items():
        header, module = found.header, module_of(name)
        if not found.low_bit:
            continue
        group = resolution.group(module)
        if found.dialect is not None:
            if len(header.shape) != 2 or header.dtype != "U8":
                problems.append(f"{header.name}: {header.dtype} {list(header.shape)}, NVFP4 is U8 [M, K/2]")
                continue
            dialect, (rows, columns) = found.dialect, found.shape
            needed = {dialect.group_scale: ("F8_E4M3", (rows, columns // GROUP)), dialect.global_scale: ("F32", (1,))}
            if group is None or group.input_scale:
                needed[dialect.input_scale] = ("F32", (1,))
            elif f"{module}.{dialect.input_scale}" in tensors:
                problems.append(f"{module}.{dialect.input_scale}: {group.name} says that inputs are not quantized")
            if {f"{module}.{d.packed}" for d in DIALECTS.values()} <= tensors.keys():
                problems.append(f"{module}: both weight and weight_packed")
        elif group is not None and header.dtype == "F8_E4M3" and len(found.shape) == 2:
            leaf, dtype = ("weight_scale", "") if not nvidia else ("scale", "F8_E8M0")
            if nvidia and f"{module}.weight_scale_inv" in tensors:
                leaf = "weight_scale_inv"
            needed = {leaf: (dtype, _fp8_scale(group.weights, found.shape))}
        else:
            native.update((name, *(f"{module}.{leaf}" for leaf in COMPANIONS if f"{module}.{leaf}" in tensors)))
            continue
        for leaf, (dtype, shape) in needed.items():
            scale = tensors.get(f"{module}.{leaf}")
            if scale is None:
                problems.append(f"{module}.{leaf}: missing")
            elif scale.shape != shape and (math.prod(scale.shape) != math.prod(shape) or len(scale.shape) > 1):
                problems.append(f"{scale.name}: {list(scale.shape)}, needs {list(shape)}")
            elif dtype and scale.dtype != dtype:
                problems.append(f"{scale.name}: {scale.dtype}, needs {dtype}")
    kept = {name: header for name, header in tensors.items() if name in native}
    try:
        Formats(Checkpoint(output.directory, output.config, kept, output.shards))
    except WorkflowError as error:
        problems += error.problems
    return problems


def _fp8_scale(weights: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an FP8 weight's scale, by its group's strategy (compressed-tensors: tensor, channel, block)."""
    tile = weights.get("block_structure")
    if weights.get("strategy") == "block" and isinstance(tile, list) and len(tile) == 2:
        return (math.ceil(shape[0] / tile[0]), math.ceil(shape[1] / tile[1]))
    return (shape[0], 1) if weights.get("strategy") == "channel" else (1,)


def _bits(output: Checkpoint, plan: Plan | None, stored: dict[str, Stored], resolution: Resolution) -> Check:
    """The check against a checkpoint that is labeled NVFP4 but is not: bits per parameter of the whole."""
    id, what = "structure.bits", "bits per parameter as promised"
    parameters = sum(math.prod(found.shape) for found in stored.values())
    actual = output.total_bytes * 8 / max(parameters, 1)
    if plan is not None:
        planned, how = plan.bits_per_parameter, "headers against the plan"
    else:
        bits, how = 8.0 * output.total_bytes, "headers, quantized modules reckoned at 4.5 bits by quantization_config"
        for module, found in resolution.modules.items():
            group = resolution.group(module)
            if group is not None and group.nvfp4:
                held = [output.tensors.get(f"{module}.{leaf}") for leaf in ("weight", "weight_packed", *COMPANIONS)]
                bits -= 8.0 * sum(header.nbytes for header in held if header is not None)
                bits += math.prod(found.shape) * (4 + 8 / GROUP) + 32 * (1 + group.input_scale)
        planned = bits / max(parameters, 1)
    problems = [] if abs(actual - planned) <= 0.001 * planned else [f"{actual:.4f}, promised {planned:.4f} +- 0.1 %"]
    return verdict(id, what, problems, [], how, f"{actual:.4f}")
