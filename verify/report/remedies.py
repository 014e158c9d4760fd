"""What to do about a check that is not PASS: one table of remedies by check."""

from __future__ import annotations

from verify.checks import LEVELS, Check

_DAMAGED = "a file is damaged: copy it again, or make it again (--overwrite)"
_REMAKE = "do not serve it; make it again from the source (--overwrite)"
_COPY = "copy what is named from the source"
_OTHER_WEIGHTS = "is that its source? then make it again (--overwrite)"
_MORE_TEXT = "calibrate on more text, or on text like the one you serve"
_KEEP = "calibrate on more text, or quantize fewer modules"
_REPEAT = "run the recipe again to repeat what data or a search decided"
_LOG = "read logs/serving.log and docs/troubleshooting.md"

#: Check -> what to do if it says FAIL or WARN.
REMEDIES: dict[str, str] = {
    "structure.open": _DAMAGED,
    "structure.read": _DAMAGED,
    "structure.files": "remove the named files, unless you trust who wrote them",
    "structure.requests": "remove the named entries, unless you trust who wrote them",
    "structure.recipe": "name the recipe that it was made with: --recipe RECIPE",
    "structure.signature": "do not serve it: download it again, from who signed it",
    "structure.total_size": _DAMAGED,
    "structure.tensors": _REMAKE,
    "structure.mtp": "take it from the source, or serve without speculation",
    "structure.dialect": _REMAKE,
    "structure.companions": _REMAKE,
    "structure.targets": "repair quantization_config, or make it again (--overwrite)",
    "structure.config": _COPY,
    "structure.tokenizer": _COPY,
    "structure.bits": _REMAKE,
    "structure.finite": _DAMAGED,
    "structure.scales": _REMAKE,
    "structure.fused": _REMAKE,
    "structure.input_scales": "make it again with export.input_global_scale: shared",
    "structure.zeros": "--source SOURCE tells whether it is zero in the source too",
    "structure.tables": _COPY,
    "structure.copies": _DAMAGED,
    "structure.digests": _DAMAGED,
    "fidelity.weights": _OTHER_WEIGHTS,
    "fidelity.cosine": _OTHER_WEIGHTS,
    "fidelity.sqnr": _OTHER_WEIGHTS,
    "fidelity.saturation": _OTHER_WEIGHTS,
    "fidelity.zero_groups": _OTHER_WEIGHTS,
    "fidelity.group_scales": _OTHER_WEIGHTS,
    "fidelity.global_scales": _OTHER_WEIGHTS,
    "fidelity.rounding": _OTHER_WEIGHTS,
    "fidelity.outliers": "see them in the report; make it again without them as targets",
    "fidelity.rescaled": _OTHER_WEIGHTS,
    "fidelity.smoothing": _OTHER_WEIGHTS,
    "fidelity.fp8_weights": _OTHER_WEIGHTS,
    "fidelity.coverage": _REMAKE,
    "fidelity.kept": _OTHER_WEIGHTS,
    "fidelity.block_cosine": _KEEP,
    "fidelity.propagated_cosine": _KEEP,
    "fidelity.input_scales": _MORE_TEXT,
    "fidelity.saturated_inputs": _MORE_TEXT,
    "serving.load": _LOG,
    "serving.tensors": _REMAKE,
    "serving.w4a4": "serve it on a device with NVFP4 kernels (Blackwell)",
    "serving.finite": _KEEP,
    "serving.logprobs": _KEEP,
    "serving.input_scales": "make it again with export.input_global_scale: shared",
    "serving.saturated_inputs": "WARN: calibrate on more text. FAIL: do not serve it, calibrate again",
    "serving.generate": _LOG,
    "serving.coherent": "read the samples; " + _KEEP,
    "serving.perplexity": _KEEP,
    "serving.draft_head": "try speculation on the device that will serve it",
    "serving.source": _KEEP,
    "serving.forward": "docs/families.md has known reasons; rehearse.forward: warn runs",
    "serving.accuracy": _KEEP,
    "proof.tensors": "it was edited, or made by another recipe: make it again (--overwrite)",
    "proof.scales": _REPEAT,
    "proof.tuned": _REPEAT,
    "proof.input_scales": _REMAKE,
    "proof.files": "remove or copy again what is named",
}

#: Check or level -> what to do if it stayed UNCHECKED.
_UNCHECKED: dict[str, str] = {
    "serving.w4a4": REMEDIES["serving.w4a4"],
    "serving.draft_head": REMEDIES["serving.draft_head"],
    "serving.source": "verify.serving.compare: true, in a run if the source is not BF16",
    "serving.accuracy": "score more samples, or serve the source (verify.serving.compare)",
    "serving.input_scales": "judge it on a device whose kernels know both modes",
    "serving.saturated_inputs": "judge it on a device whose kernels keep their input scales",
    "structure.signature": "--public-key FILE of the signer judges it",
    "proof.scales": _REPEAT,
    "proof.tuned": _REPEAT,
    "proof.input_scales": "--provenance FILE of the run; or verify a signature",
    "proof": "docs/verification.md#proof says what can be derived",
    "structure": "give what is named: --source SOURCE, --recipe RECIPE",
    "fidelity": "repair the structure first, or give --source SOURCE",
    "serving": _LOG,
}


def remedy(check: Check) -> str:
    """What to do about a check that is not PASS, or a level of which none was made."""
    level = check.id.split(".")[0]
    if check.id in LEVELS:
        return f"verify.{level} in the recipe, or --level {level}, asks for it"
    if check.verdict == "UNCHECKED":
        return _UNCHECKED.get(check.id) or _UNCHECKED.get(level, "read --details")
    return REMEDIES.get(check.id, "read docs/verification.md")
