"""Every mistake a user can make ends in one clear message and its documented exit code, with nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.index import INDEX_NAME
from tests.integration.whole_runs import LINEAR, run, write_recipe
from tests.models import standard

RECIPE, SOURCE, ENVIRONMENT = 2, 3, 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standard.write(tmp_path_factory.mktemp("bad") / "llama", "llama")


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "source"))


def last_shard(source: Path) -> Path:
    return sorted(source.glob("*.safetensors"))[-1]


def missing(source: Path) -> str:
    shard = last_shard(source)
    shard.unlink()
    return f"{shard.name}: missing shard"


def truncated(source: Path) -> str:
    shard = last_shard(source)
    shard.write_bytes(shard.read_bytes()[:-1000])
    return f"{shard.name}: truncated"


def escaping(source: Path) -> str:
    index = json.loads((source / INDEX_NAME).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../x.safetensors"
    (source / INDEX_NAME).write_text(json.dumps(index))
    return "'../x.safetensors'"


def no_config(source: Path) -> str:
    (source / "config.json").unlink()
    return "config.json: cannot be read"


def unknown_family(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt9"}))
    return "'gpt9' has no grammar here"


def other_shapes(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    return "built from config.json needs"


def not_a_number(name: str) -> Callable[[Path], str]:
    def spoil(source: Path) -> str:
        shard = source / json.loads((source / INDEX_NAME).read_text())["weight_map"][name]
        tensors = load_file(shard)
        tensors[name].view(-1)[3] = torch.nan
        save_file(tensors, shard, metadata={"format": "pt"})
        return f"{name}: 1 of"

    return spoil


SOURCES: dict[str, Callable[[Path], str]] = {
    "missing shard": missing,
    "truncated shard": truncated,
    "an index that names ../x": escaping,
    "no config": no_config,
    "unknown family": unknown_family,
    "config of another model": other_shapes,
    "NaN in a quantized weight": not_a_number("model.layers.1.mlp.down_proj.weight"),
    "NaN in a copied weight": not_a_number("model.norm.weight"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_bad_source_is_named(case: str, source: Path, tmp_path: Path) -> None:
    expected = SOURCES[case](source)
    done = run(write_recipe(tmp_path, source, LINEAR, verify={}), "--json")
    assert done.returncode == SOURCE, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["exit_code"] == SOURCE
    assert not (tmp_path / "output" / INDEX_NAME).exists()


def test_three_mistakes_in_a_recipe_are_one_message(source: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, source, LINEAR)
    text = recipe.read_text().replace("num_samples: 8", "num_samples: 0").replace("verify:", "verfy:")
    recipe.write_text(text.replace("scheme: NVFP4", "scheme: NVFP5"))
    done = run(recipe, fresh=True)
    assert done.returncode == RECIPE and "Traceback" not in done.stderr
    for part in ("num_samples", "verfy", "did you mean 'verify'", "NVFP5", recipe.name):
        assert part in done.stderr


CALLS: dict[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "a target that matches nothing": ({"modifiers": [{"QuantizationModifier": {"targets": ["re:.*w1$"], "scheme": "NVFP4"}}]},
                                      (), RECIPE, "'re:.*w1$' matches no module of the source"),
    "a method without an engine for it": ({}, ("--set", "method=plian"), RECIPE, "method"),
    "an unknown override": ({}, ("--set", "calibration.samples=3"), RECIPE, "samples"),
    "a modifier that needs the whole model": (
        {"modifiers": [{"SpinQuantModifier": {}}, {"QuantizationModifier": {"targets": LINEAR, "scheme": "NVFP4"}}],
         "verify": {}}, (), RECIPE, "SpinQuantModifier"),
    "an unknown stage": ({}, ("--stages", "inspect,bake"), RECIPE, "bake"),
    "no such source": ({}, ("--set", "source.checkpoint=/nowhere/at/all"), SOURCE, "/nowhere/at/all"),
    "no such data set": ({"calibration": {"dataset": "absent.jsonl"}, "verify": {}}, (), SOURCE, "absent.jsonl"),
    "too few samples": ({"calibration": {"dataset": "bundled", "num_samples": 1000000, "exact": True}, "verify": {}},
                        (), SOURCE, "1000000"),
    "no vLLM environment": ({"verify": {"serving": {"python": "/nowhere/python"}}}, (), ENVIRONMENT, "make venv-vllm"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call_is_one_message(case: str, source: Path, tmp_path: Path) -> None:
    sections, arguments, code, expected = CALLS[case]
    done = run(write_recipe(tmp_path, source, LINEAR, **sections), *arguments)
    assert done.returncode == code, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "output").glob("*"))


def test_a_full_output_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious.txt").write_text("mine")
    done = run(write_recipe(tmp_path, source, LINEAR, verify={}))
    assert done.returncode == ENVIRONMENT and "output is not empty" in done.stderr
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["precious.txt"]


def test_an_interpreter_without_vllm_is_found_before_the_work(source: Path, tmp_path: Path) -> None:
    import sys

    done = run(write_recipe(tmp_path, source, LINEAR, verify={"serving": {"python": sys.executable}}))
    assert done.returncode == ENVIRONMENT and "import vllm" in done.stderr
    assert not (tmp_path / "output").exists()
