"""Opens a checkpoint directory: checks config, index and the headers of every shard together, before any tensor is
read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from calibration.checkpoint.collector import collector_paused
from calibration.checkpoint.files import MissingFile, is_directory, is_file, open_regular, read_json_object
from calibration.checkpoint.header import DTYPE_BYTES, TensorHeader, name_problem, read_header, shown_name
from calibration.checkpoint.source_config import check_config
from recipes.errors import SourceError, first_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
#: torch's dtype for every dtype of a header, by safetensors' spelling.
TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
#: The beginning and largest size of a git-lfs pointer (git-lfs, docs/spec.md), and the files to check.
_LFS_HEAD, _LFS_BYTES = b"version https://git-lfs.github.com/spec/", 1024
_LFS_SUFFIXES = frozenset({".safetensors", ".json", ".model", ".jinja", ".txt", ".tiktoken"})
#: The longest legitimate ones list every module that is not quantized.
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Undone:
    """What becomes of codes if they are dequantized: the tensor's `name` and `shape`, and the stored tensor with the
    `scales`."""

    name: str
    shape: tuple[int, ...]
    scales: str


@dataclass(frozen=True, slots=True)
class Whole:
    """A stored tensor that `Checkpoint.tensors` has in `parts`; `undone`, if it holds codes."""

    header: TensorHeader
    parts: tuple[str, ...]
    undone: Undone | None = None

    def renamed(self, names: Mapping[str, str]) -> Whole:
        """The same tensor with other names of itself, its parts and what becomes of it."""
        undone = self.undone
        if undone is not None:
            undone = replace(undone, name=names[undone.name], scales=names[undone.scales])
        header = replace(self.header, name=names[self.header.name])
        return Whole(header, tuple(names[part] for part in self.parts), undone)


class Checkpoint:
    """A safetensors checkpoint in hub form, opened for reading.

    `tensors` maps every tensor name to its header, `shards` lists the file names in the order of the index, and
    `config` is the parsed config.json, whose fields have the types that `source_config` requires. `state` is the result
    of `shard_state` before the headers were read. Nothing is ever written, and no file is kept open or mapped.
    """

    #: Stored tensors that are in `tensors` only in parts (stacks of experts), by name; they can be read whole too.
    whole: Mapping[str, Whole] = MappingProxyType({})

    def __init__(
        self, directory: Path, config: dict[str, Any], tensors: dict[str, TensorHeader], shards: list[str],
        state: dict[str, list[int]] | None = None,
    ):  # fmt: skip
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self.shards = shards
        self.state = shard_state(directory, shards) if state is None else state

    @classmethod
    @collector_paused()
    def open(cls, directory: Path) -> Checkpoint:
        """Opens `directory`, reading only its headers. Raises SourceError with every problem at once: no such
        directory, git-lfs pointers instead of files, no config.json, an index that names absent files or a path outside
        the directory, damaged or truncated shards, tensors on which index and shards disagree.
        """
        directory = Path(directory)
        if not is_directory(directory):
            raise SourceError(
                f"{directory}: no such checkpoint directory; check the path (source.checkpoint, if a recipe names it)"
            )
        _refuse_special_files(directory)
        pointers = _lfs_pointers(directory)
        if pointers:
            raise SourceError(
                f"{directory}: {len(pointers)} files are git-lfs pointers, not the files themselves ({_some(pointers)}): run "
                f"`git lfs pull` in it, or download the checkpoint again"
            )
        # transformers also reads NaN and Infinity, and some configs (Mamba's time_step_limit) contain them.
        config = read_json_object(directory / CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES, constants=True)
        check_config(config, directory / CONFIG_NAME)
        promised, shards = _weight_map(directory)
        problems: list[str] = []
        tensors: dict[str, TensorHeader] = {}
        state: dict[str, list[int]] = {}
        for shard in shards:
            try:
                state |= shard_state(directory, [shard])
                headers = read_header(directory / shard)
            except SourceError as error:
                problems += error.problems
                continue
            for name, header in headers.items():
                if name in tensors:
                    problems.append(f"{directory}: {name} is both in {tensors[name].shard} and in {shard}")
                tensors[name] = header
            if promised is not None:
                problems += _disagreements(directory, shard, headers, promised[shard])
        if problems:
            raise SourceError(first_of(problems))
        return cls(directory, config, tensors, shards, state)

    def header(self, name: str) -> TensorHeader:
        """The header of a tensor, or of one that is `whole` on disk and in parts in `tensors`."""
        return self.whole[name].header if name in self.whole else self.tensors[name]

    def path(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self.directory / self.header(name).shard

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor as stored, on the CPU, in memory of its own or in `out` (contiguous, of the stored dtype and
        shape).

        The file is read, never mapped: if a process touches a map beyond the end of a truncated file, or the disk
        fails, the kernel kills it without a message. Raises SourceError if the file cannot be read, ends early or is
        not the one that was opened.
        """
        header = self.header(name)
        if out is None:
            out = torch.empty(header.shape, dtype=TORCH[header.dtype])
        if header.nbytes:
            self._fill(name, out.view(-1).view(torch.uint8).numpy().data)
        return out

    def read_bytes(self, name: str) -> bytearray:
        """The stored bytes of tensor `name`, unchanged. Raises SourceError as `read`."""
        data = bytearray(self.header(name).nbytes)
        self._fill(name, memoryview(data))
        return data

    def read_span(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """Bytes [begin, end) of tensor `name`, counted from its first one; a tensor with a layout is read as a whole for each
        call. Raises SourceError as `read`."""
        data = np.empty(end - begin, np.uint8)
        if self.header(name).layout is not None:
            data[:] = np.frombuffer(self.read_bytes(name), np.uint8)[begin:end]
        elif end > begin:
            self._fill(name, data.data, begin)
        return data

    def _fill(self, name: str, target: memoryview, offset: int = 0) -> None:
        layout = self.header(name).layout
        if layout is None:
            self._read_bytes(name, target, offset)
            return
        matrix = np.empty(self.header(name).end - self.header(name).begin, np.uint8)
        self._read_bytes(name, matrix.data)
        target[:] = layout.take(matrix, DTYPE_BYTES[self.header(name).dtype]).reshape(-1).data

    def _read_bytes(self, name: str, target: memoryview, offset: int = 0) -> None:
        """Reads the bytes from `offset` after the header's `begin` on."""
        header, path, got = self.header(name), self.path(name), 0
        begin = header.begin + offset
        with open_regular(path, f"{name} is in it; is the source whole?") as file:
            try:
                while got < len(target) and (count := os.preadv(file.fileno(), [target[got:]], begin + got)):
                    got += count
                state = _state(os.fstat(file.fileno()))
            except OSError as error:
                raise SourceError(f"{path}: {name} cannot be read: {error.strerror}; is the source whole?") from None
        if got < len(target) or state != self.state[header.shard]:
            how = "ends early" if got < len(target) else "is another file, or was written to"
            raise SourceError(
                f"{path}: {name}: the shard {how}: it changed since it was opened; bring the old file back and run the same "
                "command again"
            )

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _refuse_special_files(directory: Path) -> None:
    """Raises SourceError for a FIFO, a device or a socket beside the shards: a library that reads the tokenizer, or a
    copy of the side files, would wait for it forever."""
    problems = list[str]()
    try:
        with os.scandir(directory) as entries:
            for path in (Path(entry.path) for entry in entries if not entry.is_file() and not entry.is_dir()):
                try:
                    open_regular(path, "remove it").close()
                except MissingFile:  # a broken link
                    continue
                except SourceError as error:
                    problems += error.problems
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read: {error.strerror}; check the permissions") from None
    if problems:
        raise SourceError(first_of(problems))


def shard_state(directory: Path, shards: Iterable[str]) -> dict[str, list[int]]:
    """Shard -> [bytes, time of the last change in ns], to detect that a source changed during a run or between two. The
    inode is not included: a copy that keeps times (rsync -a, cp -p, a move to another disk) is the same source. Raises
    SourceError if a shard cannot be read."""
    state = {}
    for shard in shards:
        try:
            state[shard] = _state(os.stat(directory / shard))
        except (OSError, ValueError) as error:
            raise SourceError(f"{directory / shard}: cannot be read: {getattr(error, 'strerror', error)}") from None
    return state


def changed_shards(before: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> list[str]:
    """The shards of `now` whose state differs from `before`, each as `name (1,024 bytes -> 1,000 bytes, ...)`."""
    changed = []
    for shard, state in now.items():
        known = list(before.get(shard, ()))
        if known != list(state):
            old = dict(zip(("bytes", "mtime_ns"), known, strict=False))
            new = dict(zip(("bytes", "mtime_ns"), state, strict=True))
            parts = [f"{key} {old.get(key, 'unknown')} -> {new[key]}" for key in new if old.get(key) != new[key]]
            changed.append(f"{shard} ({', '.join(parts)})")
    return changed


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns]


def _lfs_pointers(directory: Path) -> list[str]:
    """The weight, JSON and tokenizer files that are git-lfs pointers of about 130 bytes, after `git clone` without
    git-lfs."""
    found = []
    for path in sorted(directory.iterdir()):
        if path.suffix in _LFS_SUFFIXES and is_file(path) and path.stat().st_size <= _LFS_BYTES:
            # Whatever needs an unreadable file reports it.
            with contextlib.suppress(SourceError), open_regular(path) as file:
                if file.read(len(_LFS_HEAD)) == _LFS_HEAD:
                    found.append(path.name)
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _weight_map(directory: Path) -> tuple[dict[str, set[str]] | None, list[str]]:
    """Shard -> the tensors that the index places in it (None if there is no index), and the list of shards."""
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
                f"{directory / shard}: missing shard: {len(names)} tensors of the index are in it; download it"
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
