"""Activations between blocks: in host memory up to a limit, beyond it in one scratch file per batch."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from llmcompressor.pipelines.cache import IntermediatesCache, IntermediateValue

from recipes.errors import EnvironmentProblem


class ActivationCache(IntermediatesCache):  # type: ignore[misc]
    """llm-compressor's cache of a batch's named values, with a budget.

    A batch that would pass `limit` bytes of host memory is written to `directory` and read back for each use. The files
    are scratch: they are removed when the context ends.
    """

    def __init__(self, device: torch.device, directory: Path, limit: int | None = None) -> None:
        super().__init__([], torch.device("cpu"))
        self.device, self.limit = device, limit
        self._directory = directory
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._bytes: list[int] = []
        self._files: dict[int, Path] = {}

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.batch_intermediates.clear()
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def held_bytes(self) -> int:
        """Bytes of tensors in host memory."""
        return sum(self._bytes)

    @property
    def spilled(self) -> list[Path]:
        """The scratch files there are now."""
        return list(self._files.values())

    def add(self, values: dict[str, Any]) -> None:
        """Appends a batch; its tensors come back on `device`."""
        self.batch_intermediates.append({})
        self._bytes.append(0)
        host, device = self.offload_device, self.device
        offloaded = {name: self._offload_value(value, host, device) for name, value in values.items()}
        self._keep(len(self) - 1, offloaded)

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
        values: dict[str, IntermediateValue] = torch.load(path, weights_only=False)
        return values

    def _keep(self, index: int, values: dict[str, IntermediateValue]) -> None:
        self.batch_intermediates[index], self._bytes[index] = {}, 0
        size = _nbytes(values)
        if self.limit is not None and self.held_bytes + size > self.limit:
            self._spill(index, values)
            return
        path = self._files.pop(index, None)
        if path is not None:
            path.unlink()
        self.batch_intermediates[index], self._bytes[index] = values, size

    def _spill(self, index: int, values: dict[str, IntermediateValue]) -> None:
        try:
            if self._scratch is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._scratch = tempfile.TemporaryDirectory(prefix="activations-", dir=self._directory)
            path = Path(self._scratch.name) / f"batch-{index:06d}.pt"
            torch.save(values, path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise EnvironmentProblem(
                f"{self._directory}: activations of batch {index} cannot be written: {error}; give offload.directory "
                "more space, raise offload.max_host_memory, or use fewer samples"
            ) from None
        self._files[index] = path


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
