"""Calibration forward of linearized experts: every expert observes every token, or those routed to it, and only what
observers and outputs need is computed.

Stock llm-compressor runs each expert's whole MLP on all tokens and drops the outputs that were not routed. Observers
need less: gate and up of all experts share one input, which is observed once; the input of the down projection must be
observed on all tokens, but its output is needed only for routed tokens. The statistics are bit-identical to stock's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
import torch.nn.functional as F
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
from llmcompressor.modeling.moe.linear_experts import ExpertMLPWithGate, LinearExperts2D
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from llmcompressor.modifiers.quantization.calibration import calibrate_input_hook
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.observers import Observer
from llmcompressor.observers.min_max import MemorylessMinMaxObserver, MinMaxObserver, StaticMinMaxObserver
from torch import nn

from calibration.engine.observers import Collected, collects, fast_extremes, row_extremes
from calibration.engine.stacked_experts import Routing, Stack, is_plain
from calibration.engine.topped_up import TopUp
from calibration.engine.weighted import Importance, is_importance_hook, weighted_observer
from calibration.model.linear_experts import ExpertsWithIdentity

#: Observers whose entire state is min_vals and max_vals, so that equal inputs give equal states.
MIN_MAX = (StaticMinMaxObserver, MinMaxObserver, MemorylessMinMaxObserver)
INPUT_SHARING = (("gate_proj", "up_proj"), ("down_proj",))

#: The number of routed tokens is rounded up to a multiple of this before a matrix product.
ROWS = 16


class Pass(Enum):
    """The purpose of a forward pass: CALIBRATE observes; REPEAT computes the same bits without observing (parity);
    PROPAGATE computes only what the outputs need."""

    CALIBRATE = "calibrate"
    REPEAT = "repeat"
    PROPAGATE = "propagate"


@dataclass(frozen=True)
class _Observers:
    """Input observers of gate and up, grouped by equal behavior: `shared` over all experts, `own` by expert. `inputs` of
    gate and up and `down` collect what they see; None if their observers must see it themselves."""

    shared: list[list[Observer]]
    own: list[list[list[Observer]]]
    inputs: Collected | None = None
    down: Collected | None = None

    def hand_over(self) -> None:
        for collected in (self.inputs, self.down):
            if collected is not None:
                collected.hand_over()


@dataclass(frozen=True)
class _Call:
    """The inputs and output of one call of the experts, with the tensors' versions, which grow with every write."""

    given: tuple[torch.Tensor, ...]
    made: torch.Tensor
    versions: tuple[int, ...]

    @classmethod
    def of(cls, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> _Call:
        return cls(given, made, tuple(tensor._version for tensor in (*given, made)))

    def answers(self, given: tuple[torch.Tensor, ...]) -> bool:
        """Whether `given` has the same values and the kept tensors were not written to."""
        untouched = self.versions == tuple(tensor._version for tensor in (*self.given, self.made))
        return untouched and all(map(_identical, self.given, given))


class ExpertCalibration:
    """State of the calibration forward: the kind of pass that runs, the tokens routed to each expert so far, and with
    `top_up` the candidates for experts that are short of tokens."""

    #: Whether to compute all experts at once if possible (stacked_experts.py); None: only on accelerators.
    stacked: bool | None = None

    def __init__(self, top_up: TopUp | None = None) -> None:
        self.kind, self.top_up = Pass.CALIBRATE, top_up
        self._collecting = False
        #: The last CALIBRATE call of each module: a REPEAT with the same input has the same output.
        self._last: dict[nn.Module, _Call] = {}
        self._tokens: dict[nn.Module, list[int]] = {}
        self._observers: dict[nn.Module, _Observers | None] = {}

    @contextmanager
    def running(self, kind: Pass) -> Iterator[None]:
        """Runs the forward passes inside as `kind`; llm-compressor's hooks are disabled unless it is CALIBRATE."""
        with patch_attr(self, "kind", kind):
            if kind is Pass.CALIBRATE:
                with (
                    nullcontext() if self.top_up is None else self.top_up.watching(),
                    patch_attr(self, "_collecting", True),
                ):
                    yield
                self._hand_over()
            else:
                with HooksMixin.disable_hooks():
                    yield

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces the forward of llm-compressor's LinearExperts2D and the way its observers find extremes; restores
        both at the end."""
        calibration = self

        def forward(
            experts: LinearExperts2D, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            given = (hidden, top_k_index, top_k_weights)
            if calibration.kind is Pass.REPEAT and (last := calibration._last.get(experts)) and last.answers(given):
                return last.made.clone()
            made = calibration._forward(experts, *given)
            if calibration.kind is Pass.CALIBRATE:
                calibration._last[experts] = _Call.of(given, made)
                if not calibration._collecting:
                    calibration._hand_over()
            return made

        def forward_sorted(experts: Llama4LinearExperts, hidden: torch.Tensor) -> torch.Tensor:
            """hidden [E T, D], the tokens of one expert after those of another, already multiplied by their routing
            weight, which is zero without routing. As stock: every expert observes the tokens of all."""
            rows = hidden.any(dim=1).nonzero().flatten()
            made = torch.zeros_like(hidden)
            if len(rows):
                number = rows.div(len(hidden) // experts.num_experts, rounding_mode="floor")
                weights = torch.ones(len(rows), 1, dtype=hidden.dtype, device=hidden.device)
                made[rows] = forward(experts, hidden[rows], number.unsqueeze(-1), weights)
            return made

        with (
            patch_attr(LinearExperts2D, "forward", forward),
            patch_attr(ExpertsWithIdentity, "forward", forward),
            patch_attr(Llama4LinearExperts, "forward", forward_sorted),
            fast_extremes(),
        ):
            yield

    def tokens(self, experts: nn.Module) -> dict[int, int]:
        """Expert number -> tokens routed to it in CALIBRATE passes."""
        return dict(enumerate(self._tokens.get(experts, ())))

    def count(self, experts: nn.Module, tokens: dict[int, int]) -> None:
        """Replaces what `tokens` returns, with the sums over all ranks."""
        if tokens:
            self._tokens[experts] = [tokens[number] for number in range(len(tokens))]

    def forget(self, experts: nn.Module) -> None:
        """Drops the state of a module whose block is done."""
        self._last.pop(experts, None)
        self._tokens.pop(experts, None)
        self._observers.pop(experts, None)
        if self.top_up is not None:
            self.top_up.forget(experts)

    def show(self, experts: LinearExperts2D, number: int, tokens: torch.Tensor) -> None:
        """Shows one expert further tokens, [T, D], which nothing but observers and hooks notices."""
        expert, observers = experts[number], self._input_observers(experts)
        # Sums of importance are rounded once a call: one token at a time, so that they do not depend on what other ranks show.
        step = 1 if any(weighted_observer(linear) is not None for linear in expert.children()) else len(tokens)
        if observers is None:
            for part in torch.split(tokens, step):
                expert(part)
            return
        activated = _activated(expert, tokens[_padded(torch.arange(len(tokens), device=tokens.device))])[: len(tokens)]
        for part, made in zip(torch.split(tokens, step), torch.split(activated, step), strict=True):
            self._observe_inputs(experts, number, part)
            self._observe_down(expert, made)

    def _forward(
        self, experts: LinearExperts2D, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, D], top_k_index and top_k_weights [T, k] -> [T, D], as LinearExperts2D.forward."""
        routing = Routing.of(hidden.shape[0], experts.num_experts, top_k_index, top_k_weights)
        if self.kind is Pass.CALIBRATE:
            self._tokens[experts] = [a + b for a, b in zip(routing.counts, self._counted(experts), strict=True)]
            if self.top_up is not None:
                self.top_up.offer(experts, hidden, top_k_index, self._tokens[experts])
        all_experts = get_calibrate_all_experts_flag() and self.kind is not Pass.PROPAGATE
        observers = self._input_observers(experts) if self.kind is not Pass.PROPAGATE else None
        if observers is not None and all_experts and self.kind is Pass.CALIBRATE:
            for group in observers.shared:
                _observe_once(group, hidden)
            if (importance := _shared_importance(experts[number] for number in range(experts.num_experts))) is not None:
                importance.add(hidden)

        stacks = hidden.device.type != "cpu" if self.stacked is None else self.stacked
        stack = Stack.of(experts) if stacks else None
        down = partial(self._observe_down_of, experts)
        if stack is not None and observers is not None and all_experts:
            return stack.all_tokens(hidden, routing, down)
        if stack is not None and (observers is not None or self.kind is Pass.PROPAGATE):
            inputs = partial(self._observe_inputs, experts)
            return stack.routed_tokens(hidden, routing, inputs, down)
        if self.kind is Pass.CALIBRATE and observers is not None and observers.inputs is not None and not all_experts:
            observers.inputs.add(*_by_expert(hidden, routing))
        extremes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        output = torch.zeros_like(hidden)
        begin = 0
        for number, (expert, count) in enumerate(zip(experts, routing.counts, strict=False)):
            part = slice(begin, begin := begin + count)
            tokens = routing.rows[part]
            if not count and not all_experts:
                continue
            if observers is not None:
                # With all experts every token is shown; the output is needed of the routed ones alone.
                chosen = hidden if all_experts else hidden.index_select(0, _padded(tokens))
                shown = len(hidden) if all_experts else count
                if not all_experts:
                    self._observe_inputs(experts, number, chosen[:shown], collected=True)
                activated = _activated(expert, chosen)
                if observers.down is not None and self.kind is Pass.CALIBRATE:
                    extremes[number] = torch.aminmax(activated[:shown])
                self._observe_down(expert, activated[:shown], collected=observers.down is not None)
                out = _linear(
                    expert.down_proj, activated.index_select(0, _padded(tokens)) if all_experts else activated
                )[:count]
            elif all_experts:
                out = expert(hidden).index_select(0, tokens)
            else:
                # Other modifiers' hooks may count rows, so none are added if such hooks run.
                out = expert(hidden.index_select(0, _padded(tokens) if self.kind is Pass.PROPAGATE else tokens))[:count]
            output.index_add_(0, tokens, (out * routing.weights[part]).to(output.dtype))
        tokens, weights = routing.rows[begin:], routing.weights[begin:]  # of experts that return their input
        output.index_add_(0, tokens, (hidden[tokens] * weights).to(output.dtype))
        if observers is not None and observers.down is not None and extremes:
            observers.down.add(*_listed(extremes, experts.num_experts))
        return output

    def _hand_over(self) -> None:
        for observers in self._observers.values():
            if observers is not None:
                observers.hand_over()

    def _observe_inputs(
        self, experts: LinearExperts2D, number: int, value: torch.Tensor, collected: bool = False
    ) -> None:
        """Shows the inputs of gate and up to their observers, unless those that can be are `collected` by the caller."""
        observers = self._input_observers(experts) if self.kind is Pass.CALIBRATE else None
        if observers is None:
            return
        for group in observers.own[number] if observers.inputs is None or not collected else ():
            _observe_once(group, value)
        if (importance := _shared_importance([experts[number]])) is not None:
            importance.add(value)

    def _observe_down_of(self, experts: LinearExperts2D, number: int, activated: torch.Tensor) -> None:
        self._observe_down(experts[number], activated)

    def _observe_down(self, expert: ExpertMLPWithGate, activated: torch.Tensor, collected: bool = False) -> None:
        if self.kind is not Pass.CALIBRATE:
            return
        observer = getattr(expert.down_proj, "input_observer", None)
        if observer is not None and not collected:
            observer(activated)
        if (weighted := weighted_observer(expert.down_proj)) is not None:
            weighted.importance.add(activated)

    def _counted(self, experts: LinearExperts2D) -> list[int]:
        return self._tokens.get(experts) or [0] * experts.num_experts

    def _input_observers(self, experts: LinearExperts2D) -> _Observers | None:
        """Input observers of gate and up; None if observing once would skip something: another modifier's hook (GPTQ),
        another observer, another expert class."""
        if experts not in self._observers:
            self._observers[experts] = _group_observers(experts)
        return self._observers[experts]


def _padded(tokens: torch.Tensor) -> torch.Tensor:
    """On the CPU, `tokens` padded to a multiple of ROWS by repeating the first one: oneDNN compiles and keeps a matrix
    product for every number of rows (0.6 ms and 0.7 MB each), so that memory would grow with every block."""
    extra = -len(tokens) % ROWS if tokens.device.type == "cpu" else 0
    return torch.cat([tokens, tokens[:1].expand(extra)]) if extra else tokens


def _linear(linear: nn.Linear, value: torch.Tensor) -> torch.Tensor:
    """The layer without its hooks, and without compressed-tensors' wrapper if that is disabled."""
    if is_plain(linear):
        return F.linear(value, linear.weight, linear.bias)
    out: torch.Tensor = linear.forward(value)
    return out


def _identical(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def _observe_once(observers: list[Observer], hidden: torch.Tensor) -> None:
    first = observers[0]
    first(hidden)
    for name, value in first.get_statistics().items() if first.has_statistics else ():
        for observer in observers[1:]:
            setattr(observer, name, value)


def _shared_importance(experts: Iterable[nn.Module]) -> Importance | None:
    """The one importance of the input that gate and up of these experts share; None if no such weight asks for one."""
    linears = (getattr(expert, leaf) for expert in experts for leaf in INPUT_SHARING[0])
    observers = [observer for linear in linears if (observer := weighted_observer(linear)) is not None]
    for observer in observers[1:]:
        observer.importance = observers[0].importance
    return observers[0].importance if observers else None


def _activated(expert: ExpertMLPWithGate, value: torch.Tensor) -> torch.Tensor:
    """The input of the down projection."""
    gate, up = _linear(expert.gate_proj, value), _linear(expert.up_proj, value)
    made: torch.Tensor = expert._apply_gate(torch.cat([gate, up], dim=-1))
    return made


def _by_expert(hidden: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of the tokens [T, D] of each expert: [E], [E]; (inf, -inf) of one without tokens."""
    counts = torch.tensor(routing.counts, device=hidden.device)
    numbers = torch.repeat_interleave(counts, output_size=len(routing.rows))
    found = []
    for value, reduce, start in zip(row_extremes(hidden), ("amin", "amax"), (torch.inf, -torch.inf), strict=True):
        empty = value.new_full((len(counts),), start)
        found.append(empty.scatter_reduce_(0, numbers, value[routing.rows[: len(numbers)]], reduce))
    return found[0], found[1]


def _listed(extremes: dict[int, tuple[torch.Tensor, torch.Tensor]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Extremes by number as [count], [count]; (inf, -inf) for numbers without any."""
    like = next(iter(extremes.values()))[0]
    nothing = like.new_tensor(torch.inf), like.new_tensor(-torch.inf)
    pairs = [extremes.get(number, nothing) for number in range(count)]
    return torch.stack([low for low, _ in pairs]), torch.stack([high for _, high in pairs])


def _collected(groups: Sequence[Sequence[Observer]]) -> Collected | None:
    """None if an observer must see the values themselves, or there is none."""
    observers = [observer for group in groups for observer in group]
    return Collected(groups) if observers and all(map(collects, observers)) else None


def _group_observers(experts: LinearExperts2D) -> _Observers | None:
    shared: list[list[Observer]] = []
    own: list[list[list[Observer]]] = [[] for _ in range(experts.num_experts)]
    down: list[list[Observer]] = [[] for _ in range(experts.num_experts)]
    for number in range(experts.num_experts):
        expert = experts[number]
        if type(expert) is not ExpertMLPWithGate or _hooked(expert):
            return None
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(expert, leaf)
            observer = getattr(linear, "input_observer", None)
            if _hooked(linear) or (observer is not None and not isinstance(observer, MIN_MAX)):
                return None
            if observer is None:
                continue
            if leaf == "down_proj":
                down[number].append(observer)
                continue
            for groups in (shared, own[number]):
                equal = (g for g in groups if type(g[0]) is type(observer) and g[0].args == observer.args)
                if (group := next(equal, None)) is None:
                    groups.append([observer])
                else:
                    group.append(observer)
    inputs = [[observer for group in groups for observer in group] for groups in own]
    return _Observers(shared, own, _collected(inputs), _collected(down))


def _hooked(module: nn.Module) -> bool:
    """Whether the module has a hook other than those of its observers."""
    others = [
        hook
        for hook in module._forward_pre_hooks.values()
        if getattr(hook, "__wrapped__", hook) is not calibrate_input_hook and not is_importance_hook(hook)
    ]
    return bool(module._forward_hooks or others)
