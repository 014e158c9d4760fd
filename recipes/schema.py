"""The recipe: what to quantize, on which data, into what, and how the result is checked.

These pydantic models are the only truth about a recipe's keys, defaults and bounds. `python -m recipes.schema`
prints the JSON schema made from them (checked in as `recipes/recipe.schema.json`, for editors).

Paths are relative to the current directory; a leading `~` is expanded, environment variables are not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    ByteSize,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from recipes.budget import Budget, budget_problem
from recipes.checks import Verify
from recipes.errors import RecipeError
from recipes.fields import Bytes, PathText, Section, Text
from recipes.modifiers import ModifierEntry, QuantizationEntry, quantization_entries
from recipes.places import is_inside, own_scratch, run_directory, source_conflict
from recipes.presets import expand
from recipes.schemes import has_input_scale, is_own_observer
from recipes.smoothing import Smoothing

#: More would be `all` at a higher price: every candidate is held in memory.
MOST_TOKENS = 65_536


class Source(Section):
    """The checkpoint to read. It is never written to."""

    checkpoint: PathText
    """Local directory with a Hugging Face checkpoint, or a hub id such as Qwen/Qwen3-8B."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id. Pin a commit for a run that must be repeatable."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for checkpoints you trust."""


class ToppedUp(Section):
    """Every expert sees its routed tokens and, if these are fewer, those that its router ranks next for it."""

    topped_up: int = Field(ge=1, le=MOST_TOKENS)
    """Tokens that every expert sees at least, if the calibration has as many."""


class Calibration(Section):
    """The text that runs through the model while observers watch."""

    dataset: PathText
    """'bundled' (small text set of this project), a hub id, or a local file (.jsonl, .json, .parquet, .txt, .csv, .tsv)
    or directory."""
    config_name: Text | None = None
    """Configuration of a hub data set that has several."""
    split: Text = "train"
    """Split of the data set."""
    format: Literal["auto", "text", "messages"] = "auto"
    """What a row contains: plain text or chat messages. auto decides by the columns."""
    column: Text | None = None
    """Column to read; by default, the first of the usual names."""
    chat: Literal["auto", "template", "deepseek_v4"] = "auto"
    """How messages become text: the tokenizer's chat template, or DeepSeek-V4's own encoding (it has no template)."""
    num_samples: int = Field(default=256, ge=1)
    """Number of samples to draw from the data set; a smaller data set is used whole, with a warning."""
    exact: bool = False
    """Refuse a data set that yields fewer than num_samples samples."""
    max_seq_length: int = Field(default=2048, ge=1, le=1_048_576)
    """Maximum tokens per sample; longer samples are cut."""
    batch_size: int = Field(default=1, ge=1)
    """Maximum samples per forward pass, all of one length: nothing is padded. Larger is faster and needs more
    memory."""
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    """Seed of the shuffle; the same seed draws the same samples."""
    shuffle: bool = True
    """Shuffle before drawing; false takes the first rows."""
    experts: Literal["all", "routed"] | ToppedUp = "all"
    """Tokens that routed experts observe. all: every token, exactly as llm-compressor's default. routed: those routed to the
    expert. {topped_up: N}: those, and up to N those that its router ranks next; several times less work than all."""
    all_experts: bool | None = None
    """Older spelling of experts: true means all, false means routed."""
    min_tokens_per_expert: int = Field(default=1, ge=1)
    """With experts: routed, an expert that saw fewer tokens takes its input scales from the largest of its peers."""
    input_headroom: float = Field(default=1.0, ge=1, le=16)
    """Factor on the largest calibrated input: each input global scale is divided by it, so that inputs larger than in
    calibration do not saturate. 1 keeps the calibrated scales; powers of two are exact."""

    @model_validator(mode="before")
    @classmethod
    def _one_spelling_of_experts(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("all_experts"), bool):
            return data
        meant = "all" if data["all_experts"] else "routed"
        if data.get("experts", meant) != meant:
            given = str(data["all_experts"]).lower()
            raise ValueError(
                f"all_experts: {given} means `experts: {meant}`, and experts says otherwise; remove all_experts"
            )
        return {key: value for key, value in data.items() if key != "all_experts"} | {"experts": meant}

    @field_validator("experts", mode="before")
    @classmethod
    def _known_experts(cls, value: object) -> object:
        number = value.get("topped_up") if isinstance(value, dict) and len(value) == 1 else None
        whole = isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= MOST_TOKENS
        if not whole and value not in ("all", "routed") and not isinstance(value, ToppedUp):
            raise ValueError(f"must be all, routed or {{topped_up: N}} with a whole number N from 1 to {MOST_TOKENS:,}")
        return value

    @model_validator(mode="after")
    def _one_least(self) -> Self:
        if self.topped_up and self.min_tokens_per_expert != 1:
            raise ValueError(
                f"min_tokens_per_expert: {self.min_tokens_per_expert} is for `experts: routed`; with topped_up its number "
                "is the least; remove min_tokens_per_expert"
            )
        return self

    @property
    def topped_up(self) -> int | None:
        """The least tokens of an expert with `experts: {topped_up: N}`, else None."""
        return self.experts.topped_up if isinstance(self.experts, ToppedUp) else None


class Conversion(Section):
    """Settings of `method: convert` and `method: plain`; calibrate ignores them."""

    input_amax: float = Field(default=2688.0, ge=1e-30, le=1e30)
    """Largest activation that NVFP4 (W4A4) assumes without calibration; input_global_scale is 2688 / input_amax."""
    workers: int | None = Field(default=None, ge=1, le=256)
    """Threads that read and compute; default: one more than processors, at most 16. The output does not depend on
    it."""


class Offload(Section):
    """Where activations are kept between blocks. Weights are never offloaded: they are read from the source block by
    block."""

    directory: PathText | None = None
    """Directory on a fast local disk for activations; default: the run directory."""
    max_host_memory: Bytes | None = None
    """Memory of its own that a run may use for activations, for example 500GiB. The rest (by default, all) is in mapped
    files in the directory, which the system caches while it has free memory."""


class Export(Section):
    """What the output checkpoint contains besides the quantized modules."""

    kept: Literal["native", "plain"] = "native"
    """Tensors stored in FP8 or MXFP4 that no target matches: native copies their bytes, plain writes plain_dtype.
    mtp.* is always copied."""
    plain_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype that `kept: plain` and `method: plain` write for FP8, MXFP4 and NVFP4; tensors that are already plain are
    copied."""
    mxfp4: Literal["lossless", "requantize"] = "lossless"
    """MXFP4 weights that become NVFP4: lossless keeps their values bit for bit if the scales allow it and requantizes the
    others; requantize all. Weights that a modifier edits (GPTQ) are always requantized."""
    input_global_scale: Literal["shared", "per_expert"] = "shared"
    """One input global scale for all experts of a block (what vLLM's fused kernels use), or one per expert."""
    dialect: Literal["compressed_tensors", "nvidia"] = "compressed_tensors"
    """How the output spells NVFP4: compressed-tensors as llm-compressor writes it, or as NVIDIA's own checkpoints (modelopt; of
    DeepSeek-V4 `quant_method: fp8` with `moe_quant_algo: NVFP4`). The packed bytes are the same."""
    max_shard_size: Bytes = ByteSize(5_000_000_000)
    """Largest size of a safetensors file; a larger tensor gets a file of its own."""


