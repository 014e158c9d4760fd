"""The transformers model of a source checkpoint, empty, whose weights come block by block straight from the shards.

Nothing is expanded to BF16 on disk and nothing is offloaded: parameters and persistent buffers live on the meta device
until `SourceModel.load` reads them, and go back there with `SourceModel.unload`.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from compressed_tensors.utils import match_named_modules
from llmcompressor.modeling.moe.linear_experts import ExpertMLPWithGate, LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from calibration.checkpoint.files import write_json, write_safely
from calibration.checkpoint.formats import Formats, check_finite, dequantize, logical_name
from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.checkpoint.permissions import without_choices
from calibration.families.family import Family
from calibration.families.registry import family_of
from calibration.model.weight_buffer import Ahead, Room
from calibration.plan.source_check import is_carried, is_left_out
from recipes.errors import SourceError

WEIGHT = ".weight"


class SourceModel:
    """A model skeleton and the source tensors that fill it.

    `model` is the transformers model with one nn.Linear per routed expert and projection, in eval mode; `blocks` its
    decoder blocks in order, by module name; `sources` maps each parameter and persistent buffer to a source tensor.
    Between `load` and `unload` the modules are ordinary modules on `device`.
    """

    def __init__(
        self, model: PreTrainedModel, formats: Formats, family: Family, sources: dict[str, str], device: torch.device
    ) -> None:
        self.model = model
        self.formats = formats
        self.family = family
        self.sources = sources
        self.device = device
        self.sequential_targets = list(infer_sequential_targets(model))
        self.blocks: dict[str, nn.Module] = dict(match_named_modules(model, self.sequential_targets))
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = {
            name.rpartition(".")[0]: logical_name(source).removesuffix(WEIGHT)
            for name, source in sources.items()
            if name.endswith(WEIGHT)
        }
        self._versions: dict[str, int] = {}
        #: Whether reading the next block ahead gains time: on the CPU it takes the time that the forward pass needs,
        #: and the memory of a block on top.
        self.reads_ahead = device.type != "cpu"
        self._ahead: Ahead | None = None

    def module_name(self, module: nn.Module) -> str:
        """The name of a module of the skeleton in transformers' tree."""
        name: str = self._names[module]
        return name

    def source_module(self, name: str) -> str:
        """The source checkpoint's spelling of a module (one with a weight) of transformers' tree."""
        return self._modules[name]

    def model_modules(self) -> dict[str, str]:
        """Source module name -> transformers module name, for every module with a weight."""
        return {source: name for name, source in self._modules.items()}

    def source_block(self, name: str) -> str:
        """The source's spelling of a block: `model.layers.3` -> `layers.3` for DeepSeek-V4."""
        split = [source.split(".") for tensor, source in self.sources.items() if tensor.startswith(name + ".")]
        common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
        return ".".join(parts[0] for parts in common)

    def outside_blocks(self) -> list[nn.Module]:
        """The modules outside the blocks that have tensors of their own: embedding, final norm, head, ..."""
        prefixes = tuple(f"{block}." for block in self.blocks)
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.sources if not name.startswith(prefixes))
        return [self.model.get_submodule(owner) for owner in owners]

    def load(self, roots: Iterable[nn.Module]) -> None:
        """Reads every tensor below `roots` from the source onto `device`; those already there are kept.

        Tensors that the source does not know (scales and zero points that modifiers allocated on meta) become NaN, or
        zero where integer, so that nothing uninitialised can reach the output. Raises SourceError for NaN or Inf.
        """
        ahead = {} if self._ahead is None else self._ahead.take()
        self._ahead = None
        missing = [found for found in self._tensors(roots) if found[-1].is_meta]
        reads = self._reads((full, tensor) for _, _, full, tensor in missing if full not in ahead)
        for module, leaf, full, tensor in missing:
            read, value = reads.get(full), ahead.pop(full, None)
            if value is None:
                value = self._empty(leaf, tensor) if read is None else read()
            self._place(module, leaf, value)
            if full in self.sources:
                self._versions[full] = _tensor(module, leaf)._version

    def prefetch(self, roots: Iterable[nn.Module]) -> None:
        """Begins to read what `load` of the same roots will need, in a thread; it takes the memory of one more block.
        Tensors that cannot be read are left to `load`, which raises where they are needed."""
        self.stop_reading()
        reads = self._reads((full, tensor) for _, _, full, tensor in self._tensors(roots) if tensor.is_meta)
        self._ahead = Ahead(self.device, reads)
        self._ahead.start()

    def stop_reading(self) -> None:
        """Ends `prefetch` and drops what it read."""
        if self._ahead is not None:
            self._ahead.stopped = True
            self._ahead.take()
            self._ahead = None

    def unload(self, roots: Iterable[nn.Module]) -> None:
        """Puts every tensor below `roots` back on meta and returns the freed memory to the system."""
        for module, leaf, full, tensor in self._tensors(roots):
            if not tensor.is_meta:
                self._place(module, leaf, torch.empty_like(tensor, device="meta"))
                self._versions.pop(full, None)
        trim_memory()

    def loaded(self) -> set[str]:
        """Names of the source-backed tensors that are in memory now."""
        everything = self._tensors([self.model])
        return {full for _, _, full, tensor in everything if full in self.sources and not tensor.is_meta}

    def edited(self, roots: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
        """Source tensors below `roots` whose values were written to since `load` (GPTQ, AWQ, SmoothQuant)."""
        return {
            self.sources[full]: tensor.data
            for _, _, full, tensor in self._tensors(roots)
            if full in self._versions and tensor._version != self._versions[full]
        }

    def _tensors(self, roots: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
        for root in roots:
            for name, module in root.named_modules(prefix=self._names[root]):
                prefix = f"{name}." if name else ""
                for leaf, tensor in _own_tensors(module):
                    yield module, leaf, prefix + leaf, tensor

    def _reads(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Callable[[], torch.Tensor]]:
        """How to read those of the named tensors that the source has; all of them into one room, in this order."""
        wanted = [(full, tensor) for full, tensor in tensors if full in self.sources]
        # Formats.read gives integers as a tensor of its own.
        fitting = {full: tensor for full, tensor in wanted if tensor.is_floating_point() and tensor.numel()}
        room = Room(self.device, fitting.values())
        return {
            full: partial(self._read, self.sources[full], tensor.dtype, room.take(tensor) if full in fitting else None)
            for full, tensor in wanted
        }

    def _read(self, source: str, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
        if self.device.type == "cpu":
            return self.formats.read(source, dtype, out)
        # The raw bytes travel: they are a half to a quarter of the BF16 values, and the accelerator dequantizes faster.
        checkpoint, stored = self.formats.checkpoint, self.formats.of(source)
        raw = checkpoint.read(source).to(self.device)
        if not raw.is_floating_point() and stored.kind == "plain":
            return raw
        scales = {role: checkpoint.read(name).to(self.device) for role, name in stored.scales.items()}
        value = dequantize(stored, raw, scales, dtype, out)
        check_finite(value, f"{checkpoint.path(source)}: {source}")
        return value

    def _empty(self, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
        if leaf.endswith("zero_point") or not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
        return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=self.device)

    @staticmethod
    def _place(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def build_skeleton(
    checkpoint: Checkpoint, run_directory: Path, trust_remote_code: bool, device: torch.device | None = None
) -> SourceModel:
    """Builds the empty model of `checkpoint` and matches every tensor of it with the source's headers.

    Writes `<run_directory>/skeleton/config.json`, the source's config without `quantization_config`: llm-compressor
    reads the config that the model names on disk and refuses a quantized one. Compute dtype is BF16; what the source
    stores in F32 and transformers keeps in F32 (mHC, sinks, router bias, compressor positions) stays F32, norms do not:
    an F32 norm weight makes the next BF16 linear layer fail.
    Raises SourceError for a config that transformers cannot build, and, all at once: model tensors without a source,
    source tensors (outside MTP) without a destination, shapes that differ.
    """
    family, formats = family_of(checkpoint.config, str(checkpoint.directory / CONFIG_NAME)), Formats(checkpoint)
    _check_padding(checkpoint)
    device = device or _main_device()
    model = _empty_model(_clean_config(checkpoint, run_directory, trust_remote_code), trust_remote_code)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf in module._non_persistent_buffers_set:
                module._buffers[leaf] = buffer.to(device)
    sources = _match(model, checkpoint, formats, family)
    _set_dtypes(model, checkpoint, sources)
    return SourceModel(model, formats, family, sources, device)


def trim_memory() -> None:
    """Returns freed heap pages to the system: glibc keeps them otherwise, and memory grows block by block."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _main_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _clean_config(checkpoint: Checkpoint, run_directory: Path, trust_remote_code: bool) -> Path:
    directory = run_directory / "skeleton"
    directory.mkdir(parents=True, exist_ok=True)
    config = without_choices({k: value for k, value in checkpoint.config.items() if k != "quantization_config"})
    write_json(directory / CONFIG_NAME, config)
    for code in checkpoint.directory.glob("*.py") if trust_remote_code else ():
        write_safely(directory / code.name, partial(shutil.copyfile, code), code.stat().st_size)
    return directory


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` gives meta tensors where no device is named. accelerate moves a parameter to meta only once it is
    allocated: V4-Pro's experts of one block would take 34 GB for that moment."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _empty_model(directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    # Non-persistent buffers (rotary frequencies) are computed by the constructor and must be real.
    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        model = _built(directory, trust_remote_code)
        for name, experts in get_non_linearized_moes(model):
            # transformers' class patching would walk every lazy module of transformers; replacing the empty modules
            # gives the same tree.
            linear = LinearExperts2D.get_linear_experts_cls(type(experts))
            model.set_submodule(name, _gate_first(linear(getattr(experts, "config", model.config))))
    for module in model.modules():
        for leaf, tensor in list(_own_tensors(module)):
            SourceModel._place(module, leaf, tensor.detach().to("meta"))
    return model.eval()


def _built(directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    """transformers' model of the config in `directory`. Raises SourceError for whatever transformers makes of an odd one."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        config.dtype = torch.bfloat16
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers, its validators and torch raise what they like
        lines = str(error).strip().splitlines()
        raise SourceError(
            f"{directory / CONFIG_NAME}: transformers cannot build the model: {type(error).__name__}: "
            f"{lines[0] if lines else 'no message'}; correct the source's {CONFIG_NAME}"
        ) from error
    return model


def _check_padding(checkpoint: Checkpoint) -> None:
    """Raises SourceError for a pad token that the embedding cannot have: torch asserts it when it builds the model."""
    pad, rows = checkpoint.config.get("pad_token_id"), checkpoint.config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
        raise SourceError(
            f"{checkpoint.directory / CONFIG_NAME}: pad_token_id: {pad} has no row in an embedding of vocab_size {rows}; "
            "transformers cannot load such a model. Set it to null, or to a token that there is"
        )


def _gate_first(experts: LinearExperts2D) -> LinearExperts2D:
    """gate before up, as `_apply_gate` takes them: their weights are read in this order, and lie in it in memory."""
    for expert in experts:
        if isinstance(expert, ExpertMLPWithGate):
            expert._modules = {leaf: expert._modules[leaf] for leaf in ("gate_proj", "up_proj", "down_proj")}
    return experts


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of this module alone."""
    yield from ((leaf, tensor) for leaf, tensor in list(module._parameters.items()) if tensor is not None)
    for leaf, tensor in list(module._buffers.items()):
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, tensor


def _tensor(module: nn.Module, leaf: str) -> torch.Tensor:
    tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    assert tensor is not None
    return tensor


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{leaf}" if name else leaf: tensor
        for name, module in model.named_modules()
        for leaf, tensor in _own_tensors(module)
    }


def _match(model: PreTrainedModel, checkpoint: Checkpoint, formats: Formats, family: Family) -> dict[str, str]:
    tensors, computed = _all_tensors(model), {name for name, _ in model.named_buffers()}
    where = checkpoint.directory
    sources: dict[str, str] = {}
    unplaced: list[str] = []
    problems: list[str] = []
    for source in checkpoint.tensors:
        if source in formats.companions or family.place(source).mtp or is_left_out(source) or is_carried(source):
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
        for leaf, tensor in list(_own_tensors(module)):
            full = f"{name}.{leaf}" if name else leaf
            if not tensor.is_floating_point():
                continue
            is_f32 = checkpoint.tensors[sources[full]].dtype == "F32"
            stays = is_f32 and "norm" not in type(module).__name__.lower() and any(part in full for part in kept)
            dtype = torch.float32 if stays else torch.bfloat16
            SourceModel._place(module, leaf, torch.empty_like(tensor, dtype=dtype, device="meta"))


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
