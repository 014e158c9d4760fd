"""Checks the values of a checkpoint in one streaming read: finite, scales, empty groups, copies and digests."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch

from calibration.checkpoint.dialect import COMPRESSED_TENSORS, DIALECTS, NVIDIA
from calibration.checkpoint.direct import Bytes
from calibration.checkpoint.formats import Formats, logical_name, module_of
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.nvfp4 import GROUP, RANGE
from calibration.checkpoint.source_config import routed_experts
from calibration.families.family import ROUTED, ROUTER, Family
from calibration.families.registry import language_config
from calibration.plan.plan import Plan
from recipes.errors import SourceError, WorkflowError
from verify.checks import Check, unchecked, verdict
from verify.known import Known
from verify.structure.stored import COMPANIONS, belongs_to_weight
from verify.structure.stream import JOB, Judge, Piece, Progress, read_all

#: Dtype -> unsigned view, mask of the magnitude, smallest magnitude that is NaN or Inf, smallest normal magnitude.
_FLOATS = {
    "F64": ("<u8", 2**63 - 1, 0x7FF0000000000000, 0x0010000000000000),
    "F32": ("<u4", 2**31 - 1, 0x7F800000, 0x00800000),
    "BF16": ("<u2", 0x7FFF, 0x7F80, 0x0080),
    "F16": ("<u2", 0x7FFF, 0x7C00, 0x0400),
    "F8_E4M3": ("u1", 0x7F, 0x7F, 0x08),
    "F8_E5M2": ("u1", 0x7F, 0x7C, 0x04),
    "F8_E8M0": ("u1", 0xFF, 0xFF, 0x00),
}
_TABLES = {"I64": "<u8", "I32": "<u4"}
#: Largest weight that a weight's global scale admits (448 * 6 / scale). Largest weights of trained models are between
#: 0.01 and 100; the inverse of such a scale (modelopt's dialect) admits 7e4 to 7e8.
_LARGEST_WEIGHT = (1e-6, 6e4)
#: The same for activations, where outliers of some thousands are common; beyond this there is only a doubt.
_LARGEST_INPUT = (1e-4, 1e6)
#: Group scales below the smallest normal E4M3 number have lost precision; minmax scales of a sane weight are never that
#: small.
_SUBNORMAL_SHARE = 0.01
_ZERO_SHARE = 0.01
_HOW = "every tensor read once"


class Values(Judge):
    """The findings of one thread, by tensor name."""

    def __init__(self) -> None:
        self.nonfinite: Counter[str] = Counter()
        self.zero: Counter[str] = Counter()
        self.negative: Counter[str] = Counter()
        self.empty_groups: Counter[str] = Counter()
        self.subnormal = self.group_scales = self.groups = 0
        self.single: dict[str, float] = {}
        self.largest: dict[str, int] = {}
        self.tables: dict[str, int] = {}
        self.differing: set[str] = set()
        self.compared: set[str] = set()
        self._scratch = np.empty(JOB, np.uint8)

    def look(self, piece: Piece, data: Bytes, other: Bytes | None) -> None:
        header = piece.header
        if other is not None:
            self.compared.add(header.name)
            if not np.array_equal(data, other):
                self.differing.add(header.name)
        if header.dtype in _FLOATS:
            self._float(header, data)
        elif header.dtype in _TABLES:
            # Read as unsigned, a negative entry is very large.
            entries = self._aligned(data, _TABLES[header.dtype])
            self.tables[header.name] = max(self.tables.get(header.name, 0), int(entries.max()) if len(entries) else 0)
        elif _is_packed(header) and not header.nbytes % (GROUP // 2):
            words = self._aligned(data, "<u8")
            np.bitwise_and(words, 0x7777777777777777, out=words)
            empty = len(words) - int(np.count_nonzero(words))
            self.groups += len(words)
            if empty:
                self.empty_groups[header.name] += empty

    def _aligned(self, data: Bytes, view: str) -> np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]:
        """A copy in the scratch memory, which is aligned whatever the file's offsets, and on which arithmetic can be in
        place."""
        scratch = self._scratch[: len(data)]
        np.copyto(scratch, data)
        return scratch.view(view)

    def _float(self, header: TensorHeader, data: Bytes) -> None:
        view, magnitude, infinite, normal = _FLOATS[header.dtype]
        scale = header.name.rpartition(".")[2] in COMPANIONS
        if scale and header.numel == 1:
            self.single[header.name] = _number(header.dtype, data)
        if scale and header.dtype != "F8_E8M0":
            signed = int(np.count_nonzero(data.view(view) > magnitude)) if len(data) else 0
            if signed:
                self.negative[header.name] += signed
        bits = self._aligned(data, view)
        np.bitwise_and(bits, bits.dtype.type(magnitude), out=bits)
        largest = int(bits.max()) if len(bits) else 0
        self.largest[header.name] = max(self.largest.get(header.name, 0), largest)
        if largest >= infinite:
            self.nonfinite[header.name] += int(np.count_nonzero(bits >= infinite))
        if scale and normal:
            small = int(np.count_nonzero(bits < normal))
            zero = len(bits) - int(np.count_nonzero(bits)) if small else 0
            if zero:
                self.zero[header.name] += zero
            if header.name.endswith(".weight_scale") and header.dtype == "F8_E4M3":
                self.group_scales += len(bits)
                self.subnormal += small - zero

    def merge(self, others: Iterable[Values]) -> Values:
        """Adds the findings of other threads."""
        for other in others:
            for name in ("nonfinite", "zero", "negative", "empty_groups"):
                getattr(self, name).update(getattr(other, name))
            self.subnormal += other.subnormal
            self.group_scales += other.group_scales
            self.groups += other.groups
            self.single |= other.single
            for mine, theirs in ((self.largest, other.largest), (self.tables, other.tables)):
                mine |= {name: max(value, mine.get(name, 0)) for name, value in theirs.items()}
            self.differing |= other.differing
            self.compared |= other.compared
        return self


def _is_packed(header: TensorHeader) -> bool:
    """Whether a tensor contains the codes of an NVFP4 weight, in either dialect; MXFP4's are I8."""
    return header.name.endswith(f".{COMPRESSED_TENSORS.packed}") or (
        header.dtype == "U8" and header.name.endswith(f".{NVIDIA.packed}")
    )


