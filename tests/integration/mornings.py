"""Ways to fail a morning: what is wrong with a source, a recipe or a machine, and what the evening must say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.integration.whole_runs import LINEAR, SERVING
from tests.models import standard, stored_forms
from tests.reference.engine import VLLM_PYTHON

RECIPE, SOURCE, ENVIRONMENT, BROKEN = 2, 3, 4, 5
#: Sections of a recipe.
Body = dict[str, Any]


@dataclass(frozen=True)
class Morning:
    """`make` spoils a source in a directory and returns the sections of the recipe that differ; `code` is the exit code, `said`
    are parts of the message. `family` is the sound source's. With `serves`, vLLM must have been asked."""

    make: Callable[[Path, Path], Body]
    code: int
    said: tuple[str, ...]
    serves: bool = False
    family: standard.Family = "qwen3"


def long_night() -> None:
    """Every run is long enough to be rehearsed."""
    from workflows.run import dress_rehearsal

    dress_rehearsal.LONG = 0.0


def serving(**changes: Any) -> Body:
    return {"verify": {"serving": SERVING | changes}}


def config(source: Path, **changes: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(source: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes every tensor whose name contains `part`."""
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if any(part in name for name in tensors):
            save_file(
                {name: change(value) if part in name else value for name, value in tensors.items()},
                path,
                {"format": "pt"},
            )


def interpreter(source: Path, lines: str, **changes: Any) -> Body:
    """vLLM's interpreter behind a script that first runs `lines` of sh."""
    path = source.parent / "python"
    path.write_text(f'#!/bin/sh\n{lines}\nexec {VLLM_PYTHON} "$@"\n')
    path.chmod(0o755)
    return serving(python=str(path), **changes)


def no_tokenizer(source: Path, output: Path) -> Body:
    for path in source.glob("tokenizer*"):
        path.unlink()
    return {}


def no_code(source: Path, output: Path) -> Body:
    config(
        source,
        auto_map={"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"},
        model_type="x",
    )
    return {"source": {"checkpoint": str(source), "trust_remote_code": True}}


def no_interpreter(source: Path, output: Path) -> Body:
    return interpreter(source, "exit 3")


def other_version(source: Path, output: Path) -> Body:
    (source.parent / "sitecustomize.py").write_text(
        "import sys\n"
        "class Moved:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.endswith('nvfp4.emulation'):\n"
        "            raise ModuleNotFoundError(f\"No module named '{name}'\", name=name)\n"
        "sys.meta_path.insert(0, Moved())\n"
    )
    return interpreter(source, f"PYTHONPATH={source.parent}; export PYTHONPATH")


def no_memory(source: Path, output: Path) -> Body:
    config(source, max_position_embeddings=8_000_000)
    limit = 'case "$1" in *worker.py) ulimit -v 6000000;; esac'
    return interpreter(source, limit, max_model_len=4_000_000)


def killed(source: Path, output: Path) -> Body:
    return interpreter(source, 'case "$1" in *worker.py) kill -KILL $$;; esac')


def out_of_time(source: Path, output: Path) -> Body:
    return interpreter(source, 'case "$1" in *worker.py) exec sleep 600;; esac', timeout=2)


def unknown_architecture(source: Path, output: Path) -> Body:
    config(source, architectures=["NobodyKnowsForCausalLM"])
    return serving()


def other_architecture(source: Path, output: Path) -> Body:
    config(source, architectures=["LlamaForCausalLM"])
    return serving()


def too_long(source: Path, output: Path) -> Body:
    return serving(max_model_len=4096)


def long_prompt(source: Path, output: Path) -> Body:
    return serving(max_model_len=64, prompts=["short", "word " * 200])


def unservable_heads(source: Path, output: Path) -> Body:
    """Heads of 24: vLLM's attention on a CPU has kernels for other widths."""
    config(source, head_dim=24)
    weights(source, "_norm.weight", lambda value: value[:24] if value.shape == (standard.HEAD_DIM,) else value)
    rows = {
        part: 24 * heads
        for part, heads in (("q_proj.", standard.HEADS), ("k_proj.", standard.KV_HEADS), ("v_proj.", standard.KV_HEADS))
    }
    for part, count in rows.items():
        weights(source, part, lambda value, count=count: value[:count].clone())  # type: ignore[misc]
    weights(source, "o_proj.", lambda value: value[:, : 24 * standard.HEADS].clone())
    return serving()


def broken_template(source: Path, output: Path) -> Body:
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages[0].content | nothing }}"}))
    (source / "chat_template.jinja").unlink(missing_ok=True)
    return {}


