"""Forward fidelity: each block of the output, W4A4 emulated from its bytes on disk, against the source's block on text.

One block is in memory at a time, first the source's, then the output's. Imports the calibration engine's reading of
models (`source_model`, `tracing`, `data`): they write nothing into a checkpoint and this is the one place in `verify`
that needs transformers, so they are imported when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibration.checkpoint import nvfp4
from calibration.checkpoint.formats import Formats, logical_name, module_of
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.nvfp4 import RANGE
from calibration.checkpoint.tiles import quantize_dequantize_groups
from calibration.checkpoint.view import as_compressed_tensors
from calibration.families.registry import family_of, open_source
from calibration.plan.plan import Plan
from calibration.plan.smoothing import possible_sites
from recipes.checks import Fidelity
from recipes.errors import SourceError, WorkflowError
from recipes.schema import Calibration
from verify.checks import Check, Verdict
from verify.fidelity.smoothing import SmoothedWeights
from verify.unseen_text import help_text

if TYPE_CHECKING:
    from calibration.model.parity import BlockCall
    from calibration.model.source_model import SourceModel

    #: What enters the blocks for one sample, and how the model calls each of them.
    _Calls = tuple[torch.Tensor, list[BlockCall]]

#: Tokens of one sample at most: several short texts say more about a block than one long one.
_SAMPLE = 128
#: A token of English text has fewer characters.
_CHARACTERS = 16
#: A scale is 2688 / amax in float32, so that it admits amax within a rounding; the next BF16 value is further away.
SLACK = 1 + 2.0**-10
#: How far below rounding to nearest a block may be: another choice of scales moves a cosine by as much.
_BLOCK_SLACK = 0.02
#: The same for a chain of blocks, whose errors add up.
_CHAIN_SLACK = 0.05
_HOW = ("{tokens} tokens of {dataset}; BF16 blocks of the source against the output's dequantized weights and "
        "quantized-dequantized NVFP4 inputs; mean over tokens")  # fmt: skip


@dataclass
class InputSeen:
    """The input of one module with a stored input global scale, over the source's forward: `admitted` is the largest
    value that the scale admits (2688 / scale), `seen` the largest that came, `tokens` how many tokens came (none to an
    expert that none was routed to), `values` how many values, `beyond` how many of them were larger than admitted."""

    module: str
    admitted: float
    seen: float = 0.0
    tokens: int = 0
    values: int = 0
    beyond: int = 0

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        if x.numel():
            largest, limit = float(x.abs().amax()), self.admitted * SLACK
            self.seen = max(self.seen, largest)
            self.tokens += x.numel() // x.shape[-1]
            self.values += x.numel()
            self.beyond += int((x.abs().to(torch.float32) > limit).sum()) if largest > limit else 0


@dataclass(frozen=True)
class BlockCosine:
    """One block, means over `tokens` tokens. `cosine`: what the block adds to the source's hidden states, output
    against source; `propagated`: the hidden states behind the block, when the output's own blocks made them. `inputs` are
    those of that text, `unseen` those of text that no calibration draws from."""

    block: int
    cosine: float
    propagated: float
    tokens: int
    inputs: tuple[InputSeen, ...] = ()
    unseen: tuple[InputSeen, ...] = ()
    #: Of a block whose cosine is low: that of the source's block rounded to nearest here, and nothing else done to it.
    rounded: float | None = None
    #: Of the last block, if `propagated` is low there: that of the source's blocks, all of them rounded to nearest.
    chain_rounded: float | None = None


def verify_forward(
    directory: Path,
    source: Checkpoint,
    options: Fidelity,
    text: Calibration | None,
    trust_remote_code: bool = False,
    plan: Plan | None = None,
) -> tuple[list[Check], list[BlockCosine]]:
    """The checks of `measure_blocks`: the worst block's cosine, and the propagated one behind the last block. If the output
    is smoothed, inputs are those of the smoothed source.
    UNCHECKED where no forward could be made (no tokenizer, no text, tensors missing). Never raises for a bad output."""
    text = text or Calibration(dataset="bundled")
    limits = (
        ("block_cosine", "each block does what the source's does, on the source's hidden states",
         options.min_block_cosine),
        ("propagated_cosine", "the chain of all blocks ends where the source's ends", options.min_propagated_cosine),
    )  # fmt: skip
    if options.tokens == 0:
        return [Check(f"fidelity.{id}", "UNCHECKED", what, "tokens: 0", "", "not run") for id, what, _ in limits], []
    try:
        blocks = measure_blocks(directory, source, text, options, trust_remote_code, plan)
    except WorkflowError as problem:
        why = f"no forward: {problem}"
        return [Check(f"fidelity.{id}", "UNCHECKED", what, why, "", "not run") for id, what, _ in limits], []
    how = _HOW.format(tokens=blocks[0].tokens, dataset=text.dataset)
    judged = (
        _judge_blocks(blocks, options.min_block_cosine),
        _judge_chain(blocks[-1], options.min_propagated_cosine),
    )
    checks = []
    for (id, what, limit), (verdict, figure) in zip(limits, judged, strict=True):
        checks.append(Check(f"fidelity.{id}", verdict, what, figure, f">= {limit:g}", how))
    return checks, blocks


def _judge_blocks(blocks: list[BlockCosine], least: float) -> tuple[Verdict, str]:
    """A block below the threshold fails unless NVFP4 itself costs this model as much: random weights, and models that are
    hard to round, lose more than others. Then it is a warning."""
    worst = min(blocks, key=lambda b: (b.cosine == b.cosine, b.cosine))
    figure = f"worst {worst.cosine:.4f} (block {worst.block}) of {len(blocks)}"
    low = [block for block in blocks if not block.cosine >= least]
    if not low:
        return "PASS", figure
    if worst.rounded is not None:
        figure += f"; {worst.rounded:.4f} is what the source's block rounded to nearest has"
    by_rounding = all(block.rounded is not None and block.cosine >= block.rounded - _BLOCK_SLACK for block in low)
    return ("WARN" if by_rounding else "FAIL"), figure


def _judge_chain(last: BlockCosine, least: float) -> tuple[Verdict, str]:
    """The same for the chain of all blocks."""
    figure = f"{last.propagated:.4f} after block {last.block}"
    if last.propagated >= least:
        return "PASS", figure
    if last.chain_rounded is None:
        return "FAIL", figure
    figure += f"; {last.chain_rounded:.4f} is what the source's blocks rounded to nearest have"
    return ("WARN" if last.propagated >= last.chain_rounded - _CHAIN_SLACK else "FAIL"), figure


def measure_blocks(
    directory: Path,
    source: Checkpoint,
    text: Calibration,
    options: Fidelity,
    trust_remote_code: bool = False,
    plan: Plan | None = None,
) -> list[BlockCosine]:
    """Cosines of every block over about `options.tokens` tokens of the data set `text`, in samples of at most 128; of those
    below `options.min_block_cosine` also what rounding to nearest alone costs, and of the whole chain where that is below
    `options.min_propagated_cosine`.

    Weights of both sides come from disk, block by block. Activations of NVFP4 modules are quantized with the stored
    input global scale; those of NVFP4A16 and of FP8 that the source stores too are not; those of FP8_BLOCK are, to
    E4M3 per token and 128 values. Raises SourceError and RecipeError where model, text or tensors do not fit.
    """
    if why := family_of(source.config).not_calibrated:
        raise SourceError(why)
    # llm-compressor logs what no reader of a verdict needs.
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
    from calibration.data.batches import embedding_rows, load_batches, load_tokenizer, text_batches
    from calibration.model.parity import own_block_calls
    from calibration.model.skeleton import build_skeleton

    length = min(_SAMPLE, text.max_seq_length, options.tokens)
    samples = min(-(-options.tokens // length), text.num_samples)
    wanted = text.model_copy(update={"num_samples": samples, "max_seq_length": length, "batch_size": 1})
    tokenizer = load_tokenizer(source.directory, trust_remote_code)
    data = load_batches(wanted, tokenizer, source_directory=source.directory, embedding=embedding_rows(source))
    batches = list(data.batches)
    beginning = help_text()[: samples * length * _CHARACTERS]
    unseen = list(text_batches(beginning, wanted, tokenizer, source_directory=source.directory).batches)
    with TemporaryDirectory(prefix="verify-forward-") as work, torch.no_grad():
        original = build_skeleton(Formats(source), Path(work), trust_remote_code)
        output = Formats(as_compressed_tensors(open_source(directory)))
        emulated = _of_output(original, output)
        outside = original.outside_blocks()
        original.load(outside)
        calls = []
        for batch in batches + unseen:
            # Without a cache: a block is called three times with the same arguments.
            sample = {key: value.to(original.device) for key, value in batch.items()} | {"use_cache": False}
            calls.append(own_block_calls(original.model, list(original.blocks.values()), sample))
        original.unload(outside)
        smoothed = _smoothing(plan, output, original)
        both = (calls[: len(batches)], calls[len(batches) :])
        blocks = list(_walk(original, emulated, output, both, options.min_block_cosine, smoothed))
        if not blocks[-1].propagated >= options.min_propagated_cosine:
            rounded = _chain_rounded_to_nearest(original, emulated, output, calls[: len(batches)], blocks, smoothed)
            blocks[-1] = replace(blocks[-1], chain_rounded=rounded)
        return blocks


def _of_output(original: SourceModel, output: Formats) -> SourceModel:
    """The same skeleton, filled from the output's tensors."""
    from calibration.model.source_model import SourceModel

    named = {logical_name(name): name for name in output.checkpoint.tensors if name not in output.companions}
    inside = tuple(f"{block}." for block in original.blocks)
    sources = {
        full: named.get(logical_name(name)) for full, name in original.sources.items() if full.startswith(inside)
    }
    missing = [original.sources[full] for full, name in sources.items() if name is None]
    if missing:
        raise WorkflowError(f"{output.checkpoint.directory}: lacks {len(missing)} tensors, the first {missing[0]}")
    found = {full: name for full, name in sources.items() if name is not None}
    return SourceModel(original.model, output, original.family, found, original.device)


