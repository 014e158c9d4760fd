"""Compares a source checkpoint with its own config.json, from headers: names, shapes and dtypes.

A tensor that the family's grammar does not know can be no target, and no loader reads it: it is an error that names it,
unless it is known to be harmless (`is_left_out`, `is_carried`).
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict

from calibration.checkpoint.foreign import undeclared
from calibration.checkpoint.formats import FLOATS, Formats, logical_name
from calibration.families.family import Family
from calibration.families.promised import CARRIED, LEFT_OUT, Wanted
from calibration.families.registry import expected_tensors

_SHOWN = 3
_LEFT_OUT, _CARRIED = re.compile(LEFT_OUT), re.compile(CARRIED)


def is_left_out(name: str) -> bool:
    """Whether a tensor is a table that every loader computes (rotary frequencies of old exports) and the output
    omits."""
    return _LEFT_OUT.search(name) is not None


def is_carried(name: str) -> bool:
    """Whether loaders know a tensor that no config promises (scales of the KV cache): the output keeps it."""
    return _CARRIED.search(name) is not None


def contradictions(formats: Formats, family: Family) -> tuple[list[str], list[str]]:
    """How the source differs from what its config.json promises. First the problems after which no target can be right:
    fields missing in the config, a declared format that no weight has, unknown tensors, absent tensors. Then differing
    shapes, and integers instead of values. MTP is copied byte for byte and not checked."""
    checkpoint = formats.checkpoint
    where = checkpoint.directory
    wanted, lacking = expected_tensors(checkpoint.config, checkpoint.tensors)
    if lacking:
        return [f"{where}: {problem}" for problem in lacking], []
    mtp = re.compile(family.mtp).search
    wanted = {name: want for name, want in wanted.items() if not mtp(name)}
    stored = {
        logical_name(name): name
        for name in checkpoint.tensors
        if name not in formats.companions and not (is_left_out(name) or is_carried(name) or mtp(name))
    }
    model = f"the {checkpoint.config.get('model_type')} model built from config.json"
    unknown = [stored[name] for name in stored if name not in wanted]
    absent = [name for name, want in wanted.items() if name not in stored and not want.optional]
    problems = undeclared(checkpoint, {formats.of(name).kind for name in checkpoint.tensors})
    if unknown:
        problems.append(
            f"{where}: {len(unknown)} tensors are unknown to {model}: {_some(unknown)}; {_spelling(unknown, absent)}"
        )
    if absent:
        problems.append(
            f"{where}: {len(absent)} tensors of {model} have no source tensor: {_some(absent)}; the checkpoint is "
            "incomplete or its config.json describes another model"
        )
    return problems, _differing(formats, stored, wanted, model)


def _differing(formats: Formats, stored: dict[str, str], wanted: dict[str, Wanted], model: str) -> list[str]:
    """Shapes and dtypes that differ from the promised ones, one line for equal differences."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in stored.keys() & wanted.keys():
        found, header = formats.of(stored[name]), formats.checkpoint.tensors[stored[name]]
        if found.shape != wanted[name].shape:
            alike[f"stored shape {list(found.shape)}, {model} needs {list(wanted[name].shape)}"].append(stored[name])
        elif found.kind == "plain" and wanted[name].kind != "table" and header.dtype not in FLOATS:
            alike[f"{header.dtype} integers that no known stored format explains"].append(stored[name])
    return [f"{formats.checkpoint.directory}: {_some(sorted(names))}: {what}" for what, names in alike.items()]


def _spelling(unknown: list[str], absent: list[str]) -> str:
    """The likely reason for unknown names: another prefix before a promised tensor's name, or a misspelling."""
    for name in unknown[:_SHOWN]:
        parts = name.split(".")
        for begin in range(len(parts)):
            tail = ".".join(parts[begin:])
            longer = next((other for other in absent if other == tail or other.endswith(f".{tail}")), None)
            if longer is not None and tail.count("."):
                found, right = name.removesuffix(tail), longer.removesuffix(tail)
                return (
                    f"their prefix is likely {found!r} and should be {right!r} ({longer}): rename the tensors, or save "
                    "the model under the hub's names"
                )
    close = difflib.get_close_matches(unknown[0], absent, n=1, cutoff=0.6)
    hint = f"; the closest is {close[0]}" if close else ""
    return f"expected are the names of the hub's checkpoints of this family{hint}; rename or remove them"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
