"""The memory for the weights of one block, and the thread that fills it while the previous block is computed."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterable

import torch

#: Bytes. Tensors start at multiples of this, so that the experts' weights are adjacent in memory (see
#: stacked_experts.py).
_ALIGNMENT = 64


class WeightBuffer:
    """One contiguous allocation for the weights of a block, on the host or an accelerator. It is freed as a whole when
    its last tensor is dropped; separate tensors would leave holes, and memory would grow block by block."""

    def __init__(self, device: torch.device, tensors: Iterable[torch.Tensor]) -> None:
        size, self._used = max(sum(map(_aligned_bytes, tensors)), 1), 0
        self._memory = (
            _host_memory(size) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
        )

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """An uninitialized tensor of the shape and dtype of `like`; tensors taken one after the other are adjacent in
        memory."""
        begin, self._used = self._used, self._used + _aligned_bytes(like)
        # `data`, so that each tensor counts only the writes to itself (SourceModel.edited).
        return self._memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape).data


class Prefetch(threading.Thread):
    """Reads tensors before they are needed, on a stream of its own if the device has streams: on the compute stream
    every copy would wait for all queued work."""

    def __init__(self, device: torch.device, wanted: dict[str, Callable[[], torch.Tensor]]) -> None:
        super().__init__(name="next block's weights", daemon=True)
        self.stopped = False
        self._wanted = wanted
        self._values: dict[str, torch.Tensor] = {}
        self._device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        if self._stream is not None:
            # The weight buffer may be memory that queued work still reads.
            self._stream.wait_stream(torch.accelerator.current_stream(device))

    def run(self) -> None:
        """Reads the tensors; ends early if stopped or at the first tensor that cannot be read."""
        with torch.no_grad(), contextlib.suppress(Exception), self._stream or contextlib.nullcontext():
            for name, read in self._wanted.items():
                if self.stopped:
                    return
                self._values[name] = read()

    def take(self) -> dict[str, torch.Tensor]:
        """Waits for the thread to end; returns what it read, by name."""
        self.join()
        if self._stream is not None:
            computing = torch.accelerator.current_stream(self._device)
            computing.wait_stream(self._stream)
            for value in self._values.values():
                value.record_stream(computing)  # integers are outside the buffer, in memory of the other stream
        return self._values


def _host_memory(size: int) -> torch.Tensor:
    """`size` bytes, uint8. Private, because shared memory would not count as the process's own (RssAnon) and would look
    like mapped files."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a block is always larger than a huge page, and never shared
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _aligned_bytes(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
