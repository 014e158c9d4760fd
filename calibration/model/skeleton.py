"""Builds the empty transformers model of a checkpoint and matches each of its tensors with the source."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedModel

from calibration.checkpoint import native
from calibration.checkpoint.collector import collector_paused
from calibration.checkpoint.files import write_json, write_safely
from calibration.checkpoint.formats import Formats, logical_name
from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.checkpoint.permissions import without_choices
from calibration.checkpoint.source_config import without
from calibration.families.family import BESIDE, Family
from calibration.families.registry import family_of, language_config
from calibration.model.joined import divide
from calibration.model.linear_experts import linearize_experts
from calibration.model.scaled_latents import scale_latents
from calibration.model.source_model import SourceModel, own_tensors, place
from calibration.model.text_model import build_language_model, language_model_config
from calibration.plan.source_check import is_carried, is_left_out
from recipes.errors import SourceError


@collector_paused()
def build_skeleton(
    formats: Formats, run_directory: Path, trust_remote_code: bool, device: torch.device | None = None
) -> SourceModel:
    """Builds the empty model of the checkpoint that has these `formats` and matches each of its tensors with the headers.

    Writes `<run_directory>/skeleton/config.json`, the source's config without `quantization_config`: llm-compressor
    reads the config that the model names on disk and refuses a quantized one. The compute dtype is BF16. Tensors that
    the source stores in F32 and transformers keeps in F32 (mHC, sinks, router bias, compressor positions) stay F32,
    except norms: an F32 norm weight makes the next BF16 linear layer fail. Raises SourceError for a family or config
    that transformers cannot build and, all at once, for model tensors without a source, source tensors (outside MTP)
    without a destination, and shapes that differ.
    """
    checkpoint = formats.checkpoint
    family = family_of(checkpoint.config, str(checkpoint.directory / CONFIG_NAME), checkpoint.tensors)
    if family.not_calibrated:
        raise SourceError(f"{checkpoint.directory}: {family.not_calibrated}")
    _check_padding(checkpoint)
    device = native.computing_device(device)
    model = _empty_model(_clean_config(checkpoint, family, run_directory, trust_remote_code), trust_remote_code)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf in module._non_persistent_buffers_set:
                module._buffers[leaf] = buffer.to(device)
    divide(model, family, formats)
    sources = _match(model, checkpoint, formats, family)
    _set_dtypes(model, checkpoint, sources)
    return SourceModel(model.eval(), formats, family, sources, device)


def _clean_config(checkpoint: Checkpoint, family: Family, run_directory: Path, trust_remote_code: bool) -> Path:
    directory = run_directory / "skeleton"
    directory.mkdir(parents=True, exist_ok=True)
    plain = without_choices(without(checkpoint.config, "quantization_config"))
    with _explained(directory):
        config = language_model_config(plain, family)
    write_json(directory / CONFIG_NAME, config)
    for code in checkpoint.directory.glob("*.py") if trust_remote_code else ():
        write_safely(directory / code.name, partial(shutil.copyfile, code), code.stat().st_size)
    return directory


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty` return meta tensors if no device is named. accelerate moves a parameter to meta only after
    allocating it: the experts of one V4-Pro block would briefly take 34 GB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _empty_model(directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    # Non-persistent buffers (rotary frequencies) are computed by the constructor and must be real.
    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        model = _built(directory, trust_remote_code)
    with _EmptyOnMeta():
        linearize_experts(model)
    scale_latents(model)
    for module in model.modules():
        for leaf, tensor in list(own_tensors(module)):
            place(module, leaf, tensor.detach().to("meta"))
    return model


def _built(directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    """transformers' model of the config in `directory`. Raises SourceError for every error of transformers."""
    with _explained(directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        config.dtype = torch.bfloat16
        return build_language_model(config, trust_remote_code)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Raises SourceError for whatever transformers raises about the config in `directory`."""
    try:
        yield
    except Exception as error:  # transformers, its validators and torch raise all kinds of errors
        lines = str(error).strip().splitlines()
        raise SourceError(
            f"{directory / CONFIG_NAME}: transformers cannot build the model: {type(error).__name__}: "
            f"{lines[0] if lines else 'no message'}; correct the source's {CONFIG_NAME}"
        ) from error


def _check_padding(checkpoint: Checkpoint) -> None:
    """Raises SourceError for a pad token outside the embedding: torch asserts this when it builds the model."""
    config = language_config(checkpoint.config)
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        raise SourceError(
            f"{checkpoint.directory / CONFIG_NAME}: pad_token_id: {pad} has no row in an embedding of vocab_size {rows}; "
            "transformers cannot load such a model. Set it to null, or to an existing token"
        )


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{leaf}" if name else leaf: tensor
        for name, module in model.named_modules()
        for leaf, tensor in own_tensors(module)
    }


def _match(model: PreTrainedModel, checkpoint: Checkpoint, formats: Formats, family: Family) -> dict[str, str]:
    tensors, computed = _all_tensors(model), {name for name, _ in model.named_buffers()}
    where = checkpoint.directory
    sources: dict[str, str] = {}
    unplaced: list[str] = []
    problems: list[str] = []
    for source in checkpoint.tensors:
        where_to = family.place(source)
        if source in formats.companions or where_to.mtp or where_to.part in BESIDE:
            continue
        if is_left_out(source) or is_carried(source):
            continue
        name = family.model_name(logical_name(source))
        if name in sources:
            problems.append(f"{where}: {sources[name]} and {source} are both meant for {name}; remove one")
        elif name in tensors:
            sources[name] = source
        elif name not in computed:
            unplaced.append(source)
    for tied, target in (model._tied_weights_keys or {}).items() if model.config.tie_word_embeddings else ():
        if tied in tensors and tied not in sources and target in sources:
            sources[tied] = sources[target]
    missing = [name for name in tensors if name not in sources]
    if missing:
        problems.append(
            f"{where}: {len(missing)} tensors of {type(model).__name__} have no source tensor: {_some(missing)}; "
            "the checkpoint is incomplete or its config.json describes another model"
        )
    if unplaced:
        problems.append(
            f"{where}: {len(unplaced)} source tensors have no place in {type(model).__name__}: {_some(unplaced)}; "
            "config.json may describe a smaller model (num_hidden_layers, number of experts)"
        )
    differing: dict[tuple[Any, Any], list[str]] = defaultdict(list)
    for name, source in sources.items():
        stored, wanted = tuple(formats.of(source).shape), tuple(tensors[name].shape)
        if stored != wanted:
            differing[stored, wanted].append(source)
    problems += [
        f"{where}: {_some(names)}: stored shape {list(stored)}, {type(model).__name__} built from config.json needs "
        f"{list(wanted)}"
        for (stored, wanted), names in differing.items()
    ]
    if problems:
        raise SourceError(problems)
    return sources


def _set_dtypes(model: PreTrainedModel, checkpoint: Checkpoint, sources: dict[str, str]) -> None:
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, module in model.named_modules():
        for leaf, tensor in list(own_tensors(module)):
            full = f"{name}.{leaf}" if name else leaf
            if not tensor.is_floating_point():
                continue
            is_f32 = checkpoint.tensors[sources[full]].dtype == "F32"
            stays = is_f32 and "norm" not in type(module).__name__.lower() and any(part in full for part in kept)
            dtype = torch.float32 if stays else torch.bfloat16
            if tensor.dtype != dtype:
                place(module, leaf, torch.empty_like(tensor, dtype=dtype, device="meta"))


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
