"""Holds the activations between blocks, in host memory up to a limit or in one mapped file per batch, which the
system's page cache keeps as long as it can. A run that can resume also saves them at every block boundary."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, cast

import torch
from llmcompressor.pipelines.cache import IntermediatesCache, IntermediateValue

from calibration.checkpoint.files import PARTIAL, fsync_directory
from calibration.runs.resume import Boundary, batch_file
from recipes.errors import EnvironmentProblem


def _load(path: Path, mmap: bool) -> dict[str, IntermediateValue]:
    """The values of a batch. The file may come from elsewhere with its run directory, so only tensors and plain values
    are loaded and nothing in it is executed. Raises EnvironmentProblem if it cannot be read."""
    try:
        with torch.serialization.safe_globals([IntermediateValue]):
            values: dict[str, IntermediateValue] = torch.load(path, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        why = (
            "they hold more than tensors and plain values" if isinstance(error, pickle.UnpicklingError) else str(error)
        )
        raise EnvironmentProblem(
            f"{path}: saved activations cannot be read: {why.splitlines()[0]}; pass --restart, which calculates them again"
        ) from None
    return values


class ActivationCache(IntermediatesCache):  # type: ignore[misc]
    """llm-compressor's cache of the named values of each batch, with a memory limit and with boundaries.

    A batch that would exceed `limit` bytes of host memory is kept in a file below `directory`, mapped for each use: its
    pages belong to the page cache, from which the system reclaims them if memory is short. Without a `limit`, all
    batches are in files if `lasting`, else in host memory. `aim` names the boundary that the following values belong
    to. Each boundary has its own folder, so that the previous one stays complete until the next one is. With `lasting`,
    `directory` belongs to this run alone and committed boundaries survive an error; else everything is in a temporary
    folder inside it.
    """

    def __init__(self, device: torch.device, directory: Path, limit: int | None = None, lasting: bool = False) -> None:
        super().__init__([], torch.device("cpu"))
        self.device, self.limit, self.lasting = device, limit, lasting
        self._directory = directory
        self._root: Path | None = directory if lasting else None
        self._number, self._saving = 0, False
        #: Each batch's number in the run; other ranks hold the other numbers.
        self.numbers: list[int] = []
        self._bytes: list[int] = []
        self._files: dict[int, Path] = {}
        self._digests: dict[int, str] = {}

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.batch_intermediates.clear()
        if self._root is not None and not (self.lasting and kind):
            shutil.rmtree(self._root, ignore_errors=True)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors in host memory."""
        return sum(self._bytes)

    @property
    def spilled(self) -> list[Path]:
        """The files of the batches that are not in memory."""
        return list(self._files.values())

    def add(self, values: dict[str, Any], number: int | None = None) -> None:
        """Appends a batch, the `number`-th of the run; `fetch` returns its tensors on `device`."""
        self.numbers.append(len(self) if number is None else number)
        self.batch_intermediates.append({})
        self._bytes.append(0)
        host, device = self.offload_device, self.device
        offloaded = {name: self._offload_value(value, host, device) for name, value in values.items()}
        self._keep(len(self) - 1, offloaded)

    def aim(self, number: int, save: bool) -> None:
        """Sets the boundary that values kept from now on belong to; with `save` every batch is also written to its
        file, for `commit`."""
        self._number, self._saving = number, save and self.lasting
        self._digests.clear()

    def commit(self) -> Boundary | None:
        """Makes the current boundary durable: fsyncs and renames every file. None if it is not saved."""
        if not self._saving:
            return None
        folder, files = self._folder(), dict[str, str]()
        try:
            for index, digest in sorted(self._digests.items()):
                path = self._path(index)
                partial = path.with_name(path.name + PARTIAL)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.replace(path)
                files[path.name] = digest
                if index in self._files:
                    self._files[index] = path
            fsync_directory(folder)
            fsync_directory(folder.parent)
        except OSError as error:
            raise self._problem("activations", error) from None
        self._saving = False
        return Boundary(folder, files)

    def restore(self, boundary: Boundary) -> None:
        """Replaces the values of all batches by those of `boundary`, whose digests were checked."""
        empty: list[dict[str, IntermediateValue]] = [{} for _ in self.numbers]
        self.batch_intermediates = empty
        self._files = {}
        self._bytes = [0] * len(self.numbers)
        for index, number in enumerate(self.numbers):
            path = boundary.directory / batch_file(number)
            self._files[index] = path
            size = _nbytes(self._values(index))
            if self._fits(size):
                self.batch_intermediates[index], self._bytes[index] = _load(path, mmap=False), size
                del self._files[index]

    def forget(self, before: int) -> None:
        """Removes the folders of all boundaries with a number below `before`."""
        for folder in self._root.glob("boundary-*") if self._root is not None else ():
            number = folder.name.rpartition("-")[2]
            if number.isdecimal() and int(number) < before:
                shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, batch_index: int, input_names: Collection[str] | None = None) -> dict[str, Any]:
        """The values of a batch by name, on the device they came from."""
        values = self._values(batch_index)
        return {
            name: self._onload_value(value)
            for name, value in values.items()
            if input_names is None or name in input_names
        }

    def replace(self, batch_index: int, outputs: dict[str, Any], consumed: Collection[str]) -> None:
        """Adds a subgraph's outputs to a batch and drops the values that no later subgraph reads."""
        values = self._values(batch_index)
        values.update({name: self._offload_value(value, self.offload_device) for name, value in outputs.items()})
        self._keep(batch_index, {name: value for name, value in values.items() if name not in consumed})

    def _values(self, index: int) -> dict[str, IntermediateValue]:
        path = self._files.get(index)
        if path is None:
            return dict(self.batch_intermediates[index])
        # Mapped privately: a block that writes to its input writes to a copy, not to the file.
        return _load(path, mmap=True)

    def _keep(self, index: int, values: dict[str, IntermediateValue]) -> None:
        self.batch_intermediates[index], self._bytes[index] = {}, 0
        size = _nbytes(values)
        held = self._fits(size)
        path = self._write(index, values) if self._saving or not held else None
        self._files.pop(index, None)
        if held:
            self.batch_intermediates[index], self._bytes[index] = values, size
        elif path is not None:
            self._files[index] = path

    def _fits(self, size: int) -> bool:
        return not self.lasting if self.limit is None else self.held_bytes + size <= self.limit

    def _write(self, index: int, values: dict[str, IntermediateValue]) -> Path:
        path = self._path(index)
        if self._saving:
            path = path.with_name(path.name + PARTIAL)
        hashed = _Hashed()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as hashed.file:
                torch.save(values, cast(IO[bytes], hashed))
        except (OSError, RuntimeError) as error:  # torch.save raises its own error instead of the system's
            path.unlink(missing_ok=True)
            raise self._problem(f"activations of batch {self.numbers[index]}", hashed.error or error) from None
        self._digests[index] = hashed.digest.hexdigest()
        return path

    def _folder(self) -> Path:
        if self._root is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._root = Path(tempfile.mkdtemp(prefix="activations-", dir=self._directory))
        return self._root / f"boundary-{self._number:04d}"

    def _path(self, index: int) -> Path:
        return self._folder() / batch_file(self.numbers[index])

    def _problem(self, what: str, error: Exception) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"{self._directory}: {what} cannot be written: {error}; give offload.directory more space, or use "
            "fewer samples; the same command resumes after the last finished block"
        )


class _Hashed:
    """A file that computes the sha256 of everything written to it, without reading it back."""

    file: BinaryIO

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _nbytes(value: Any) -> int:
    storages: dict[int, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, IntermediateValue):
            visit(item.value)
        elif isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            for member in item.values():
                visit(member)
        elif isinstance(item, list | tuple):
            for member in item:
                visit(member)

    visit(value)
    return sum(storages.values())
