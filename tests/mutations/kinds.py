"""What is mutated, and what then reads it: one class a kind. `run(seed)` raises nothing but what the project documents."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from calibration.checkpoint.files import read_json
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.header import parse_header, read_header
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from calibration.engine.export import Exporter
from calibration.forecast.cost import attention, block_costs, hidden_width
from calibration.plan.planner import make_plan
from calibration.runs.finish import finish_output
from calibration.runs.journal import RunDirectory
from calibration.runs.resume import read_resume
from recipes.errors import WorkflowError
from recipes.loader import dump_recipe, load_recipe
from tests.exported import calibrated, recipe, task_of
from tests.mutations.mutate import mutated_bytes, mutated_json, mutated_lines
from verify.known import Known
from verify.serving.serving import kv_cache_bytes
from verify.structure.structure import verify_structure
from workflows.inspect_checkpoint import describe_checkpoint, describe_plan

HIDDEN, HEADS, VOCAB, EXPERTS = 32, 2, 32, 2
TARGETS = [r"re:.*experts\.\d+\.w[123]$"]


def mixtral(directory: Path, tokenizer: bool = True) -> Path:
    """The smallest MoE checkpoint that is whole: one block, two experts, BF16."""
    directory.mkdir(parents=True)
    attention_shapes = {"q": (HIDDEN, HIDDEN), "k": (16, HIDDEN), "v": (16, HIDDEN), "o": (HIDDEN, HIDDEN)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN),
        "model.layers.0.input_layernorm.weight": (HIDDEN,), "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        "model.layers.0.block_sparse_moe.gate.weight": (EXPERTS, HIDDEN),
    }  # fmt: skip
    shapes |= {f"model.layers.0.self_attn.{name}_proj.weight": shape for name, shape in attention_shapes.items()}
    for expert in range(EXPERTS):
        for leaf in ("w1", "w2", "w3"):
            shapes[f"model.layers.0.block_sparse_moe.experts.{expert}.{leaf}.weight"] = (HIDDEN, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(shape, generator=generator).to(torch.bfloat16) for n, shape in shapes.items()}
    save_file(tensors, directory / "m.safetensors", metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(tensors), "m.safetensors")}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": HIDDEN,
        "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": 16,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "vocab_size": VOCAB, "max_position_embeddings": 64,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "attention_bias": False,
    }  # fmt: skip
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    if tokenizer:
        for name, content in TOKENIZER.items():
            (directory / name).write_text(json.dumps(content))
    return directory


_WORDS = ["<s>", "</s>", "ab", *"abcdefghijklmnopqrstuvwxyz"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": n, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for n, word in enumerate(_WORDS[:2])
        ],
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {word: n for n, word in enumerate(_WORDS)}, "merges": [["a", "b"]], "unk_token": None},
    },
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"},
        "model_max_length": 64, "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    },
    "generation_config.json": {"eos_token_id": 1, "do_sample": True, "temperature": 0.6},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
}  # fmt: skip


class Kind:
    """One kind of hostile file. `directory` is scratch of its own, in memory if the machine has such a place."""

    #: Exceptions that the reader documents beside WorkflowError.
    documented: tuple[type[Exception], ...] = (WorkflowError,)

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prepare()

    def prepare(self) -> None:
        """Writes what is mutated."""

    def close(self) -> None:
        """Ends what `prepare` or `run` started."""

    def run(self, rng: random.Random) -> bool:
        """One mutation. Whether it was refused or judged broken; raises whatever the code under test raises."""
        raise NotImplementedError


def _described(checkpoint: Checkpoint, made: Any) -> None:
    formats = Formats(checkpoint)
    describe_checkpoint(checkpoint, formats)
    plan = make_plan(checkpoint, formats, made)
    describe_plan(plan, checkpoint)
    block_costs(plan, formats)


class Headers(Kind):
    """Headers of safetensors files, from their bytes to the plan."""

    def prepare(self) -> None:
        source = mixtral(self.directory / "source", tokenizer=False)
        self.recipe = recipe(source, self.directory / "out", TARGETS)
        self.path = source / "m.safetensors"
        self.config = read_json(source / CONFIG_NAME)
        plain = _header(self.path)
        self.bases = [plain, _quantized(plain, "weight_scale_inv"), _packed(plain)]
        self.file = self.directory / "f.safetensors"

    def run(self, rng: random.Random) -> bool:
        base = rng.choice(self.bases)
        raw = mutated_json(base, rng) if rng.random() < 0.9 else mutated_bytes(json.dumps(base).encode(), rng)
        if rng.random() < 0.05:
            self.file.write_bytes(mutated_bytes(len(raw).to_bytes(8, "little") + raw, rng))
            read_header(self.file)
        tensors = parse_header(self.path, raw, 8 + len(raw) + _end(base))
        _described(Checkpoint(self.path.parent, self.config, tensors, [self.path.name]), self.recipe)
        return False


def _header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def _write_header(path: Path, header: dict[str, Any]) -> None:
    """A whole file of this header, every byte of its tensors zero."""
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(_end(header)))


def _end(header: dict[str, Any]) -> int:
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


def _laid_out(entries: dict[str, tuple[str, list[int], int]]) -> dict[str, Any]:
    header, at = {}, 0
    for name, (dtype, shape, nbytes) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    return header


def _quantized(plain: dict[str, Any], leaf: str) -> dict[str, Any]:
    """The same tensors with experts in FP8 tiles."""
    entries: dict[str, tuple[str, list[int], int]] = {}
    for name, entry in plain.items():
        if name == "__metadata__":
            continue
        rows, columns = (*entry["shape"], 1)[:2]
        if ".experts." in name:
            entries[name] = ("F8_E4M3", [rows, columns], rows * columns)
            entries[name.removesuffix("weight") + leaf] = ("F32", [1, 1], 4)
        else:
            entries[name] = ("BF16", entry["shape"], 2 * rows * columns)
    return _laid_out(entries)


def _packed(plain: dict[str, Any]) -> dict[str, Any]:
    """The same tensors with experts in NVFP4."""
    entries: dict[str, tuple[str, list[int], int]] = {}
    for name, entry in plain.items():
        if name == "__metadata__":
            continue
        rows, columns = (*entry["shape"], 1)[:2]
        if ".experts." in name:
            module = name.removesuffix("weight")
            entries[module + "weight_packed"] = ("U8", [rows, columns // 2], rows * columns // 2)
            entries[module + "weight_scale"] = ("F8_E4M3", [rows, columns // 16], rows * columns // 16)
            entries[module + "weight_global_scale"] = ("F32", [1], 4)
        else:
            entries[name] = ("BF16", entry["shape"], 2 * rows * columns)
    return _laid_out(entries)


class Index(Kind):
    """model.safetensors.index.json of a checkpoint that is opened."""

    def prepare(self) -> None:
        self.source = mixtral(self.directory / "source", tokenizer=False)
        self.index = json.loads((self.source / INDEX_NAME).read_text())

    def run(self, rng: random.Random) -> bool:
        (self.source / INDEX_NAME).write_bytes(mutated_json(self.index, rng))
        Checkpoint.open(self.source)
        return False


class Config(Kind):
    """config.json of a source, from its bytes to the plan and its cost."""

    def prepare(self) -> None:
        self.source = mixtral(self.directory / "source", tokenizer=False)
        tiles = _quantized(_header(self.source / "m.safetensors"), "weight_scale_inv")
        _write_header(self.source / "m.safetensors", tiles)
        (self.source / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(tiles, "m.safetensors")}))
        self.recipe = recipe(self.source, self.directory / "out", TARGETS)
        self.config = json.loads((self.source / CONFIG_NAME).read_text())
        self.config |= {
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
            "mlp_only_layers": [], "rope_parameters": {"rope_theta": 1e4}, "decoder_sparse_step": 1, "hc_mult": 1,
            "num_nextn_predict_layers": 0, "n_routed_experts": 2, "num_experts": 2, "moe_intermediate_size": HIDDEN,
        }  # fmt: skip
        self.bases = [self.config, {**self.config, "model_type": "llama"}, {**self.config, "model_type": "qwen3_moe"}]

    def run(self, rng: random.Random) -> bool:
        (self.source / CONFIG_NAME).write_bytes(mutated_json(rng.choice(self.bases), rng))
        checkpoint = Checkpoint.open(self.source)
        hidden_width(checkpoint.config), attention(checkpoint.config), kv_cache_bytes(checkpoint.config, 64)
        _described(checkpoint, self.recipe)
        return False


class Quantization(Kind):
    """config.json of an output, its quantization_config above all, through the structure level of verify."""

    def prepare(self) -> None:
        source = mixtral(self.directory / "source")
        made = recipe(source, self.directory / "out", TARGETS, scheme="NVFP4A16")
        task = task_of(made)
        plan, formats, exporter = task.plan, task.formats, Exporter(task)
        for block in plan.block_numbers:
            exporter.block(block, calibrated(plan, formats, block))
        exporter.rest({})
        finish_output(task, dump_recipe(made))
        self.output, self.plan, self.source, self.recipe = self.directory / "out", plan, formats, made
        self.config = json.loads((self.output / CONFIG_NAME).read_text())
        for model_type in ("llama", "mixtral", "qwen3_moe", "deepseek_v4"):  # imports what their checks need
            (self.output / CONFIG_NAME).write_text(json.dumps({**self.config, "model_type": model_type}))
            verify_structure(self.output, Known(self.plan, self.source))

    def run(self, rng: random.Random) -> bool:
        whole = dict(self.config)
        if rng.random() < 0.8:
            inner = mutated_json(whole.pop("quantization_config"), rng)
            raw = json.dumps(whole).encode()[:-1] + b',"quantization_config":' + inner + b"}"
        else:
            raw = mutated_json(whole, rng)
        (self.output / CONFIG_NAME).write_bytes(raw)
        against = rng.choice(((None, None), (None, self.source), (self.plan, self.source)))
        checks = verify_structure(self.output, Known(*against))
        if rng.random() < 0.2:
            _described(Checkpoint.open(self.output), self.recipe)
        return any(check.verdict == "FAIL" for check in checks)


class Tokenizer(Kind):
    """Tokenizer and generation files, through the checks that read them."""

    def prepare(self) -> None:
        self.source = mixtral(self.directory / "source")
        self.output = self.directory / "out"
        shutil.copytree(self.source, self.output)
        self.config = json.loads((self.source / CONFIG_NAME).read_text())

    def run(self, rng: random.Random) -> bool:
        from calibration.checkpoint.permissions import requests
        from verify.structure.tokenizer import tokenizer_check

        name = rng.choice(list(TOKENIZER))
        (self.output / name).write_bytes(mutated_json(TOKENIZER[name], rng))
        try:
            found = [tokenizer_check(self.output, self.config, source) for source in (None, self.source)]
            requests(self.output)
        finally:
            shutil.copyfile(self.source / name, self.output / name)
        return any(check.verdict == "FAIL" for check in found)


class LoadedTokenizer(Kind):
    """The same files, through transformers: each costs a hundred times as much."""

    def prepare(self) -> None:
        self.source = mixtral(self.directory / "source")
        self._load()  # imports most of transformers

    def _load(self) -> None:
        from calibration.data.batches import load_tokenizer
        from calibration.data.encoder import Encoder
        from calibration.data.table import Table, _Rows
        from recipes.schema import Calibration

        table = Table(_Rows([{"text": "a b"}, {"text": "ab"}]), "data", None)
        with Encoder(Calibration(dataset="data"), load_tokenizer(self.source, False), table, False) as encoder:
            list(encoder.rows([0, 1]))

    def run(self, rng: random.Random) -> bool:
        name = rng.choice(list(TOKENIZER))
        (self.source / name).write_bytes(mutated_json(TOKENIZER[name], rng))
        try:
            self._load()
        finally:
            (self.source / name).write_text(json.dumps(TOKENIZER[name]))
        return False


class Recipes(Kind):
    """Recipe files."""

    def prepare(self) -> None:
        self.text = """\
