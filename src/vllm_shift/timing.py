"""Two points of a step and the time between them, found without waiting for the device."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in the work of a rank, made where it lies."""

    def has_passed(self) -> bool:
        """Whether the device has come so far; asks, and does not wait."""

    def seconds_since(self, start: Any) -> float:
        """Seconds from an earlier mark of the same kind to this one; only for marks that have passed."""

    def on_device(self) -> AbstractContextManager[Any]:
        """For a thread that has not chosen a device and asks for the time."""


class ClockMark:
    """Where the process is: right for the CPU backend, whose steps run in the process itself."""

    def __init__(self) -> None:
        self._now = time.perf_counter()

    def has_passed(self) -> bool:
        """Always."""
        return True

    def seconds_since(self, start: "ClockMark") -> float:
        """As ``Mark``."""
        return self._now - start._now

    def on_device(self) -> AbstractContextManager[Any]:
        """There is no other device."""
        return nullcontext()


class CudaMark:
    """Where the GPU is: a CUDA event on the current stream.

    With asynchronous scheduling a step starts in the process while the GPU is still busy with the one before, so that a
    clock read in the process would charge a step's time to another one, of the other mode perhaps.
    """

    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def has_passed(self) -> bool:
        """As ``Mark``."""
        return bool(self._event.query())

    def seconds_since(self, start: "CudaMark") -> float:
        """As ``Mark``."""
        return float(start._event.elapsed_time(self._event)) / 1000

    def on_device(self) -> AbstractContextManager[Any]:
        """Without this, CUDA gives such a thread a context on the first GPU, with memory of its own."""
        return torch.cuda.device(self._event.device)
