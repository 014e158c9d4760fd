"""What each candidate of each unit costs: the divergence of the model's predictions that it causes.

One pass over the source, one block in memory at a time, without llm-compressor. In each block every unit is tried alone: weights
rounded to nearest, inputs quantized as they are served. The block's output with the unit as its smallest candidate is carried,
beside the exact hidden states, through the blocks that follow to the head, where its KL divergence is measured. Of the other
candidates only the error of the block's output is measured (mean over tokens of the squared difference relative to the squared
norm), and the divergence is scaled by it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from compressed_tensors.utils import patch_attr
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from calibration.checkpoint import nvfp4, tiles
from calibration.checkpoint.files import read_json_or_none, write_json, write_safely
from calibration.model.parity import BlockCall, HandedOn, own_block_calls
from calibration.model.source_model import SourceModel
from calibration.plan.budget import Unit
from calibration.plan.schemes import FP8_BLOCK, SCHEMES, Scheme
from recipes.budget import UNQUANTIZED
from recipes.errors import SourceError

#: Inside, the blocks return these hidden states.
_Skipped = Callable[[torch.Tensor], AbstractContextManager[None]]
#: Unit -> candidate -> error.
Errors = dict[str, dict[str, float]]
#: Called with what was finished, how many of them, of how many.
OnStep = Callable[[Literal["block", "sample"], int, int], None]


#: The state is written at most this often: on a large model it has gigabytes, and a kill may cost minutes.
SAVE_SECONDS = 300.0
#: What the head has measured is written this often: it is a few numbers for each unit.
SAVE_HEAD_SECONDS = 30.0


@dataclass(frozen=True)
class Saved:
    """The files of a pass: its state, what the head has measured, and the key of both."""

    state: Path
    head: Path
    key: str


@dataclass
class _State:
    """What the pass knows before the block `following`: the exact hidden states by batch, those with one unit quantized by unit
    and batch, the errors of the block's output so far, and by batch what earlier blocks handed on beside hidden states."""

    following: int
    hidden: list[torch.Tensor]
    carried: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    errors: Errors = field(default_factory=dict)
    handed: list[list[Any]] = field(default_factory=list)

    def can_be_saved(self) -> bool:
        """Whether all that is handed on is tensors, as the positions that GLM-5 and HY-V4 select."""
        return all(isinstance(value, torch.Tensor) for values in self.handed for value in values)

    def save(self, path: Path, key: str) -> None:
        """Replaces the file. Raises EnvironmentProblem."""
        streams = [self.hidden, *self.carried.values()]
        tensors = {f"{n}.{at}": value.cpu().contiguous() for n, s in enumerate(streams) for at, value in enumerate(s)}
        tensors |= {
            f"handed.{n}.{at}": v.cpu().contiguous() for at, vs in enumerate(self.handed) for n, v in enumerate(vs)
        }
        said = {"key": key, "following": str(self.following), "errors": json.dumps(self.errors)}
        said["carried"] = json.dumps(list(self.carried))
        nbytes = sum(value.nbytes for value in tensors.values())
        write_safely(path, lambda partial: save_file(tensors, partial, said), nbytes)

    @classmethod
    def load(cls, path: Path, key: str, first: list[torch.Tensor]) -> _State | None:
        """The saved state of the same measurement, whose batches are as large as the `first` hidden states."""
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                if said.get("key") != key:
                    return None
                names = TypeAdapter(list[str]).validate_json(said["carried"])
                streams = [
                    [file.get_tensor(f"{n}.{at}").to(value.device) for at, value in enumerate(first)]
                    for n in range(len(names) + 1)
                ]
                errors = TypeAdapter(Errors).validate_json(said["errors"])
                found = cls(int(said["following"]), streams[0], dict(zip(names, streams[1:], strict=True)), errors)
                stored = set(file.keys())
                for at, value in enumerate(first):
                    places = takewhile(stored.__contains__, (f"handed.{n}.{at}" for n in count()))
                    found.handed.append([file.get_tensor(place).to(value.device) for place in places])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        alike = [(value.shape, value.dtype) for value in first]
        return found if all([(v.shape, v.dtype) for v in stream] == alike for stream in streams) else None

    def fits(self, units: Sequence[Unit], calls: Sequence[Sequence[BlockCall]]) -> bool:
        """Whether it knows the units of the blocks before `following` and what they hand on, and nothing else.
        `calls`: by batch, of all blocks."""
        known = {unit.name: unit.sizes.keys() for unit in units if unit.block < self.following}
        measured = {name: errors.keys() for name, errors in self.errors.items()}
        if not 0 <= self.following <= len(calls[0]) or measured != known or not self.carried.keys() <= known.keys():
            return False
        return [len(HandedOn(own, self.following)) for own in calls] == [len(values) for values in self.handed]