source: {checkpoint: /models/x, revision: main}
output: /models/y
modifiers:
  - QuantizationModifier:
      config_groups:
        experts:
          targets: ['re:.*w[123]$', 'part:routed expert']
          scheme: NVFP4
      ignore: [lm_head]
calibration:
  dataset: bundled
  num_samples: 16
  max_seq_length: 128
offload: {max_host_memory: 5GiB}
verify:
  fidelity: {worst_error: 0.2}
  serving: {max_tokens: 16, prompts: [a, b]}
"""
        self.path = self.directory / "r.yaml"

    def run(self, rng: random.Random) -> bool:
        self.path.write_bytes(mutated_lines(self.text, rng))
        dump_recipe(load_recipe(self.path))
        return False


class RunFiles(Kind):
    """journal.jsonl, events.jsonl and the JSON files of a run directory, through --status, resume and the report."""

    def prepare(self) -> None:
        source = mixtral(self.directory / "source", tokenizer=False)
        made = recipe(source, self.directory / "out", TARGETS)
        self.task = task_of(made)
        self.plan = self.task.plan
        self.output, self.run_directory = self.directory / "out", RunDirectory(self.directory / "out")
        self.output.mkdir()
        self.run_directory.path.mkdir()
        folder = self.run_directory.path / "activations" / "boundary-0002"
        self.files: dict[str, Any] = {
            "journal.jsonl": [
                {"time": 1.0, "fact": "fingerprint", "plan": self.plan.digest, "blocks": 1, "parts": {"a": 1}},
                {"time": 2.0, "fact": "started", "plan": self.plan.digest, "settings": {}, "source": {"m.safetensors": [1, 2]}},
                {"time": 3.0, "fact": "shards", "plan": self.plan.digest, "block": 0,
                 "shards": {self.plan.shards[0].name: "0" * 64},
                 "activations": {"directory": str(folder), "files": {"batch-000000.pt": "0" * 64}},
                 "result": {"modules": 6, "tokens_per_expert": {"0": 5}, "filled_experts": [1], "rounded_to_nearest": [],
                            "parity": 0.0, "peak_rss": 10}},
                {"time": 4.0, "fact": "boundary", "plan": self.plan.digest, "block": 0, "activations": None},
                {"time": 5.0, "fact": "calibrated", "data": "x", "tokens_per_expert": "y", "seconds": 1.0},
                {"time": 6.0, "fact": "verified", "structure": "PASS", "fidelity": "PASS", "serving": "FAIL"},
            ],
            "events.jsonl": [
                {"time": 1.0, "event": "stage_started", "stage": "calibrate"},
                {"time": 1.0, "event": "plan", "digest": "0", "recipe": "0", "versions": {"torch": "2"}},
                {"time": 1.5, "event": "load", "block": 0},
                {"time": 2.0, "event": "block", "block": 1, "blocks": 1, "seconds": 1.0, "export_seconds": 1.0, "peak_memory": 5,
                 "tokens_per_expert": {"0": 3, "1": 0}, "expert_errors": {"0": 0.1}, "worst_error": 0.1},
                {"time": 2.5, "event": "stage_finished", "stage": "calibrate", "seconds": 2.0},
                {"time": 3.0, "event": "error", "exit_code": 4, "problems": ["disk full"]},
            ],
            "estimate.json": {"from": "rehearsal", "notes": [], "stages": {"calibrate": {
                "predicted": {"seconds": 1.0, "cpu_seconds": 1.0, "bytes_read": 1, "bytes_written": 1, "peak_memory": None,
                              "terms": {"read": [1.0, 1.0]}},
                "fact": {"seconds": 1.0, "cpu_seconds": 1.0, "bytes_read": 1, "bytes_written": 1, "peak_memory": 5}}}},
            "lock": {"host": "h", "pid": 1, "began": "5"},
            "serving.json": {"exit_code": 0, "perplexity": 1.0, "source": {"agreement": {"kl": 0.1}},
                             "samples": [{"kind": "a", "prompt": "b", "text": "c", "source_text": None}]},
            "batch.json": {"slots": 1, "runs": [
                {"name": "a", "given": "a.yaml", "recipe": "a.yaml", "output": str(self.output), "problems": [],
                 "method": "calibrate",
                 "recipe_digest": "0", "plan_digest": self.plan.digest, "output_bytes": 1, "source_bytes": 1, "seconds": 1.0}]},
            "attempts.jsonl": [
                {"time": 1.0, "fact": "submitted", "executor": "local", "job": "1"},
                {"time": 1.0, "fact": "begun", "host": "h", "pid": 1, "began": "5"},
                {"time": 2.0, "fact": "ended", "outcome": "transient", "reason": "x", "seconds": 1.0, "peak_rss": 5},
                {"time": 2.0, "fact": "requeued", "why": "time", "reason": "x", "progressed": True, "seconds": 1.0},
            ],
        }  # fmt: skip
        for name in self.files:
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
            self._path(name).write_bytes(self._whole(name))

    def _path(self, name: str) -> Path:
        batch = self.directory / "batch"
        places = {"batch.json": batch / name, "attempts.jsonl": batch / "runs" / "a" / name}
        return places.get(name, self.run_directory.path / name)

    def _whole(self, name: str) -> bytes:
        content = self.files[name]
        if name.endswith("jsonl"):
            return "".join(json.dumps(line) + "\n" for line in content).encode()
        return json.dumps(content).encode()

    def run(self, rng: random.Random) -> bool:
        from workflows.batch.state import BatchDirectory
        from workflows.batch.summary import summarize
        from workflows.run.status import read_status, render_status

        name = rng.choice(list(self.files))
        if name.endswith("jsonl"):
            at = rng.randrange(len(self.files[name]))
            lines = [json.dumps(line).encode() for line in self.files[name]]
            lines[at] = mutated_json(self.files[name][at], rng)
            raw = b"\n".join(lines)
        else:
            raw = mutated_json(self.files[name], rng)
        self._path(name).write_bytes(raw)
        try:
            if name in ("batch.json", "attempts.jsonl", "serving.json"):
                summarize(BatchDirectory(self.directory / "batch"))
            else:
                render_status(read_status(self.output, now=10.0))
                read_resume(self.task, self.run_directory)
        finally:
            self._path(name).write_bytes(self._whole(name))
        return False


class Rows(Kind):
    """Calibration data: the rows of a JSON lines file, to token ids."""

    documented = (WorkflowError, ValueError)  # `read_rows` says ValueError, which `load_table` turns into a SourceError

    def prepare(self) -> None:
        from calibration.data.batches import load_tokenizer

        self.tokenizer = load_tokenizer(mixtral(self.directory / "source"), False)
        self.path = self.directory / "rows.jsonl"
        self.encoders: dict[Any, Any] = {}
        self.bases: list[list[Any]] = [
            [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}], "tools": [{"name": "t"}]}],
            [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
            [{"text": "a b c"}, {"text": "d"}],
            [{"prompt": "a", "response": "b", "system": "c"}],
            [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]}],
        ]  # fmt: skip

    def run(self, rng: random.Random) -> bool:
        from calibration.data.encoder import Encoder
        from calibration.data.json_rows import read_rows
        from calibration.data.rows import choose_columns
        from calibration.data.table import Table, _Rows
        from recipes.schema import Calibration

        base = rng.choice(self.bases)
        at = rng.randrange(len(base))
        lines = [
            mutated_json(row, rng) if number == at else json.dumps(row).encode() for number, row in enumerate(base)
        ]
        self.path.write_bytes(b"\n".join(lines))
        try:
            rows = read_rows(self.path)
        except ValueError:
            return True
        table, options = Table(_Rows(rows), "data", [self.path]), Calibration(dataset="data")
        columns = choose_columns(options, table)
        if columns not in self.encoders:  # it starts a process of its own, which takes 50 ms
            self.encoders[columns] = Encoder(options, self.tokenizer, table, False)
        self.encoders[columns].table = table
        list(self.encoders[columns].rows(list(range(len(table)))))
        return False

    def close(self) -> None:
        for encoder in self.encoders.values():
            encoder.__exit__()


#: Name -> (class, mutations of the default run, of the slow one).
KINDS: dict[str, tuple[Callable[[Path], Kind], int, int]] = {
    "header": (Headers, 100, 350_000),
    "index": (Index, 60, 300_000),
    "config": (Config, 100, 150_000),
    "quantization": (Quantization, 30, 40_000),
    "tokenizer": (Tokenizer, 60, 100_000),
    "tokenizer-loaded": (LoadedTokenizer, 3, 1_000),
    "recipe": (Recipes, 40, 25_000),
    "run": (RunFiles, 60, 24_000),
    "rows": (Rows, 40, 10_000),
}


def scratch() -> Path:
    """A place for thousands of small files: memory if there is such a file system."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