def _number(dtype: str, data: Bytes) -> float:
    raw = data.tobytes()
    if dtype == "BF16":
        return float(np.frombuffer(b"\0\0" + raw, "<f4")[0])
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    return float(np.frombuffer(raw, kinds[dtype])[0]) if dtype in kinds else float("nan")


def value_checks(output: Checkpoint, family: Family, known: Known, progress: Progress | None) -> list[Check]:
    """The checks that need the values. A file that cannot be read to its end is a FAIL."""
    plan, source = known.plan, known.original
    same = _copies(output, plan, source) if source is not None else {}
    wanted = {shard: digest for shard, digest in known.digests.items() if shard in output.shards}
    try:
        judges, found = read_all(output, Values, same, source if same else None, wanted, progress)
    except SourceError as error:
        return [verdict("structure.read", "every byte can be read", error.problems, [], _HOW)]
    values = Values().merge(judge for judge in judges if isinstance(judge, Values))
    nonfinite = [
        f"{n}: {count} of {output.tensors[n].numel} NaN or Inf" for n, count in sorted(values.nonfinite.items())
    ]
    checks = [
        verdict("structure.finite", "no NaN and no Inf in any tensor", nonfinite, [], _HOW, f"{len(output.tensors)} tensors"),
        _scales(output, values),
        *_shared(family, plan, output, values),
        _empty(output, family, known, values),
    ]  # fmt: skip
    experts = routed_experts(language_config(output.config))
    tables = {name: largest for name, largest in values.tables.items() if family.place(name).part == ROUTER}
    if tables and experts is not None:
        strange = [
            f"{name}: names expert {n}, there are {experts}" for name, n in sorted(tables.items()) if n >= experts
        ]
        checks.append(
            verdict(
                "structure.tables",
                "hash tables name experts that are there",
                strange,
                [],
                _HOW,
                f"{len(tables)} tables",
            )
        )
    what = "copied tensors are byte-identical to the source's"
    if source is None:
        checks.append(unchecked("structure.copies", what, "no source given"))
    else:
        differing = [f"{name}: differs from the source's {same[name].name}" for name in sorted(values.differing)]
        differing += _casts(output, plan, source) if plan is not None else []
        # Without a plan it is unknown what had to be copied: AWQ changes norms, and fidelity.kept judges what may
        # differ.
        problems, doubts = (differing, []) if plan is not None else ([], differing)
        checks.append(
            verdict(
                "structure.copies", what, problems, doubts, "bytes compared", f"{len(values.compared)} tensors equal"
            )
        )
    if known.digests:
        torn = [f"{s}: {found[s]}, written as {digest}" for s, digest in sorted(wanted.items()) if found[s] != digest]
        checks.append(verdict("structure.digests", "every shard is, bit for bit, what the run wrote", torn, [],
                              "digests of the run's journal", f"{len(wanted)} shards"))  # fmt: skip
    return checks


