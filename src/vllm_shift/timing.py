"""Two points of a step and the time between them, and whether the device is busy, found without waiting for it."""

import time
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in the work of a rank: the one that it has reached when this is made."""

    def has_passed(self) -> bool:
        """Whether the device has come so far; asks, and does not wait."""

    def seconds_since(self, start: Any) -> float:
        """Seconds from an earlier mark of the same kind to this one; only for marks that have passed."""


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


class CudaDevice:
    """The current stream of a GPU, of the thread that makes this."""

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()

    def is_idle(self) -> bool:
        """Whether all work on it is done; asks, in any thread, and does not wait.

        Raises:
            RuntimeError: the GPU has failed.
        """
        # Without this, CUDA gives a thread without a device a context on the first GPU, with memory of its own.
        with torch.cuda.device(self._stream.device):
            return bool(self._stream.query())