def _walk(
    original: SourceModel,
    emulated: SourceModel,
    output: Formats,
    calls: tuple[list[_Calls], list[_Calls]],
    least: float,
    smoothed: SmoothedWeights | None,
) -> Iterator[BlockCosine]:
    from calibration.model.parity import apart

    seen, unseen = calls
    ways = [apart(made) for _, made in seen]
    entering, entering_unseen = ([hidden for hidden, _ in found] for found in calls)
    propagated = list(entering)
    for number, block in enumerate(original.blocks.values()):
        block_calls = [made[number] for _, made in seen]
        _load_smoothed(original, block, smoothed)
        with _watched_inputs(original, emulated, output, block) as inputs:
            leaving = [call(block, hidden) for call, hidden in zip(block_calls, entering, strict=True)]
        with _watched_inputs(original, emulated, output, block) as unseen_inputs:
            entering_unseen = [
                made[number](block, hidden) for (_, made), hidden in zip(unseen, entering_unseen, strict=True)
            ]
        original.unload([block])
        emulated.load([block])
        with _quantized_inputs(original, emulated, output, block):
            alone = [call(block, hidden, keep=False) for call, hidden in zip(block_calls, entering, strict=True)]
            propagated = [way[number](block, hidden) for way, hidden in zip(ways, propagated, strict=True)]
        emulated.unload([block])
        cosines = _added(leaving, alone, entering)
        behind = [_cosines(a.float(), b.float()) for a, b in zip(leaving, propagated, strict=True)]
        cosine, rounded = float(cosines.mean()), None
        if not cosine >= least:
            _load_smoothed(original, block, smoothed)
            with _rounded_to_nearest(original, emulated, output, block, inputs):
                made = [call(block, hidden, keep=False) for call, hidden in zip(block_calls, entering, strict=True)]
            original.unload([block])
            rounded = float(_added(leaving, made, entering).mean())
        yield BlockCosine(number, cosine, float(torch.cat(behind).mean()), len(cosines), tuple(inputs),
                          tuple(unseen_inputs), rounded)  # fmt: skip
        entering = leaving