def _copies(output: Checkpoint, plan: Plan | None, source: Checkpoint) -> dict[str, TensorHeader]:
    """Output tensor -> source tensor with the same bytes: the plan's copies, or without a plan all tensors of equal
    name, dtype and shape."""
    if plan is not None:
        names = {o.name: step.source for step in plan.steps.values() if step.action == "copy" for o in step.outputs}
    else:
        names = {
            name: name for name, header in output.tensors.items()
            if name in source.tensors and source.tensors[name].dtype == header.dtype
        }  # fmt: skip
    there = source.tensors.keys() | source.whole.keys()
    found = {n: source.header(s) for n, s in names.items() if n in output.tensors and s in there}
    # Fidelity compares the others: their bytes lie apart in the source.
    return {name: header for name, header in found.items() if header.layout is None}


def _casts(output: Checkpoint, plan: Plan, source: Checkpoint) -> list[str]:
    """Problems of the tile scales of kept FP8 weights: they are cast to float32, or to E8M0 in NVIDIA's dialect, and
    every value must be exact."""
    differing = []
    for step in plan.steps.values():
        name = step.outputs[0].name if step.action == "cast" else ""
        if (
            name.endswith((".weight_scale", ".scale"))
            and name in output.tensors
            and output.tensors[name].shape == step.outputs[0].shape
        ):
            exact, found = (t.to(torch.float32) for t in (source.read(step.source), output.read(name)))
            if not bool((exact == found).all()):
                differing.append(f"{name}: differs from the source's {step.source}")
    return differing


def _scales(output: Checkpoint, values: Values) -> Check:
    tensors = output.tensors
    negative, zero = (
        [(name, count) for name, count in sorted(counts.items()) if belongs_to_weight(name, tensors)]
        for counts in (values.negative, values.zero)
    )
    problems = [f"{name}: {count} of {tensors[name].numel} with a sign" for name, count in negative]
    doubts = []
    for name, count in zero:
        lost = _lost(output, name)
        problems += [f"{name}: {lost} of {tensors[name].numel} are zero over weights that are not"] if lost else []
        doubts += [] if lost else [f"{name}: {count} of {tensors[name].numel} are zero"]
    for name, value in sorted(values.single.items()):
        if not value > 0 or not np.isfinite(value):
            continue
        leaf = name.rpartition(".")[2]
        for dialect in DIALECTS.values():
            largest = RANGE / value if dialect is COMPRESSED_TENSORS else RANGE * value
            for scale, (low, high), where in (
                (dialect.global_scale, _LARGEST_WEIGHT, problems), (dialect.input_scale, _LARGEST_INPUT, doubts),
            ):  # fmt: skip
                # FP8 weights also have an input_scale, with another meaning.
                ours = f"{module_of(name)}.{dialect.global_scale}" in tensors
                if leaf == scale and ours and not low <= largest <= high:
                    where.append(f"{name}: {value:g} admits values up to {largest:.3g}; is it inverted?")
    share = values.subnormal / max(values.group_scales, 1)
    if share > _SUBNORMAL_SHARE:
        doubts.append(f"{share:.2%} of all group scales are subnormal: too small for E4M3")
    figure = f"{len(values.single)} single scales, {values.group_scales} group scales, {share:.2%} subnormal"
    return verdict("structure.scales", "every scale positive and of a sane size", problems, doubts, _HOW, figure)


