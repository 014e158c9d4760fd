"""The recipe's `verify` sections: what is checked of the output, with which thresholds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from recipes.fields import PathText, Section, Text


class Require(Section):
    """Conditions that the served model must meet for a PASS."""

    finite: bool = True
    """No NaN and no infinity in any module's output."""
    max_perplexity: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """Largest perplexity of `text`; by default it is shown but not judged."""
    max_kl: float | None = Field(default=0.6, gt=0, allow_inf_nan=False)
    """Largest KL divergence from the served source, mean in nats per token. The default finds damage, not loss of
    quality: lower it for that."""
    min_top1: float | None = Field(default=None, ge=0, le=1)
    """Smallest fraction of tokens for which output and served source prefer the same next token; not judged by
    default."""
    min_kept: float | None = Field(default=None, gt=0, le=1)
    """Smallest share of the served source's quality that is kept: its perplexity divided by the output's, on the same
    text; not judged by default."""
    coherent: bool = False
    """Samples that are empty, loop or are not text fail; false only warns."""
    max_loop: float = Field(default=0.5, ge=0, le=1)
    """Largest fraction of a sample that may consist of a single token, or at its end of one repeated cycle of
    tokens."""
    max_unprintable: float = Field(default=0.3, ge=0, le=1)
    """Largest fraction of control or replacement characters in a sample."""


class Serving(Section):
    """Load the output in the real serving engine and generate with it."""

    engine: Literal["vllm"] = "vllm"
    """The serving engine."""
    python: PathText = ".venv-vllm/bin/python"
    """Python interpreter of the environment with vLLM, which is separate from llm-compressor's."""
    prompts: list[Text] = Field(default=[])
    """Your own prompts, added to the built-in kinds; one that does not fit the context length is refused."""
    max_tokens: int = Field(default=64, ge=1)
    """Tokens generated per prompt; at most half of the context length."""
    text: PathText | None = "bundled"
    """UTF-8 text file for perplexity and the comparison with the source; bundled is Python's help text, which the
    bundled calibration text does not contain; null uses the prompts for both."""
    windows: int = Field(default=8, ge=1)
    """Windows of `text` to score, from its beginning."""
    window_tokens: int = Field(default=512, ge=2)
    """Tokens of a window; cut to the context length if that is shorter."""
    compare: bool | Literal["auto"] = "auto"
    """Serve the source too, for KL, top-1 and its samples: auto if it takes at most 2 GiB in BF16, true always. A
    source in FP8 or MXFP4 is served as a plain BF16 copy, which the run makes and removes."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the activations; auto uses the checkpoint's."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Context length to serve with, in tokens; by default the check chooses it."""
    timeout: float = Field(default=1800, gt=0, allow_inf_nan=False)
    """Seconds after which the engine is stopped and the check fails."""
    require: Require = Require()
    """Conditions for a PASS."""


class Fidelity(Section):
    """Thresholds of the comparison with the source; docs/verification.md has the figures of good checkpoints."""

    worst_error: float = Field(default=0.3, gt=0, allow_inf_nan=False)
    """Largest relative error of an NVFP4 weight: norm of the difference / norm of the source's weight."""
    worst_error_fp8: float = Field(default=0.06, gt=0, allow_inf_nan=False)
    """Largest relative error of an FP8_BLOCK weight."""
    min_cosine: float = Field(default=0.95, ge=-1, le=1)
    """Smallest cosine between a quantized weight and the source's."""
    min_sqnr: float = Field(default=12.0, allow_inf_nan=False)
    """Smallest signal to quantization noise of a block's weights together, in dB."""
    max_saturated: float = Field(default=0.25, ge=0, le=1)
    """Largest share of codes at the format's largest magnitude in one weight."""
    max_zero_groups: float = Field(default=0.01, ge=0, le=1)
    """Largest share of groups in one weight that are zero in the output and not in the source."""
    max_group_gain: float = Field(default=1.8, ge=1, allow_inf_nan=False)
    """Largest factor by which a group of 16 weights, or with GPTQ its scale, may be larger or smaller than the
    source's."""
    tokens: int = Field(default=512, ge=0)
    """Tokens of calibration text for the forward comparison of blocks; 0 skips it, and it stays UNCHECKED."""
    min_block_cosine: float = Field(default=0.9, ge=-1, le=1)
    """Smallest cosine between what a block adds in the source and in the output, both with the source's hidden states
    as input."""
    max_input_overflow: float = Field(default=2.0, ge=1, allow_inf_nan=False)
    """Largest ratio of the inputs of the forward to the largest input that their input global scale admits."""
    max_input_headroom: float = Field(default=256.0, ge=1, allow_inf_nan=False)
    """Largest ratio of the largest input that an input global scale admits to the inputs of the forward."""
    min_propagated_cosine: float = Field(default=0.7, ge=-1, le=1)
    """Smallest cosine of the hidden states after the last block, if each chain runs on its own hidden states."""


def _as_section(value: object) -> object:
    return ({} if value else None) if isinstance(value, bool) else value


FidelityOrBool = Annotated[Fidelity | None, BeforeValidator(_as_section, json_schema_input_type=bool | Fidelity | None)]


class Accuracy(Section):
    """Score tasks of lm-eval on the served output and on its served source, on the same samples."""

    tasks: list[Text] = Field(min_length=1)
    """`bundled/cloze`, `bundled/choices`, YAML files of your own beside their JSONL, or names that lm-eval knows, whose
    data comes from a hub."""
    limit: int | None = Field(default=None, ge=1)
    """Samples of each task, from its beginning; all by default."""
    fewshot: int | None = Field(default=None, ge=0)
    """Examples before each sample; by default what the task says."""
    chat: bool = False
    """Put each sample through the checkpoint's chat template."""
    min_recovery: float = Field(default=0.97, gt=0, le=1)
    """Smallest share of the source's score that the output has to reach in every task."""
    timeout: float = Field(default=7200, gt=0, allow_inf_nan=False)
    """Seconds that the tasks may take, added to `verify.serving.timeout`."""


class Verify(Section):
    """Checks of the output checkpoint."""

    structure: bool = True
    """Every tensor there, nothing else, dtypes, shapes, companions, finite values."""
    fidelity: FidelityOrBool = Field(default=True, validate_default=True)
    """Compare every weight with the source's; true uses the defaults, false skips it."""
    serving: Serving | None = None
    """Serve the output; `serving: {}` uses the defaults. Without it, serving stays UNCHECKED."""
    accuracy: Accuracy | None = None
    """Score tasks on the served output; needs `serving`, and lm-eval in its environment."""

    @model_validator(mode="after")
    def _served(self) -> Self:
        if self.accuracy is not None and self.serving is None:
            raise ValueError("accuracy: tasks run on the served output; add `serving: {}`")
        return self
