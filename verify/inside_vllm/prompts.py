"""Tokenizes prompts and text windows for vLLM, computes their log-probabilities, and compares two sets of logits.

Runs inside vLLM's interpreter, loaded by `worker`.
"""

from __future__ import annotations

import math
import random
import resource
import signal
from pathlib import Path
from typing import Any

TEMPLATE_SECONDS, TEMPLATE_BYTES, TEMPLATE_CHARACTERS = 60, 1 << 30, 1 << 22
"""Limits of a chat template for one prompt; real ones take milliseconds."""


def tokenize(llm: Any, request: dict[str, Any], model_config: Any) -> list[dict[str, Any]]:
    """An entry per prompt with its `token_ids`; an entry without them gives the reason in `skipped`. Built-in prompts are
    truncated so that prompt and sample fit; one of the recipe's that does not fit is skipped.

    Without a tokenizer, text becomes as many seeded random token ids as it has words.
    """
    tokenizer = None if model_config.skip_tokenizer_init else llm.get_tokenizer()
    vocabulary = model_config.get_vocab_size()
    room = request["max_model_len"] - request["max_tokens"]
    chooser = random.Random(request["seed"])
    entries = []
    for prompt in request["prompts"]:
        skipped, ids, text = None, [], prompt.get("text")
        if "token_ids" in prompt:
            ids = list(prompt["token_ids"])
        elif "messages" in prompt:
            try:
                assert tokenizer is not None, "no tokenizer"
                text = render(tokenizer, prompt["messages"])
                ids = list(tokenizer.encode(text, add_special_tokens=False))
            except Exception as error:  # no template, or any exception of the template
                lines, text = str(error).strip().splitlines(), None
                skipped = f"no chat template: {lines[0] if lines else type(error).__name__}"
        elif tokenizer is None:
            ids = [chooser.randrange(vocabulary) for _ in str(text).split()]
        else:
            ids = list(tokenizer.encode(text))
        if "repeat" in prompt:
            ids, text = ids[-1:] * prompt["repeat"], f"{text} (x {prompt['repeat']})"
        if prompt.get("fill") and ids:
            ids, text = (ids * (room // len(ids) + 1))[:room], None
        ids = ids[-prompt["limit"] :] if "limit" in prompt else ids
        if prompt["kind"].startswith("recipe ") and len(ids) > room:
            skipped, ids = f"{len(ids)} tokens, verify.serving.max_model_len leaves {room}", []
        entries.append(entry(prompt["kind"], ids[:room], vocabulary, text, skipped))
    return entries


def render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The messages as text by the chat template, up to the start of an answer. A template is a stranger's program:
    jinja's sandbox gives it no access to files and attributes, and here it is limited to TEMPLATE_SECONDS,
    TEMPLATE_BYTES of memory beyond the engine's, and TEMPLATE_CHARACTERS of output. Raises ValueError if it exceeds a
    limit, and whatever the template raises."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, size + TEMPLATE_BYTES) if limit != resource.RLIM_INFINITY]
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        finally:  # the timer fires once: it must not interrupt the outer `finally`, which has to complete
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        raise ValueError(f"the template takes more than {TEMPLATE_SECONDS} seconds") from None
    except MemoryError:
        raise ValueError(f"the template takes more than {TEMPLATE_BYTES >> 20} MiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
    if len(text) > TEMPLATE_CHARACTERS:
        raise ValueError(f"the template writes more than {TEMPLATE_CHARACTERS:,} characters")
    return text


def entry(kind: str, ids: list[int], vocabulary: int, text: str | None, skipped: str | None = None) -> dict[str, Any]:
    """The entry of a prompt or window in the result, before anything has run."""
    if any(not 0 <= token < vocabulary for token in ids):
        skipped, ids = f"a token id lies outside the vocabulary of {vocabulary}", []
    return {
        "kind": kind, "tokens": len(ids), "nll": None, "perplexity": None, "text": text, "token_ids": ids,
        "sample_ids": [], "sample": "", "skipped": skipped or (None if ids else "no tokens"),
    }  # fmt: skip


def cut_windows(llm: Any, request: dict[str, Any], model_config: Any) -> list[dict[str, Any]]:
    """An entry per window of the request's text: `tokens` ids each, starting with the tokenizer's bos if it puts one
    before a text. The last window may be shorter, but has at least two tokens. [] without text or tokenizer."""
    wanted, vocabulary = request.get("windows"), model_config.get_vocab_size()
    if not wanted:
        return []
    if "token_ids" in wanted:
        cut = wanted["token_ids"]
    elif model_config.skip_tokenizer_init:
        return []
    else:
        tokenizer = llm.get_tokenizer()
        ids = list(tokenizer.encode(wanted["text"], add_special_tokens=False))
        first = [tokenizer.bos_token_id] if list(tokenizer.encode("a"))[:1] == [tokenizer.bos_token_id] else []
        size = min(wanted["tokens"], request["max_model_len"] - 1) - len(first)
        cut = [first + ids[n : n + size] for n in range(0, min(len(ids), size * wanted["count"]), size)]
    return [entry(f"window {n}", ids, vocabulary, None) for n, ids in enumerate(cut, 1) if len(ids) > 1]


def score(llm: Any, vllm: Any, entry: dict[str, Any]) -> None:
    """Runs one prefill of one prompt and sets its mean loss per predicted token, from the engine's prompt
    log-probabilities."""
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": entry["token_ids"]}], sampling, use_tqdm=False)
    pairs = zip(output.prompt_logprobs, entry["token_ids"], strict=True)
    found = [row[token].logprob for row, token in pairs if row is not None]
    if found:
        entry["nll"] = -sum(found) / len(found)
        entry["perplexity"] = perplexity(entry["nll"])


def mean_nll(entries: list[dict[str, Any]]) -> float | None:
    """Mean loss over all predicted tokens of all entries, in nats; None if there are none."""
    losses = [(e["nll"], e["tokens"] - 1) for e in entries if e["nll"] is not None]
    return sum(nll * n for nll, n in losses) / sum(n for _, n in losses) if losses else None


def perplexity(nll: float) -> float:
    """exp(nll), with infinity instead of an overflow."""
    return math.exp(nll) if nll < 700 else (nll if math.isnan(nll) else math.inf)


class Agreement:
    """Accumulates KL(reference || other) in nats and equal argmax over positions; logits `[T, V]`, sums in float64."""

    def __init__(self) -> None:
        self.tokens, self.kl, self.equal = 0, 0.0, 0

    def add(self, reference: Any, other: Any) -> None:
        """Adds one prompt's logits of both models. Raises ValueError if their shapes differ."""
        if reference.shape != other.shape:
            raise ValueError(f"logits {list(reference.shape)} against {list(other.shape)}")
        for a, b in zip(reference.split(64), other.split(64), strict=True):
            p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
            self.kl += float((p.exp() * (p - q)).sum())
            self.equal += int((a.argmax(-1) == b.argmax(-1)).sum())
        self.tokens += len(reference)

    def result(self) -> dict[str, Any] | None:
        """`{tokens, kl, top1}`, means over the positions; None if there are none."""
        if not self.tokens:
            return None
        return {"tokens": self.tokens, "kl": self.kl / self.tokens, "top1": self.equal / self.tokens}


def write_logits(directory: Path, name: str, entry: dict[str, Any], logits: Any) -> None:
    """`<name>.safetensors` with token_ids `[T]` and logits `[T, V]` float32, `.partial` and rename."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(exist_ok=True)
    partial = directory / f"{name}.partial"
    save_file({"token_ids": torch.tensor(entry["token_ids"]), "logits": logits}, str(partial))
    partial.replace(directory / f"{name}.safetensors")


def read_logits(directory: Path, name: str) -> Any:
    """The logits that `write_logits` wrote; None if there is no such file."""
    from safetensors.torch import load_file

    path = directory / f"{name}.safetensors"
    return load_file(str(path))["logits"] if path.exists() else None
