"""A checkpoint directory: config, index and the headers of every shard, checked together before any tensor is read."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from calibration.checkpoint.files import MissingFile, is_directory, is_file, open_regular, read_json_object
from calibration.checkpoint.header import TensorHeader, name_problem, read_header, shown_name
from calibration.checkpoint.source_config import check_config
from recipes.errors import SourceError, first_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
#: The longest honest ones list every module that is not quantized.
MAX_CONFIG_BYTES = 16 << 20


class Checkpoint:
    """A safetensors checkpoint in hub form, opened for reading.

    `tensors` maps every tensor name to its header, `shards` lists the file names in the order of the index, and
    `config` is the parsed config.json; the fields of it that are read have the types that `source_config` says. Nothing is
    ever written; handles are kept open until `close`.
    """

    def __init__(self, directory: Path, config: dict[str, Any], tensors: dict[str, TensorHeader], shards: list[str]):
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self.shards = shards
        self._handles: dict[str, Any] = {}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Opens `directory` from its headers alone. Raises SourceError with every problem at once: no such
        directory, no config.json, an index that names absent files or a path outside the directory, damaged or
        truncated shards, tensors that index and shards do not agree on.
        """
        directory = Path(directory)
        if not is_directory(directory):
            raise SourceError(f"{directory}: no such checkpoint directory; check source.checkpoint in the recipe")
        # transformers reads NaN and Infinity too, and some configs (Mamba's time_step_limit) have them.
        config = read_json_object(directory / CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES, constants=True)
        check_config(config, directory / CONFIG_NAME)
        _refuse_special_files(directory)
        promised, shards = _weight_map(directory)
        problems: list[str] = []
        tensors: dict[str, TensorHeader] = {}
        for shard in shards:
            try:
                headers = read_header(directory / shard)
            except SourceError as error:
                problems += error.problems
                continue
            for name, header in headers.items():
                if name in tensors:
                    problems.append(f"{directory}: {name} stands both in {tensors[name].shard} and in {shard}")
                tensors[name] = header
            if promised is not None:
                problems += _disagreements(directory, shard, headers, promised[shard])
        if problems:
            raise SourceError(first_of(problems))
        return cls(directory, config, tensors, shards)

    def path(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self.directory / self.tensors[name].shard

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, on the CPU, in the file's memory map: not to be written to. Raises SourceError where
        the file vanished or does not open."""
        shard = self.tensors[name].shard
        try:
            if shard not in self._handles:
                self._handles[shard] = safe_open(self.directory / shard, framework="pt")
            tensor: torch.Tensor = self._handles[shard].get_tensor(name)
        except Exception as error:  # safetensors raises its own, OSError and RuntimeError alike
            raise SourceError(
                f"{self.directory / shard}: {name} cannot be read: {error}; is the source whole?"
            ) from None
        return tensor

    def read_bytes(self, name: str) -> bytes:
        """The stored bytes of tensor `name`, unchanged. Raises SourceError."""
        header = self.tensors[name]
        with open_regular(self.path(name)) as file:
            data = os.pread(file.fileno(), header.nbytes, header.begin)
            while len(data) < header.nbytes:
                more = os.pread(file.fileno(), header.nbytes - len(data), header.begin + len(data))
                if not more:
                    raise SourceError(f"{self.path(name)}: {name}: the file ends early; it changed while it was read")
                data += more
        return data

    def close(self) -> None:
        self._handles.clear()

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _refuse_special_files(directory: Path) -> None:
    """Raises SourceError for a FIFO, a device or a socket beside the shards: a library that reads the tokenizer or a copy of
    the side files would wait for it for ever."""
    problems = list[str]()
    try:
        with os.scandir(directory) as entries:
            for path in (Path(entry.path) for entry in entries if not entry.is_file() and not entry.is_dir()):
                try:
                    open_regular(path, "remove it").close()
                except MissingFile:  # a link to nothing
                    continue
                except SourceError as error:
                    problems += error.problems
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read: {error.strerror}; check the permissions") from None
    if problems:
        raise SourceError(first_of(problems))


def _weight_map(directory: Path) -> tuple[dict[str, set[str]] | None, list[str]]:
    """Shard -> the tensors that the index promises in it, None without an index; and the shards."""
    index_path = directory / INDEX_NAME
    if not os.path.lexists(index_path):
        if os.path.lexists(directory / SINGLE_NAME):
            return None, [SINGLE_NAME]
        raise SourceError(f"{directory}: holds neither {INDEX_NAME} nor {SINGLE_NAME}; is it a safetensors checkpoint?")
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index_path}: weight_map is missing or empty; download the index again")
    promised: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        problem = name_problem(name)
        if problem is None and not isinstance(shard, str):
            problem = f"weight_map places it in {shard!r:.80}: a file name is needed"
        if problem is not None:
            raise SourceError(f"{index_path}: {shown_name(name)}: {problem}; download the index again")
        promised.setdefault(shard, set()).add(name)
    problems = []
    for shard, names in promised.items():
        if not _is_file_name(shard):
            problems.append(
                f"{index_path}: weight_map names {shard!r:.300}: only plain file names beside the index are allowed"
            )
        elif not is_file(directory / shard):
            problems.append(
                f"{directory / shard}: missing shard: {len(names)} tensors of the index lie in it; download it"
            )
    if problems:
        raise SourceError(first_of(problems))
    return promised, list(promised)


def _is_file_name(text: str) -> bool:
    return text not in ("", ".", "..") and "/" not in text and text.isprintable() and len(os.fsencode(text)) <= 255


def _disagreements(directory: Path, shard: str, found: Collection[str], promised: set[str]) -> list[str]:
    problems = []
    for kind, names in (
        ("the index promises {} in it, its header does not have it", sorted(promised - set(found))),
        ("its header has {}, the index does not place it there", sorted(set(found) - promised)),
    ):
        if names:
            more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
            problems.append(f"{directory / shard}: " + kind.format(", ".join(names[:3]) + more))
    return problems