def _chain_rounded_to_nearest(
    original: SourceModel,
    emulated: SourceModel,
    output: Formats,
    calls: list[_Calls],
    blocks: list[BlockCosine],
    smoothed: SmoothedWeights | None,
) -> float:
    """`propagated` of the last block for the source's own blocks, each rounded to nearest. Reads the source once more."""
    from calibration.model.parity import apart

    ways = [apart(made) for _, made in calls]
    exact = [hidden for hidden, _ in calls]
    rounded = list(exact)
    for number, block in enumerate(original.blocks.values()):
        _load_smoothed(original, block, smoothed)
        exact = [made[number](block, hidden) for (_, made), hidden in zip(calls, exact, strict=True)]
        with _rounded_to_nearest(original, emulated, output, block, list(blocks[number].inputs)):
            rounded = [way[number](block, hidden) for way, hidden in zip(ways, rounded, strict=True)]
        original.unload([block])
    behind = [_cosines(a.float(), b.float()) for a, b in zip(exact, rounded, strict=True)]
    return float(torch.cat(behind).mean())


def _smoothing(plan: Plan | None, output: Formats, original: SourceModel) -> SmoothedWeights | None:
    """The factors of a smoothed output; None if it is not smoothed. Without a plan its norms tell, and the sites are all that the
    structure allows: with factors that are no powers of two the nearest ones, by which the source computes the same too."""
    if plan is not None:
        return SmoothedWeights(plan.smoothed, output, original.formats) if plan.smoothed else None
    found = SmoothedWeights(possible_sites(original.formats, original.family), output, original.formats)
    return found if found.changes_norms() else None