class Rehearse(Section):
    """The dress rehearsal before a run: the first block of every kind calibrated, exported and verified like the whole."""

    serving: bool | Literal["auto"] = "auto"
    """Whether vLLM serves the miniature before the run begins. auto: if the run is predicted to take more than 15 minutes; true:
    always; false: never, and a long run is rehearsed without vLLM."""
    forward: Literal["stop", "warn"] = "stop"
    """If vLLM and transformers compute different models from the source: stop before the run begins, or warn and run."""

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = handler(self)  # as for a recipe, below
        if self.forward == "stop":
            body.pop("forward", None)
        return body


class Recipe(Section):
    """A run: source checkpoint, output directory, quantization, calibration data, checks."""

    source: Source
    """The checkpoint to read."""
    output: PathText
    """Directory of the output checkpoint, apart from the source. The run directory is beside it: `<output>.run/`."""
    method: Literal["calibrate", "convert", "plain"] = "calibrate"
    """calibrate runs data through the model; convert uses only weight statistics; plain only dequantizes."""
    preset: Literal["fast", "best"] | None = Field(default=None, exclude=True)
    """A choice of modifiers by measurement (docs/methods.md); the run's recipe.yaml has it written out."""
    modifiers: list[ModifierEntry] = Field(default=[], validate_default=True)
    """llm-compressor modifiers in order, one name per entry. Exactly one of them selects the modules to quantize."""
    calibration: Calibration | None = Field(default=None, validate_default=True)
    """Calibration data; required when method is calibrate."""
    convert: Conversion = Conversion()
    """Settings of the methods that need no data."""
    offload: Offload = Offload()
    """Where activations are kept between blocks."""
    export: Export = Export()
    """Form of the output checkpoint."""
    verify: Verify = Verify()
    """Checks of the output."""
    rehearse: Rehearse = Rehearse()
    """What is tried before a long run begins."""
    budget: Budget | None = None
    """A size, for which the run chooses each module's scheme; the run's recipe.yaml has them written out."""

    @model_validator(mode="before")
    @classmethod
    def _preset_written_out(cls, data: Any) -> Any:
        return expand(data) if isinstance(data, dict) else data

    @field_validator("output")
    @classmethod
    def _output_is_a_directory_of_its_own(cls, output: str, info: ValidationInfo) -> str:
        if Path(output).name in ("", ".."):
            raise ValueError("must end in the name of a directory, such as models/output; name a new one")
        for place in (Path(output), run_directory(Path(output))):
            _require_apart(place, info)
        return output

    @field_validator("offload")
    @classmethod
    def _scratch_is_apart(cls, offload: Offload, info: ValidationInfo) -> Offload:
        output = info.data.get("output")
        if offload.directory is None or output is None:
            return offload
        if is_inside(Path(offload.directory), Path(output)):
            raise ValueError(f"directory {offload.directory} lies inside the output {output}; name another directory")
        _require_apart(own_scratch(Path(offload.directory), Path(output)), info)
        return offload

    @field_validator("modifiers")
    @classmethod
    def _one_modifier_quantizes(cls, modifiers: list[ModifierEntry], info: ValidationInfo) -> list[ModifierEntry]:
        entries = quantization_entries(modifiers)
        found = [entry.name for entry in entries]
        method = info.data.get("method")
        if method == "plain" and modifiers:
            raise ValueError("must be left out with method 'plain', which quantizes nothing")
        if method == "convert" and [entry.name for entry in modifiers] not in ([], ["QuantizationModifier"]):
            raise ValueError(
                "must be one QuantizationModifier with method 'convert': the others need method 'calibrate'"
            )
        own = [name for entry in entries for name in entry.observers_of_weights if is_own_observer(name)]
        if method == "convert" and own:
            raise ValueError(f"weight observer {own[0]} needs method 'calibrate'; remove it")
        if len(found) > 1 or (not found and method in ("calibrate", "convert")):
            raise ValueError(
                f"exactly one modifier must name the modules to quantize (config_groups, or targets and scheme), "
                f"found {', '.join(found) or 'none'}"
            )
        idle = [
            entry.name
            for at, entry in enumerate(modifiers)
            if entry.smoothing is None and at not in {e.position for e in entries}
        ]
        if found and idle:
            raise ValueError(f"{idle[0]} beside {found[0]} names no modules to quantize; remove it")
        smoothing = [entry.name for entry in modifiers if entry.smoothing is not None]
        if len(smoothing) > 1:
            raise ValueError(f"{' and '.join(smoothing)} smooth the same layers; keep one of them")
        if smoothing and modifiers[0].smoothing is None:
            raise ValueError(f"{smoothing[0]} changes weights before they are quantized; write it before {found[0]}")
        return modifiers

    @field_validator("calibration")
    @classmethod
    def _calibrate_needs_data(cls, calibration: Calibration | None, info: ValidationInfo) -> Calibration | None:
        if calibration is None and info.data.get("method") == "calibrate":
            raise ValueError("is required with method 'calibrate'; `calibration: {dataset: bundled}` is the smallest")
        return calibration

    @field_validator("calibration")
    @classmethod
    def _headroom_has_scales(cls, calibration: Calibration | None, info: ValidationInfo) -> Calibration | None:
        if calibration is None or calibration.input_headroom == 1 or not {"method", "modifiers"} <= info.data.keys():
            return calibration
        given, method = f"input_headroom: {calibration.input_headroom:g}", info.data["method"]
        if method != "calibrate":
            remedy = "set convert.input_amax, or remove it" if method == "convert" else "remove it"
            raise ValueError(f"{given} widens calibrated input scales, and method {method!r} has none; {remedy}")
        entries = quantization_entries(info.data["modifiers"])
        presets = {group.preset for entry in entries for group in entry.config_groups.values()}
        if not any(has_input_scale(preset) for preset in presets):
            raise ValueError(
                f"{given} widens calibrated input scales, and {', '.join(sorted(presets))} has none; remove it, or use "
                "scheme NVFP4"
            )
        return calibration

    @field_validator("rehearse")
    @classmethod
    def _an_engine_is_named(cls, rehearse: Rehearse, info: ValidationInfo) -> Rehearse:
        verify = info.data.get("verify")
        if rehearse.serving is True and verify is not None and verify.serving is None:
            raise ValueError("serving: true needs an engine; add `serving: {}` to verify, or remove it")
        return rehearse

    @field_validator("budget")
    @classmethod
    def _budget_has_a_choice(cls, budget: Budget | None, info: ValidationInfo) -> Budget | None:
        if budget is not None and (problem := budget_problem(budget, info.data)) is not None:
            raise ValueError(problem)
        return budget

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A dump of a recipe is in every output and behind every digest: a key that came later is not in it at its default.
        body: dict[str, Any] = handler(self)
        if self.rehearse == Rehearse():
            body.pop("rehearse", None)
        if self.budget is None:
            body.pop("budget", None)
        return body

    @property
    def smoothing(self) -> Smoothing | None:
        """The arguments of the modifier that smooths, if there is one."""
        return next((entry.smoothing for entry in self.modifiers if entry.smoothing is not None), None)

    @property
    def quantization_modifier(self) -> QuantizationEntry:
        """The one modifier that selects the modules to quantize. Raises RecipeError if the recipe has none (method
        plain)."""
        entries = quantization_entries(self.modifiers)
        if not entries:
            raise RecipeError(f"modifiers: none names modules to quantize, and method {self.method!r} was asked for")
        return entries[0]


def _require_apart(place: Path, info: ValidationInfo) -> None:
    """Raises ValueError if the source is a directory of this machine and `place` is not apart from it."""
    source = info.data.get("source")
    if source is not None and (os.path.isdir(source.checkpoint) or is_inside(place, Path(source.checkpoint))):
        why = source_conflict(place, Path(source.checkpoint))
        if why is not None:
            raise ValueError(why)


class _Schema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema_text() -> str:
    """The JSON schema of a recipe as the text of `recipes/recipe.schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema |= Recipe.model_json_schema(schema_generator=_Schema)
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(json_schema_text(), end="")
