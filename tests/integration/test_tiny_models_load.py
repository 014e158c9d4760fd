"""transformers loads the fixtures completely, and they behave like models: finite, decisive, input-dependent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import deepseek_v4, smollm2, standard

STORED: tuple[deepseek_v4.Stored, ...] = get_args(deepseek_v4.Stored)
FAMILIES: tuple[standard.Family, ...] = get_args(standard.Family)
TEXT = "The capital of France is the city of Paris."


@pytest.fixture(scope="module")
def v4_logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("deepseek_v4")
    return {stored: logits(deepseek_v4.write(root / stored, stored)) for stored in STORED}


def load(directory: Path, **options: Any) -> Any:
    """The model, after a load without missing, unexpected or mismatched tensors."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    model, info = loaded
    # transformers drops mtp.* by design and so does not count it as unexpected; GLM's MTP it knows by the numbers of the
    # published models alone.
    config = json.loads((directory / "config.json").read_text())
    follows = config["model_type"] == "glm4_moe"
    mtp = tuple(f"model.layers.{config['num_hidden_layers']}." for _ in range(follows))
    unexpected = [name for name in info.pop("unexpected_keys") if not name.startswith(mtp)]
    assert {key: list(value) for key, value in info.items() if value} == {} and unexpected == []
    return model


def logits(directory: Path) -> torch.Tensor:
    """float32 logits [T, V] of 2 x 160 positions, past the sliding window of 128."""
    model = load(directory, dtype=torch.float32).float().eval()
    tokens = torch.randint(6, model.config.vocab_size, (2, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits.flatten(0, 1).float()
    return found


def check_decisive(found: torch.Tensor) -> None:
    """Finite; the best token stands out; it depends on the input."""
    assert found.isfinite().all()
    probabilities = found.softmax(-1)
    entropy = -(probabilities * found.log_softmax(-1)).sum(-1).mean()
    uniform = torch.tensor(float(found.shape[-1])).log()
    assert entropy < uniform - 1
    best = found.topk(2).values
    assert (best[:, 0] - best[:, 1]).median() > 0.1
    assert len(set(found.argmax(-1).tolist())) > found.shape[0] // 8


@pytest.mark.parametrize("stored", STORED)
def test_deepseek_v4_loads_and_is_decisive(v4_logits: dict[str, torch.Tensor], stored: str) -> None:
    check_decisive(v4_logits[stored])


@pytest.mark.parametrize("stored", ["fp8", "fp8_mxfp4"])
def test_formats_are_the_same_model(v4_logits: dict[str, torch.Tensor], stored: str) -> None:
    """A wrongly packed weight or scale would bring the divergence near that of unrelated models, about 4 nats."""
    reference, found = v4_logits["bf16"].log_softmax(-1), v4_logits[stored].log_softmax(-1)
    divergence = (reference.exp() * (reference - found)).sum(-1).mean()
    assert 0 < divergence < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_families_load_and_are_decisive(tmp_path: Path, family: standard.Family) -> None:
    check_decisive(logits(standard.write(tmp_path / family, family)))


def test_tokenizers_load(tmp_path: Path) -> None:
    v4: Any = AutoTokenizer.from_pretrained(deepseek_v4.write(tmp_path / "v4", "fp8_mxfp4"))
    assert (v4.bos_token_id, v4.eos_token_id, v4.chat_template) == (0, 1, None)
    ids = v4.encode(TEXT)
    assert len(ids) < len(TEXT) and v4.decode(ids) == TEXT
    turn = v4.encode("<\uff5cUser\uff5c>hi<\uff5cAssistant\uff5c></think>")
    assert (turn[0], turn[-2], turn[-1]) == (2, 3, 5)
    llama: Any = AutoTokenizer.from_pretrained(standard.write(tmp_path / "llama", "llama"))
    chat = llama.apply_chat_template([{"role": "user", "content": TEXT}], add_generation_prompt=True, tokenize=False)
    assert llama.encode(chat) == [0, 2, *ids, 3]


@pytest.mark.slow
def test_smollm2_answers_in_english(tmp_path: Path) -> None:
    directory = smollm2.write(tmp_path / "smollm2")
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model = load(directory)
    assert model.dtype == torch.bfloat16

    def answer(prompt: str) -> str:
        batch = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=24, do_sample=False)[0, batch["input_ids"].shape[1] :]
        return str(tokenizer.decode(output))

    assert "Paris" in answer("The capital of France is")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    reply = answer(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    assert "Paris" in reply and reply.endswith("<|im_end|>")
