"""Recognizes stored formats that this project cannot dequantize, and declarations in config.json that no weight
matches. Such tensors must not pass as plain: the weight would be missing, or its integers would be taken for values."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import MissingFile, read_json_object
from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.checkpoint.source_config import declared_quantization

REMEDY = "start from the original checkpoint, or have the library that made this one write BF16"
#: A format and the regex of its tensors' names, from the quantizers and integrations of transformers (5.17) and the
#: formats of compressed-tensors (0.19). `qweight` is used by GPTQ and AWQ: see `_packed_by`.
_ENDS = tuple((name, re.compile(rf"\.(?:{ends})$")) for name, ends in (
    ("bitsandbytes", r"weight\.(?:nested_)?(?:absmax|quant_map)|weight\.quant_state\..+|SCB|weight_format"),
    ("HQQ", "W_q"),
    ("EETQ", "weight_scales"),
    ("quanto", "weight\\._(?:data|scale|shift)"),
    ("AQLM", "codebooks"),
    ("VPTQ", r"centroids(?:\.weight)?"),
    ("QuIP#", "Qidxs"),
    ("sparse-bitmask (compressed-tensors)", "bitmask"),
    ("MXFP4 of stacked experts (gpt-oss)", "experts\\.\\w+_blocks"),
))  # fmt: skip
#: Any of them, or `qweight`: nearly every name is none.
_ANY = re.compile("|".join(["\\.qweight$", *(ends.pattern for _, ends in _ENDS)]))
#: What config.json may declare, and the kinds of stored weights that confirm it.
_METHODS = {
    "fp8": {"fp8_tiles", "fp8_tensor", "fp8_channel", "mxfp4", "modelopt_nvfp4"},
    "fbgemm_fp8": {"fp8_channel"},
    "compressed-tensors": {"fp8_tiles", "fp8_tensor", "fp8_channel", "int4", "nvfp4"},
    "modelopt": {"fp8_tiles", "fp8_tensor", "fp8_channel", "modelopt_nvfp4"},
    "modelopt_fp4": {"modelopt_nvfp4"},
    "mxfp4": {"mxfp4"},
}
#: The same for compressed-tensors' formats.
_FORMATS = {
    "float-quantized": {"fp8_tiles", "fp8_tensor", "fp8_channel"},
    "naive-quantized": {"fp8_tiles", "fp8_tensor", "fp8_channel"},
    "pack-quantized": {"int4"},
    "nvfp4-pack-quantized": {"nvfp4"},
    "mixed-precision": _METHODS["compressed-tensors"],
    "dense": {"plain"},
}
_MODELOPT_CONFIG = "hf_quant_config.json"


def foreign_formats(checkpoint: Checkpoint) -> list[str]:
    """One problem for each format among the tensors that cannot be dequantized here."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in filter(_ANY.search, checkpoint.tensors):
        if name.endswith(".qweight"):
            found[_packed_by(checkpoint, name)].append(name)
            continue
        form = next((form for form, ends in _ENDS if ends.search(name)), None)
        if form is not None:
            found[form].append(name)
    return [
        f"{checkpoint.directory}: {len(names)} tensors are stored as {form} ({names[0]}), which this project cannot "
        f"dequantize; {REMEDY}"
        for form, names in found.items()
    ]


def _packed_by(checkpoint: Checkpoint, qweight: str) -> str:
    """Whether GPTQ or AWQ wrote a tensor: GPTQ packs rows, `[K/8, M]`, AWQ columns, `[K, M/8]`; with AWQ, weight and
    zero points have equally many columns."""
    module = qweight.removesuffix("qweight")
    packed, zeros = checkpoint.tensors[qweight], checkpoint.tensors.get(f"{module}qzeros")
    is_awq = f"{module}g_idx" not in checkpoint.tensors and zeros is not None and zeros.shape[-1:] == packed.shape[-1:]
    return "AWQ" if is_awq else "GPTQ"


def undeclared(checkpoint: Checkpoint, kinds: Iterable[str]) -> list[str]:
    """Problems with the quantization that config.json (or modelopt's own file beside it) declares: it is unknown here,
    or no weight (they have `kinds`) matches it. Raises SourceError if a file cannot be read."""
    where, declared = _declaration(checkpoint)
    method, form = declared.get("quant_method"), declared.get("format")
    if not declared or declared.get("config_groups") == {}:
        return []
    if method not in _METHODS:
        return [f"{where}: quant_method {method!r} is not supported ({', '.join(_METHODS)} are); {REMEDY}"]
    wanted = _METHODS[method]
    if method == "compressed-tensors" and form is not None:
        if form not in _FORMATS:
            return [f"{where}: format {form!r} is not supported ({', '.join(_FORMATS)} are); {REMEDY}"]
        wanted = _FORMATS[form]
    if wanted & set(kinds):
        return []
    what = f"quant_method {method}" + (f", format {form}" if form else "")
    return [
        f"{where}: declares {what}, and no weight is stored so; if the weights are plain, remove the declaration, "
        f"otherwise {REMEDY}"
    ]


def _declaration(checkpoint: Checkpoint) -> tuple[Path, dict[str, Any]]:
    for declared in (declared_quantization(checkpoint.config), checkpoint.config.get("compression_config")):
        if isinstance(declared, dict) and declared:
            return checkpoint.directory / CONFIG_NAME, declared
    path = checkpoint.directory / _MODELOPT_CONFIG
    try:
        return path, {"quant_method": "modelopt"} if read_json_object(path) else {}
    except MissingFile:
        return path, {}