@dataclass
class _Head:
    """What the head has measured after the last block: of each unit, in the order of the units, the divergence summed over the
    tokens of each row of the samples; the rows of a unit in their order."""

    sums: dict[str, list[float]]

    @classmethod
    def load(cls, path: Path, key: str, units: Iterable[str], rows: int) -> _Head:
        """What the same measurement has saved; nothing if there is none."""
        nothing = cls({name: [] for name in units})
        found = read_json_or_none(path) or {}
        try:
            sums = TypeAdapter(dict[str, list[float]]).validate_python(found.get("sums"))
        except ValidationError:
            return nothing
        sound = sums.keys() == nothing.sums.keys() and all(
            len(values) <= rows and all(map(math.isfinite, values)) for values in sums.values()
        )
        return cls({name: sums[name] for name in nothing.sums}) if sound and found.get("key") == key else nothing

    def save(self, path: Path, key: str) -> None:
        """Replaces the file. Raises EnvironmentProblem."""
        write_json(path, {"key": key, "sums": self.sums})


@torch.no_grad()
def measure(
    units: Sequence[Unit],
    source: SourceModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
    saved: Saved,
    on_step: OnStep = lambda what, finished, number: None,
) -> Errors:
    """The KL divergence, in nats a token, that every candidate of every unit causes alone.

    `batches` are of `input_ids` and `attention_mask`, int64 `[batch, tokens]`, without padding. What is known goes to the files
    `saved`, and a pass with the same key resumes there. `on_step` is called with "block" or, after the blocks, "sample", and how
    many of how many are finished; if it raises, everything is saved first. Raises SourceError for hidden states that are not
    finite.
    """
    blocks, names = list(source.blocks.values()), source.model_modules()
    samples = [{k: v.to(source.device) for k, v in batch.items()} | {"use_cache": False} for batch in batches]
    outside = source.outside_blocks()
    source.load(outside)
    called = [own_block_calls(source.model, blocks, sample) for sample in samples]
    source.unload(outside)
    first, calls = [hidden for hidden, _ in called], [own for _, own in called]
    hands_on = any(call.takes_more for own in calls for call in own)
    saved_state = _State.load(saved.state, saved.key, first)
    state = saved_state if saved_state and saved_state.fits(units, calls) else _State(0, first)
    for own_calls, values in zip(calls, state.handed, strict=False):
        HandedOn(own_calls, state.following).set(values)
    saving = _Saving(state, saved, state is saved_state)
    for number in range(state.following, len(blocks)):
        source.load([blocks[number]])
        tried = _Block(blocks[number], [own_calls[number] for own_calls in calls])
        own = [_Unit(unit, [source.model.get_submodule(names[m]) for m in unit.modules])
               for unit in units if unit.block == number]  # fmt: skip
        exact, largest = tried.exact(state.hidden, own)
        if not all(bool(made.isfinite().all()) for made in exact):
            raise SourceError(f"block {number}: the hidden states are not finite: the source overflows or is damaged")
        for name, values in state.carried.items():  # one at a time: those of a large model have gigabytes
            state.carried[name] = tried.run(values)
        for unit in own:
            errors, smallest = dict.fromkeys(unit.unit.sizes, 0.0), unit.unit.smallest
            for name in unit.unit.sizes:
                if name != UNQUANTIZED:
                    made = tried.quantized(state.hidden, unit, SCHEMES[name], largest)
                    errors[name] = _relative(made, exact)
                    if name == smallest:
                        state.carried[unit.unit.name] = made
            state.errors[unit.unit.name] = errors
        source.unload([blocks[number]])
        state.following, state.hidden, saving.on_disk = number + 1, exact, False
        state.handed = [HandedOn(own_calls, number + 1).get() for own_calls in calls]
        saving.save_state()
        try:
            on_step("block", number + 1, len(blocks))
        except BaseException:
            saving.save_state(now=True)
            raise
    source.load(outside)
    divergences = _divergences(source.model, samples, saving, partial(_skipped, blocks, hands_on), on_step)
    source.unload(outside)
    return {unit.name: _scaled(unit, state.errors[unit.name], divergences.get(unit.name, 0.0)) for unit in units}