def _lost(output: Checkpoint, name: str) -> int:
    """The number of zero scales whose weights are not all zero; all of them if that cannot be determined."""
    spelled = (f"{module_of(name)}.{dialect.packed}" for dialect in DIALECTS.values())
    packed = next((output.tensors[n] for n in spelled if n in output.tensors and _is_packed(output.tensors[n])), None)
    zero = np.frombuffer(output.read_bytes(name), np.uint8)
    if packed is None or output.tensors[name].dtype != "F8_E4M3" or packed.nbytes != len(zero) * (GROUP // 2):
        return max(output.tensors[name].numel, 1)
    groups = np.frombuffer(output.read_bytes(packed.name), "<u8") & np.uint64(0x7777777777777777)
    return int(np.count_nonzero((zero & 0x7F == 0) & (groups != 0)))


def _shared(family: Family, plan: Plan | None, output: Checkpoint, values: Values) -> list[Check]:
    quantized = [module_of(name) for name, header in output.tensors.items() if _is_packed(header)]
    fused = family.fused(module for module in quantized if not family.place(module).mtp)
    checks = [
        verdict("structure.fused", "fused projections share their weight global scale",
                _unequal(fused, values.single, "global_scale"), [], _HOW, f"{len(fused)} groups"),
    ]  # fmt: skip
    promised = plan.shared_input_scales() if plan is not None else fused
    problems = _unequal(promised, values.single, "input_scale")
    experts: dict[tuple[int | None, str], list[str]] = defaultdict(list)
    for module in quantized:
        place = family.place(module)
        if place.part == ROUTED and not place.mtp:
            experts[(place.block, module.rpartition(".")[2])].append(module)
    doubts = [] if problems else _unequal((tuple(e) for e in experts.values()), values.single, "input_scale")
    doubts = [f"{doubt}: some of vLLM's kernels use one for all experts of a block" for doubt in doubts]
    return [*checks, verdict("structure.input_scales", "input global scales shared as promised", problems, doubts, _HOW,
                             f"{len(promised)} groups")]  # fmt: skip


def _unequal(
    groups: Iterable[tuple[str, ...]], single: dict[str, float], role: Literal["global_scale", "input_scale"]
) -> list[str]:
    """Problems of groups of modules whose scales of a role differ, in either dialect."""
    problems, leaves = [], [getattr(dialect, role) for dialect in DIALECTS.values()]
    for group in groups:
        found = {f"{module}.{leaf}": single.get(f"{module}.{leaf}") for module in group for leaf in leaves}
        known = {name: value for name, value in found.items() if value is not None}
        if len(set(known.values())) > 1:
            usual = Counter(known.values()).most_common(1)[0][0]
            odd = next(name for name, value in known.items() if value != usual)
            problems.append(f"{odd}: {known[odd]:g}, its group has {usual:g}")
    return problems


def _empty(output: Checkpoint, family: Family, known: Known, values: Values) -> Check:
    """The check of weights that are entirely zero: no fault if the source's are too (pruned or padded experts). Without
    a source a routed expert of zeros is WARN, because it may be one of these; any other weight of zeros is FAIL."""
    whole = [
        name
        for name, count in sorted(values.empty_groups.items())
        if count * (GROUP // 2) == output.tensors[name].nbytes
    ]
    zero = [
        name for name, largest in sorted(values.largest.items())
        if largest == 0 and name.endswith(".weight") and len(output.tensors[name].shape) > 1
    ]  # fmt: skip
    share = values.empty_groups.total() / max(values.groups, 1)
    found = whole + zero
    own = _zeros_of(known.source, known.plan, found) if found and known.source is not None else set()
    unknown = [name for name in found if known.source is None and family.place(name).part == ROUTED]
    doubts = [f"{name}: all zero; only the source tells whether it ought to be" for name in unknown]
    problems = [f"{name}: all zero" for name in found if name not in own and name not in unknown]
    accounted = sum(values.empty_groups[name] for name in own)
    if (values.empty_groups.total() - accounted) / max(values.groups, 1) > _ZERO_SHARE:
        doubts.append(f"{share:.2%} of all groups are zero")
    figure = f"{share:.4%} of {values.groups} groups zero" + (f", {len(own)} weights as in the source" if own else "")
    return verdict("structure.zeros", "no weight is wholly zero that is not so in the source, few groups are", problems,
                   doubts, _HOW, figure)  # fmt: skip


def _originals(plan: Plan | None, source: Checkpoint) -> dict[str, str]:
    """Logical name of an output tensor -> its source tensor."""
    if plan is None:
        return {logical_name(name): name for name in source.tensors}
    return {logical_name(output.name): step.source for step in plan.steps.values() for output in step.outputs}


def _zeros_of(source: Formats, plan: Plan | None, names: list[str]) -> set[str]:
    """The output tensors whose source is all zero; empty if the source cannot be read, which other checks report."""
    try:
        original = _originals(plan, source.checkpoint)
        known = [name for name in names if logical_name(name) in original]
        return {name for name in known if not bool(source.read(original[logical_name(name)], torch.float32).any())}
    except WorkflowError:
        return set()