def template_without_answer(source: Path, output: Path) -> Body:
    """Whole conversations are rendered, and the beginning of an answer is not."""
    template = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}{{ 1 // 0 }}{% endif %}"
    )
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (source / "chat_template.jinja").unlink(missing_ok=True)
    return serving()


def broken_generation_config(source: Path, output: Path) -> Body:
    (source / "generation_config.json").write_text('{"temperature": ')
    return {}


def infinite_in_float16(source: Path, output: Path) -> Body:
    """Hidden states of 100,000: BF16 holds them, float16 does not."""
    weights(source, "embed_tokens", lambda value: value * 5e6)
    return serving(dtype="float16")


def nan_in_the_head(source: Path, output: Path) -> Body:
    weights(source, "lm_head", lambda value: value.index_fill(0, torch.tensor([3]), float("nan")))
    return {}


def nan_in_a_block(source: Path, output: Path) -> Body:
    weights(
        source, "layers.1.mlp.experts.3.up_proj", lambda value: value.index_fill(0, torch.tensor([3]), float("nan"))
    )
    return {}


def different_scales(source: Path, output: Path) -> Body:
    weights(source, "up_proj.weight_scale_2", lambda value: value * 2)
    return {
        "method": "convert",
        "calibration": None,
        "modifiers": [{"QuantizationModifier": {"targets": LINEAR, "scheme": "NVFP4"}}],
    }


def no_place(source: Path, output: Path) -> Body:
    return {"output": "/proc/output"}


def no_such_column(source: Path, output: Path) -> Body:
    path = source.parent / "rows.jsonl"
    path.write_text('{"answer": "yes"}\n')
    return {"calibration": {"dataset": str(path), "num_samples": 1}}


def half_a_fused_group(source: Path, output: Path) -> Body:
    return {"modifiers": [{"QuantizationModifier": {"targets": [r"re:.*gate_proj$"], "scheme": "NVFP4"}}]}


MORNINGS: dict[str, Morning] = {
    "a tokenizer file is missing": Morning(no_tokenizer, SOURCE, ("0 there, 288 rows skipped",)),
    "a code file of the checkpoint is missing": Morning(no_code, SOURCE, ("model_type 'x'",)),
    "the data set has no column with text": Morning(no_such_column, SOURCE, ("none of the columns",)),
    "the output's disk takes no files": Morning(no_place, ENVIRONMENT, ("/proc: a file of", "cannot be written")),
    "vLLM's interpreter is broken": Morning(no_interpreter, ENVIRONMENT, ("`import vllm` fails there",)),
    "targets take half of a matrix that vLLM fuses": Morning(half_a_fused_group, RECIPE, ("must be quantized alike",)),
    "a weight of a block is NaN": Morning(nan_in_a_block, SOURCE, ("layers.1.mlp.experts.3.up_proj",), family="glm4_moe"),
    "a weight of the head is NaN": Morning(
        nan_in_the_head, SOURCE, ("lm_head.weight: 128 of 131072 values are NaN",), family="glm4_moe"
    ),
    "fused weights have different scales": Morning(
        different_scales, SOURCE, ("served as one matrix have different global scales",)
    ),
    "vLLM does not know the architecture": Morning(
        unknown_architecture, BROKEN, ("serving.load: ", "NobodyKnowsForCausalLM"), serves=True
    ),
    "vLLM's class has no place for a tensor": Morning(
        other_architecture, BROKEN, ("serving.load: ", "self_attn.k_norm"), serves=True
    ),
    "vLLM has no kernel for a shape": Morning(unservable_heads, BROKEN, ("serving.logprobs: ", "head_dim=24"), serves=True),
    "max_model_len is longer than the model": Morning(
        too_long, BROKEN, ("serving.load: ", "max_model_len (4096) is greater than the derived"), serves=True
    ),
    "a prompt is longer than max_model_len": Morning(
        long_prompt, RECIPE, ("verify.serving.prompts: prompt 2 has ", "or set verify.serving.max_model_len: "), serves=True
    ),
    "the memory does not hold the KV cache": Morning(no_memory, BROKEN, ("serving.load: ", "memory"), serves=True),
    "vLLM is killed": Morning(killed, BROKEN, ("serving.load: ", "killed by SIGKILL"), serves=True),
    "vLLM does not end": Morning(out_of_time, BROKEN, ("serving.load: ", "time-out"), serves=True),
    "vLLM is of another version": Morning(
        other_version, ENVIRONMENT, ("vLLM cannot be imported there", "nvfp4.emulation"), serves=True
    ),
    "the chat template fails": Morning(broken_template, SOURCE, ("template cannot render it", "nothing")),
    "the chat template fails before an answer": Morning(
        template_without_answer, BROKEN, ("serving.chat: ", "zero"), serves=True
    ),
    "generation_config.json is broken": Morning(broken_generation_config, SOURCE, ("generation_config.json: is not valid JSON",)),
    "values leave the range of the served dtype": Morning(infinite_in_float16, BROKEN, ("serving.finite: ",), serves=True),
}  # fmt: skip


def sound_source(directory: Path, morning: Morning) -> Path:
    """The source before it is spoiled."""
    if morning.make is different_scales:
        return stored_forms.write(directory, "qwen3", "nvfp4_modelopt")
    return standard.write(directory, morning.family)