def _scaled(unit: Unit, errors: Mapping[str, float], divergence: float) -> dict[str, float]:
    """The errors of the block's output in units of the divergence that the smallest candidate causes."""
    factor = divergence / errors[unit.smallest] if errors[unit.smallest] > 0 else 0.0
    return {name: error * factor for name, error in errors.items()}


@dataclass
class _Saving:
    """Saves a pass: its `state` seldom, and not again while it is `on_disk` as it is; what the head has measured often."""

    state: _State
    saved: Saved
    on_disk: bool
    _written: float = field(default_factory=time.monotonic)
    _head_written: float = field(default_factory=time.monotonic)

    def save_state(self, now: bool = False) -> None:
        """Writes the state if it is due, or `now`. Raises EnvironmentProblem."""
        if not self.on_disk and self.state.can_be_saved() and (now or time.monotonic() - self._written >= SAVE_SECONDS):
            self.state.save(self.saved.state, self.saved.key)
            self._written, self.on_disk = time.monotonic(), True

    def save(self, head: _Head, now: bool = False) -> None:
        """Writes what is due; everything `now`. Raises EnvironmentProblem."""
        self.save_state(now)
        if now or time.monotonic() - self._head_written >= SAVE_HEAD_SECONDS:
            head.save(self.saved.head, self.saved.key)
            self._head_written = time.monotonic()


def _divergences(
    model: nn.Module, samples: Sequence[dict[str, Any]], saving: _Saving, skipped: _Skipped, on_step: OnStep
) -> dict[str, float]:
    """The mean KL divergence, in nats a token, of the predictions with each unit quantized."""
    places = [(at, row) for at, sample in enumerate(samples) for row in range(len(sample["input_ids"]))]
    state = saving.state
    head = _Head.load(saving.saved.head, saving.saved.key, state.carried, len(places))
    for number, (at, row) in enumerate(places):
        missing = [name for name in state.carried if len(head.sums[name]) == number]
        if missing:
            part = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in samples[at].items()}
            exact = _log_probabilities(model, part, skipped(state.hidden[at][row : row + 1]))
        for name in missing:
            made = _log_probabilities(model, part, skipped(state.carried[name][at][row : row + 1]))
            head.sums[name].append(float(F.kl_div(made, exact, reduction="sum", log_target=True)))
            saving.save(head)
        try:
            on_step("sample", number + 1, len(places))
        except BaseException:
            saving.save(head, now=True)
            raise
    tokens = sum(sample["input_ids"].numel() for sample in samples)
    return {name: max(sum(values) / tokens, 0.0) for name, values in head.sums.items()}