def _load_smoothed(original: SourceModel, block: nn.Module, smoothed: SmoothedWeights | None) -> None:
    """Loads the source's block; with the factors of a smoothed output, by which it computes the same."""
    original.load([block])
    for name, module in block.named_modules(prefix=original.module_name(block)) if smoothed is not None else ():
        if smoothed is not None and (stored := original.sources.get(f"{name}.weight")) is not None:
            smoothed.fold(module, module_of(stored))


def _added(leaving: list[torch.Tensor], made: list[torch.Tensor], entering: list[torch.Tensor]) -> torch.Tensor:
    """Cosines, per token of all samples, of what two versions of a block add to the hidden states that enter it."""
    triples = zip(leaving, made, entering, strict=True)
    return torch.cat([_cosines(a.float() - h.float(), b.float() - h.float()) for a, b, h in triples])


@contextmanager
def _rounded_to_nearest(
    original: SourceModel, emulated: SourceModel, output: Formats, block: nn.Module, inputs: list[InputSeen]
) -> Iterator[None]:
    """Inside, the source's block has the weights that the output has in NVFP4 rounded to nearest, each under a global scale
    of its own, and their inputs under the extremes that came. The block is in memory and is to be unloaded afterwards."""
    largest = {seen.module: seen.seen for seen in inputs}
    with ExitStack() as stack:
        for name, module in block.named_modules(prefix=original.module_name(block)):
            stored = emulated.sources.get(f"{name}.weight")
            if stored is None or not isinstance(module, nn.Linear) or output.of(stored).kind != "nvfp4":
                continue
            scale = nvfp4.observed_global_scale(module.weight.data.abs().amax().float().reshape(1))
            module.weight.data = nvfp4.quantize_dequantize(module.weight.data, scale)
            if seen := largest.get(module_of(stored)):
                scale = torch.tensor([RANGE / seen], device=original.device)
                stack.callback(module.register_forward_pre_hook(_NvFp4Input(scale)).remove)
        yield


def _cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Per token: `[1, T, ...]` -> `[T]`; DeepSeek-V4's parallel streams count as one vector."""
    return torch.cosine_similarity(one.flatten(0, 1).flatten(1), other.flatten(0, 1).flatten(1), -1)


def _scaled_inputs(
    original: SourceModel, emulated: SourceModel, output: Formats, block: nn.Module
) -> Iterator[tuple[nn.Linear, str, torch.Tensor]]:
    """Linear layers of `block` whose output weight has an input global scale: module, output tensor, scale `[1]`."""
    for name, module in block.named_modules(prefix=original.module_name(block)):
        stored = emulated.sources.get(f"{name}.weight")
        if stored is None or not isinstance(module, nn.Linear):
            continue
        found = output.of(stored)
        if found.kind == "nvfp4" and "input_scale" in found.companions:
            yield module, stored, output.checkpoint.read(found.companions["input_scale"])


@contextmanager
def _watched_inputs(
    original: SourceModel, emulated: SourceModel, output: Formats, block: nn.Module
) -> Iterator[list[InputSeen]]:
    """Inside, the inputs of those layers are recorded."""
    with ExitStack() as stack:
        watched = []
        for module, stored, scale in _scaled_inputs(original, emulated, output, block):
            watched.append(InputSeen(module_of(stored), RANGE / float(scale)))
            stack.callback(module.register_forward_pre_hook(watched[-1]).remove)
        yield watched


@contextmanager
def _quantized_inputs(
    original: SourceModel, emulated: SourceModel, output: Formats, block: nn.Module
) -> Iterator[None]:
    """Inside, every quantized linear layer of `block` sees its input as the serving engine's kernels would."""
    with ExitStack() as stack:
        for module, _, scale in _scaled_inputs(original, emulated, output, block):
            stack.callback(module.register_forward_pre_hook(_NvFp4Input(scale.to(original.device))).remove)
        for module in fp8_layers(original, emulated, output, block):
            stack.callback(module.register_forward_pre_hook(fp8_input).remove)
        yield


def fp8_layers(original: SourceModel, emulated: SourceModel, output: Formats, block: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers of `block` that the output has in FP8_BLOCK and the source has not."""
    for name, module in block.named_modules(prefix=original.module_name(block)):
        stored = emulated.sources.get(f"{name}.weight")
        if stored is None or not isinstance(module, nn.Linear):
            continue
        before = original.formats.of(original.sources[f"{name}.weight"])
        if output.of(stored).kind == "fp8_tiles" and before.kind != "fp8_tiles":
            yield module


@dataclass(frozen=True)
class _NvFp4Input:
    scale: torch.Tensor

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return nvfp4.quantize_dequantize(arguments[0], self.scale), *arguments[1:]


def fp8_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hook of such a layer."""
    return quantize_dequantize_groups(arguments[0]), *arguments[1:]
