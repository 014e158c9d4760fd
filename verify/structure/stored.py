"""Compares the tensors that a checkpoint stores, under the logical names of `calibration.families.promised`, with those
that its own config.json promises."""

from __future__ import annotations

import difflib
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from calibration.checkpoint.dialect import COMPRESSED_TENSORS, NVIDIA, Dialect
from calibration.checkpoint.formats import FLOATS
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import Checkpoint
from calibration.families.promised import ADDED, Kind, Shape, Wanted

#: Leaf names of the scales and other companions of a weight, in every known stored format.
COMPANIONS = frozenset({
    "weight_scale", "weight_global_scale", "input_global_scale", "scale", "weight_scale_inv", "weight_scale_2",
    "input_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_zero_point",
})  # fmt: skip
_PLAIN = ("BF16", "F16", "F32")
_ALLOWED: dict[Kind, tuple[str, ...]] = {
    "float32": ("F32",), "table": ("I64", "I32"), "plain": _PLAIN, "float": _PLAIN, "linear": tuple(FLOATS), "fp8": ("F8_E4M3",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """A logical tensor in the checkpoint: its logical shape, its header, and whether it is stored in a low-bit
    format."""

    shape: Shape
    header: TensorHeader
    low_bit: bool
    #: The dialect of an NVFP4 weight, else None.
    dialect: Dialect | None = None

    @property
    def nvfp4(self) -> bool:
        """Whether it is stored as NVFP4."""
        return self.dialect is not None


def belongs_to_weight(name: str, names: Container[str]) -> bool:
    """Whether a tensor named like a scale has a weight beside it; the router of gemma4 has a parameter `scale`."""
    module, _, leaf = name.rpartition(".")
    return leaf in COMPANIONS and any(f"{module}.{weight}" in names for weight in ("weight_packed", "weight"))


def stored_tensors(output: Checkpoint, promised: Container[str] = ()) -> tuple[dict[str, Stored], list[str]]:
    """Logical name -> stored tensor, and the names of companions whose weight is absent, but for tensors that are
    `promised` under that name."""
    names, stored, orphans = output.tensors, dict[str, Stored](), list[str]()
    for name, header in names.items():
        module, _, leaf = name.rpartition(".")
        if leaf in COMPANIONS and (belongs_to_weight(name, names) or name not in promised):
            if not belongs_to_weight(name, names):
                orphans.append(name)
            continue
        scaled = f"{module}.scale" in names or f"{module}.weight_scale" in names
        packed = leaf == "weight_packed" or (leaf == "weight" and header.dtype in ("I8", "U8") and scaled)
        per_element = 8 if header.dtype == "I32" else 2  # values of four bits
        shape = (header.shape[0], header.shape[1] * per_element) if packed and len(header.shape) == 2 else header.shape
        low_bit = packed or header.dtype in ("F8_E4M3", "F8_E5M2")
        modelopt = packed and f"{module}.{NVIDIA.global_scale}" in names
        dialect = COMPRESSED_TENSORS if leaf == COMPRESSED_TENSORS.packed else NVIDIA if modelopt else None
        stored[f"{module}.weight" if leaf == "weight_packed" else name] = Stored(shape, header, low_bit, dialect)
    return stored, orphans


def compare(
    wanted: dict[str, Wanted], stored: dict[str, Stored], orphans: list[str], config: dict[str, Any]
) -> tuple[list[str], list[str], list[str]]:
    """Problems (tensors that are missing, extra, misnamed or misshaped), wrong dtypes (that the family never has), and
    doubts (a plain dtype other than the config's, which some writers choose)."""
    missing = [name for name, want in wanted.items() if name not in stored and not want.optional]
    extra = [n for n in stored if n not in wanted and n.rpartition(".")[2] not in ADDED]
    problems = [f"{name}: missing{_hint(name, wanted, extra, stored, at < 5)}" for at, name in enumerate(missing)]
    problems += [f"{name}: config.json promises no such tensor" for name in extra]
    problems += [f"{name}: a scale without its weight" for name in orphans]
    dtypes, doubts = list[str](), list[str]()
    plain = str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")
    usual = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(plain)
    for name in wanted.keys() & stored.keys():
        want, found = wanted[name], stored[name]
        if found.shape != want.shape:
            problems.append(f"{name}: {list(found.shape)}, config.json makes it {list(want.shape)}")
        allowed = _ALLOWED[want.kind]
        if found.header.dtype not in allowed and not (found.low_bit and want.kind == "linear"):
            dtypes.append(f"{name}: {found.header.dtype}, must be {' or '.join(allowed)}")
        elif want.kind in ("plain", "linear") and not found.low_bit and usual and found.header.dtype != usual:
            doubts.append(f"{name}: {found.header.dtype}, torch_dtype says {plain}")
    return problems, dtypes, doubts


def _hint(name: str, wanted: dict[str, Wanted], extra: list[str], stored: dict[str, Stored], look: bool) -> str:
    alike = [other for other in extra if stored[other].shape == wanted[name].shape] if look else []
    close = difflib.get_close_matches(name, alike, n=1, cutoff=0.8)
    return f"; did it become {close[0]}?" if close else ""
