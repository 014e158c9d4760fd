"""What travels beside the weights: by kind, never more, each readable before anything is computed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from calibration.checkpoint import side_files as module
from calibration.checkpoint.files import open_regular
from calibration.checkpoint.side_files import side_files
from recipes.errors import SourceError
from tests.models import standard
from workflows.run import __main__ as run

TRAVELS = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "tekken.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "qwen.tiktoken",
    "spiece.model",
    "configuration.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE-MODEL",
    "MODEL_LICENSE",
    "NOTICE",
    "USE_POLICY.md",
    "README_zh.md",
    "modeling_deepseek.py",
    "configuration_deepseek.py",
    "requirements.txt",
    "encoding/encoding_dsv4.py",
    "encoding/tests/case.json",
    "encoding/README.md",
    "inference/generate.py",
    "additional_chat_templates/rag.jinja",
]
STAYS = [
    "last.ckpt",
    "model.nemo",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "training_args.bin",
    "trainer_state.json",
    "latest",
    "zero_to_fp32.txt",
    "events.out.tfevents.1",
    "adapter_config.json",
    "adapter_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.gguf",
    "model.onnx",
    "tf_model.h5",
    "flax_model.msgpack",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "params.json",
    "notes.txt",
    "figure.png",
    "paper.pdf",
    "tokenizer.pt",
    "tokenizer.bin",
    "vocab.json.partial",
    "encoding/weights.bin",
]
DIRECTORIES = (
    "checkpoint-10/", "global_step1/", "original/", "runs/", "onnx/",
)  # fmt: skip
UNNAMED = [
    "README.md",
    "readme.md",
    "config.json",
    "recipe.yaml",
    "model.safetensors",
    "model.safetensors.index.json",
    ".git/x",
    ".cache/y",
]


def filled(directory: Path) -> Path:
    for name in (*TRAVELS, *STAYS, *UNNAMED, *(f"{folder}tokenizer.json" for folder in DIRECTORIES)):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return directory


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in side_files(directory).copied}


def test_kinds_of_a_finished_model_travel_and_nothing_else(tmp_path: Path) -> None:
    found = side_files(filled(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in found.copied] == sorted(
        TRAVELS, key=lambda name: name.split("/")
    )
    assert set(found.left_out) == {*STAYS, *DIRECTORIES}
    assert found.left_out["hf_quant_config.json"] == "describes the source's own quantization"


def test_a_large_file_stays_unless_it_is_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", 10)
    for name in ("tokenizer.json", "vocab.json", "NOTICE"):
        (tmp_path / name).write_text("x" * (5 if name == "NOTICE" else 11))
    found = side_files(tmp_path)
    assert {path.name for path in found.copied} == {"tokenizer.json", "NOTICE"}
    assert found.left_out == {"vocab.json": "11 bytes, more than the 10 of a side file"}


def test_links_travel_inside_the_source_and_the_hubs_cache_alone(tmp_path: Path) -> None:
    """A stranger's LICENSE -> ~/.ssh/id_rsa would be published with the output."""
    blobs, snapshot, elsewhere = tmp_path / "blobs", tmp_path / "snapshots" / "main", tmp_path / "elsewhere"
    for folder in (blobs, snapshot / "encoding", elsewhere / "inference"):
        folder.mkdir(parents=True)
    for path in (blobs / "abc123", elsewhere / "id_rsa", elsewhere / "NOTICE", elsewhere / "inference" / "x.py"):
        path.write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc123")
    (snapshot / "encoding" / "x.py").symlink_to("../../../blobs/abc123")
    (snapshot / "LICENSE").symlink_to("tokenizer.json")
    (snapshot / "inference").symlink_to(elsewhere / "inference")
    (snapshot / "latest").symlink_to(elsewhere / "id_rsa")
    assert names(snapshot) == {"tokenizer.json", "encoding/x.py", "LICENSE"}
    assert side_files(snapshot).left_out == {"inference/": "a link", "latest": "no kind of side file"}
    (snapshot / "NOTICE").symlink_to(elsewhere / "NOTICE")
    (snapshot / "encoding" / "y.py").symlink_to(elsewhere / "id_rsa")
    with pytest.raises(SourceError) as caught:
        side_files(snapshot)
    text = str(caught.value)
    assert f"NOTICE: is a link out of the source, to {elsewhere / 'NOTICE'}" in text
    assert "y.py: is a link out of the source" in text


def test_every_unreadable_file_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTICE", "vocab.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    os.mkfifo(tmp_path / "LICENSE")

    def locked(path: Path, remedy: str) -> object:
        if path.name in ("NOTICE", "vocab.json"):  # root reads everything
            raise SourceError(f"{path}: cannot be read: Permission denied; {remedy}")
        return open_regular(path, remedy)

    monkeypatch.setattr(module, "open_regular", locked)
    with pytest.raises(SourceError) as caught:
        side_files(tmp_path)
    text = str(caught.value)
    assert (
        all(name in text for name in ("NOTICE", "vocab.json", "LICENSE: cannot be read: is not a regular file"))
        and "tokenizer" not in text
    )


def test_a_dry_run_says_what_is_left_out_and_what_is_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = standard.write(tmp_path / "source", "llama")
    (source / "last.ckpt").write_text("x")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        json.dumps({"source": {"checkpoint": str(source)}, "output": str(tmp_path / "o"), "method": "plain"})
    )
    assert run.main([str(recipe), "--stages", "inspect"]) == 0
    assert "not copied from the source: last.ckpt (no kind of side file)" in capsys.readouterr().err
    described = json.loads((tmp_path / "o.run" / "plan.json").read_text())["side_files"]
    assert described["left_out"] == {"last.ckpt": "no kind of side file"} and "tokenizer.json" in described["copied"]
    os.mkfifo(source / "encoding.py")
    assert run.main([str(recipe), "--dry-run"]) == SourceError.exit_code
    assert "encoding.py: cannot be read: is not a regular file" in capsys.readouterr().err
