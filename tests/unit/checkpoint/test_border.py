"""Headers, index and config of a stranger's checkpoint: refused by file and field, quickly, without a traceback."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calibration.checkpoint.header import parse_header, read_header
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from calibration.checkpoint.source_config import MOST_EXPERTS, SourceConfig, check_config
from calibration.forecast.cost import attention, hidden_width
from recipes.errors import SourceError
from verify.checks import level_verdicts
from verify.serving.serving import kv_cache_bytes
from verify.structure.structure import verify_structure
from verify.structure.tokenizer import tokenizer_check

ENTRY: dict[str, Any] = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def parse(header: Any, size: int | None = None) -> Any:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(Path("a.safetensors"), raw, 8 + len(raw) + 2 if size is None else size)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"a": ENTRY | {"shape": [10**4000, 10**4000]}}, "a: shape [1000"),
        ({"a": ENTRY | {"shape": [True, 2]}}, "a: shape"),
        ({"a": ENTRY | {"shape": [2.0]}}, "a: shape"),
        ({"a": ENTRY | {"shape": "2"}}, "a: shape"),
        ({"a": ENTRY | {"shape": [-2]}}, "a: shape"),
        ({"a": ENTRY | {"data_offsets": [0, 1, 2]}}, "a: data_offsets"),
        ({"a": ENTRY | {"data_offsets": [0.0, 2]}}, "a: data_offsets"),
        ({"a": ENTRY | {"data_offsets": {"0": 1, "2": 3}}}, "a: data_offsets"),
        ({"a": ENTRY | {"dtype": ["U8"]}}, "a: dtype"),
        ({"a": None}, "a: the header entry lacks"),
        ({"": ENTRY}, "'': the name has 0 letters"),
        ({"x" * 1001: ENTRY}, "the name has 1,001 letters"),
        ({"\x1b]0;owned\x07": ENTRY}, r"'\x1b]0;owned\x07': the name holds characters that cannot be printed"),
        ({"a\u202eb": ENTRY}, "cannot be printed"),
        ({"a\x85b": ENTRY}, "cannot be printed"),
        (b'{"\\ud800": 1}', "hex escape"),
        ({"__metadata__": [1], "a": ENTRY}, "__metadata__"),
        ({"__metadata__": {"format": 1}, "a": ENTRY}, "__metadata__"),
        (b"[1]", "no JSON object"),
        (b"\xef\xbb\xbf{}", "no JSON object"),
        (b'{"a":' * 1000, "damaged"),
    ],
)
def test_a_header_that_means_nothing_is_refused_by_tensor(header: Any, problem: str) -> None:
    with pytest.raises(SourceError) as raised:
        parse(header)
    assert problem in str(raised.value) and str(raised.value).startswith("a.safetensors: ")
    assert str(raised.value).replace("\n", "").isprintable() and len(str(raised.value)) < 1_000


def test_a_shape_of_three_million_numbers_costs_no_time() -> None:
    raw = b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[' + b"9," * 3_000_000 + b"0]}}"
    began = time.process_time()
    with pytest.raises(SourceError, match="shape of 3,000,001 numbers"):
        parse(raw)
    assert time.process_time() - began < 5


def test_a_header_full_of_problems_names_the_first_ones_and_counts_the_others() -> None:
    with pytest.raises(SourceError) as raised:
        parse({str(number): ENTRY | {"dtype": "U9"} for number in range(1_000)})
    assert len(raised.value.problems) == 22 and "980 further problems" in raised.value.problems[20]


def test_a_shard_that_is_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / CONFIG_NAME).write_text("{}")
    with pytest.raises(SourceError, match="FIFO"):
        read_header(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="FIFO"):
        Checkpoint.open(tmp_path)


def write(directory: Path, config: Any = None, index: Any = None) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({"a.weight": torch.zeros(2)}, directory / "m.safetensors")
    (directory / CONFIG_NAME).write_text(json.dumps({"model_type": "llama"} if config is None else config))
    index = {"metadata": {}, "weight_map": {"a.weight": "m.safetensors"}} if index is None else index
    (directory / INDEX_NAME).write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a.weight": "x" * 300},
        {"a.weight": "../m.safetensors"},
        {"a.weight": "a\0b"},
        {"a.weight": "a\x1b[2Jb"},
        {"a.weight": ["m.safetensors"]},
        {"a.weight": None},
        {"a.weight": "m.safetensors", "\x1b]0;x\x07": "m.safetensors"},
        {"a.weight": "m.safetensors", "x" * 100_000: "m.safetensors"},
        ["m.safetensors"],
        {},
    ],
)
def test_an_index_that_names_no_files_is_refused_by_name(tmp_path: Path, weight_map: Any) -> None:
    directory = write(tmp_path, index={"weight_map": weight_map})
    with pytest.raises(SourceError) as raised:
        Checkpoint.open(directory)
    assert INDEX_NAME in str(raised.value)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1_000
    assert level_verdicts(verify_structure(directory))["structure"] == "FAIL"


def test_a_path_that_no_file_system_takes_is_a_message() -> None:
    with pytest.raises(SourceError, match="no such checkpoint directory"):
        Checkpoint.open(Path("/" + "x" * 5_000))


#: A value of no field, by what it is.
WRONG: dict[str, Any] = {
    "text": "x", "float": 1.5, "negative": -(10**6), "huge": 10**4000, "list": ["x"], "mapping": {"a": 1},
    "infinite": float("inf"), "true": True,
}  # fmt: skip
RIGHT = {
    ("model_type", "text"), ("tie_word_embeddings", "true"), ("attention_bias", "true"), ("mlp_bias", "true"),
    ("enable_confidence_head", "true"), ("use_qk_norm", "true"),
    ("quantization_config", "mapping"), ("compression_config", "mapping"),
    ("text_config", "mapping"), ("vision_config", "mapping"),
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(SourceConfig.model_fields))
def test_every_field_of_the_config_that_is_read_has_a_type(field: str) -> None:
    check_config({field: None}, Path(CONFIG_NAME))
    for kind, value in WRONG.items():
        if (field, kind) in RIGHT:
            continue
        with pytest.raises(SourceError) as raised:
            check_config({field: value, "unknown": value}, Path(CONFIG_NAME))
        assert str(raised.value).startswith(f"{CONFIG_NAME}: {field}") and len(str(raised.value)) < 400, kind


@pytest.mark.parametrize(
    "tile",
    [[0, 0], ["a", "b"], [None, None], [1e999, 1], [128], [1, 2, 3], [[128], [128]], {"a": 1}, [True, True], "x"],
)
def test_tiles_are_two_positive_sizes(tmp_path: Path, tile: Any) -> None:
    directory = write(tmp_path, {"model_type": "llama", "quantization_config": {"weight_block_size": tile}})
    with pytest.raises(SourceError, match=r"config\.json: quantization_config\.weight_block_size"):
        Checkpoint.open(directory)


EDITS: list[Callable[[dict[str, Any]], object]] = [
    lambda group: group["weights"].update(block_structure=[0, 128], strategy="block"),
    lambda group: group["weights"].update(block_structure=["a", "b"], strategy="block"),
    lambda group: group["weights"].update(num_bits=[4]),
    lambda group: group["weights"].update(group_size={}),
    lambda group: group.update(format=[1]),
    lambda group: group.update(targets={"a": 1}),
    lambda group: group.update(targets=[["a"]]),
]


@pytest.mark.parametrize("edit", EDITS)
def test_arguments_of_a_config_group_have_types(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    group: dict[str, Any] = {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}
    edit(group)
    config = {"model_type": "llama", "quantization_config": {"config_groups": {"g": group}}}
    with pytest.raises(SourceError, match=r"config_groups\.g\."):
        Checkpoint.open(write(tmp_path, config))
    assert level_verdicts(verify_structure(tmp_path))["structure"] == "FAIL"


def test_all_problems_of_a_config_come_at_once_and_unknown_fields_stay() -> None:
    with pytest.raises(SourceError) as raised:
        check_config({"hidden_size": "a", "vocab_size": -1, "time_step_limit": [0.0, float("inf")]}, Path(CONFIG_NAME))
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    "blocks", [{"num_hidden_layers": 10_000}, {"num_nextn_predict_layers": 1_000}, {"n_mtp_layers": 1_000}]
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_experts_that_a_config_promises_are_bounded(blocks: dict[str, int], nested: bool) -> None:
    """Their tensors are made from these numbers: of blocks, draft blocks, and of a language model inside."""
    many = blocks | {"num_experts": 10_000}
    with pytest.raises(SourceError, match=f"more than {MOST_EXPERTS:,} experts"):
        check_config({"text_config": many} if nested else many, Path(CONFIG_NAME))


@pytest.mark.parametrize("field", ["hidden_size", "engram_num_embeddings", "dspark_target_layer_ids"])
def test_a_nested_language_model_has_fields_of_the_same_types(field: str) -> None:
    with pytest.raises(SourceError, match=rf"text_config\.{field}"):
        check_config({"text_config": {field: -1}}, Path(CONFIG_NAME))


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME, "m.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_fifo_of_any_name_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    directory = write(tmp_path)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(SourceError, match=name):
        Checkpoint.open(directory)
    assert level_verdicts(verify_structure(directory))["structure"] == "FAIL"


@pytest.mark.parametrize("merges", [[["a", []]], [[[], "b"]], [[True, 3]], {"a": 1}, [None]])
def test_a_tokenizer_whose_merges_are_no_text_is_a_verdict(tmp_path: Path, merges: Any) -> None:
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}
    for name, content in (("a", tokenizer), ("b", {"model": {**tokenizer["model"], "merges": merges}})):
        write(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    check = tokenizer_check(tmp_path / "b", {"vocab_size": 2}, tmp_path / "a")
    assert check.verdict == "FAIL" and "tokenizer.json: another" in check.figure


@pytest.mark.parametrize("id", [2**32 - 1, 2**63, -1, "0", True])
def test_a_token_id_that_would_fill_the_memory_is_a_verdict(tmp_path: Path, id: Any) -> None:
    for name, number in (("a", 1), ("b", id)):
        write(tmp_path / name)
        tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": number}, "merges": []}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    for source in (None, tmp_path / "a"):
        check = tokenizer_check(tmp_path / "b", {}, source)
        assert check.verdict == "FAIL" and "has the id" in check.figure


@pytest.mark.parametrize("field", ["hidden_size", "hc_mult", "num_attention_heads", "head_dim", "num_key_value_heads"])
def test_a_field_that_is_null_is_an_absent_one_to_what_reckons_with_it(field: str) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "hc_mult": 1}
    absent = {key: value for key, value in config.items() if key != field}
    for reckon in (hidden_width, attention, lambda found: kv_cache_bytes(found, 64)):
        assert reckon({**config, field: None}) == reckon(absent)