@contextmanager
def _skipped(blocks: Sequence[nn.Module], hands_on: bool, hidden: torch.Tensor) -> Iterator[None]:
    """Inside, every block returns `hidden`, and nothing else that it may hand on."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(
                patch_attr(block, "forward", lambda *args, **kwargs: (hidden, None) if hands_on else hidden)
            )
        yield


def _log_probabilities(model: nn.Module, sample: dict[str, Any], skipped: AbstractContextManager[None]) -> torch.Tensor:
    """Float32 `[tokens, vocabulary]` of the model's own forward if its blocks had made the hidden states of `skipped`."""
    with skipped:
        logits: torch.Tensor = model(**sample).logits
    return logits.flatten(0, -2).float().log_softmax(-1)


@dataclass(frozen=True, eq=False)
class _Unit:
    """A unit and its loaded modules."""

    unit: Unit
    modules: list[nn.Module]


@dataclass(frozen=True)
class _Block:
    """A loaded block and the model's own call of it for every batch."""

    block: nn.Module
    calls: list[BlockCall]

    def run(self, hidden: Sequence[torch.Tensor], keep: bool = False) -> list[torch.Tensor]:
        """The block's outputs by batch. What it hands on beside them is that of the exact run, which alone is to `keep` it."""
        return [call(self.block, value, keep) for call, value in zip(self.calls, hidden, strict=True)]

    def exact(
        self, hidden: Sequence[torch.Tensor], units: Sequence[_Unit]
    ) -> tuple[list[torch.Tensor], dict[nn.Module, float]]:
        """The outputs, and the largest input of every module of the units; none if no token reached it."""
        largest: dict[nn.Module, float] = {}

        def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments[0].numel():
                largest[module] = max(largest.get(module, 0.0), float(arguments[0].abs().amax()))

        with ExitStack() as stack:
            for module in (module for unit in units for module in unit.modules):
                stack.callback(module.register_forward_pre_hook(see).remove)
            return self.run(hidden, keep=True), largest

    def quantized(
        self, hidden: Sequence[torch.Tensor], unit: _Unit, scheme: Scheme, largest: Mapping[nn.Module, float]
    ) -> list[torch.Tensor]:
        """The outputs with one unit in `scheme`."""
        with ExitStack() as stack:
            for module in unit.modules:
                stack.enter_context(_emulated(module, scheme, largest.get(module, 0.0)))
            return self.run(hidden)


@contextmanager
def _emulated(module: nn.Module, scheme: Scheme, largest: float) -> Iterator[None]:
    """Inside, a call of the layer has rounded weights and inputs. One layer's rounded weight is in memory at a time."""
    exact: torch.Tensor = module.weight.data  # type: ignore[assignment]

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        module.weight.data = rounded_weight(exact, scheme)
        return _rounded_input(arguments[0], scheme, largest), *arguments[1:]

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        module.weight.data = exact

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after).remove)
        yield
    module.weight.data = exact


def rounded_weight(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """A weight `[M, K]` rounded to nearest in the scheme and back, in its dtype."""
    if scheme is FP8_BLOCK:
        return tiles.dequantize_tiles(*tiles.quantize_tiles(weight)).to(weight.dtype)
    return nvfp4.quantize_dequantize(weight, _global_scale(float(weight.abs().amax()), weight.device))


def _rounded_input(value: torch.Tensor, scheme: Scheme, largest: float) -> torch.Tensor:
    if scheme.input_activations is None or not value.numel():
        return value
    if scheme is FP8_BLOCK:
        return tiles.quantize_dequantize_groups(value)
    return nvfp4.quantize_dequantize(value, _global_scale(largest, value.device))


def _global_scale(largest: float, device: torch.device) -> torch.Tensor:
    return torch.tensor([nvfp4.RANGE / largest if largest > 0 else 1.0], device=device)


def _relative(made: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The mean over tokens of the squared difference relative to the exact squared norm; `[batch, tokens, ...]` each."""
    total, tokens = 0.0, 0
    for one, other in zip(made, exact, strict=True):
        right = other.flatten(0, 1).flatten(1).float()
        difference = (one.flatten(0, 1).flatten(1).float() - right).square().sum(1)
        total += float((difference / right.square().sum(1).clamp_min(1e-30)).sum(dtype=torch.float64))
        tokens += len(right)
    return total / tokens
