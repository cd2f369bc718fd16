"""What the log says of a step that does not end, before vLLM gives it up: its mode, its size and the layer it is in.

A rank that waits in a collective for one that never comes raises nothing, and vLLM's own time-out names neither.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vllm.logger import init_logger

from vllm_shift.failure import layer_of
from vllm_shift.timing import CudaDevice

logger = init_logger(f"vllm.{__name__}")


@dataclass
class _Step:
    began: float
    thread: int
    description: str
    has_returned: bool = False
    looked_at: bool = False


class StuckStepWatch:
    """A thread that logs, once a step, that the step has not ended.

    Args:
        rank: of this process.
        device: makes what says whether the device is busy, which it may be when the call of a step has returned; called
            where the steps are. None on the CPU, where it cannot be.
        limit: seconds after which vLLM gives a step up; a step is reported after four fifths of them.
    """

    def __init__(self, rank: int, device: Callable[[], CudaDevice] | None, limit: float) -> None:
        self._rank, self._make_device, self._limit = rank, device, limit
        self._device: CudaDevice | None = None
        self._step: _Step | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="StuckStepWatch", daemon=True).start()

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """Watch the step, or the part of it, that runs inside, until its end on the device or until the next one."""
        if self._device is None and self._make_device is not None:
            self._device = self._make_device()
        step = self._step = _Step(time.monotonic(), threading.get_ident(), description)
        try:
            yield
        except BaseException:
            self._step = None
            raise
        step.has_returned = True

    def device_ends_within(self, seconds: float) -> bool:
        """Whether the device comes to the end of its work in so many seconds.

        True, too, where nothing can be said: before the first step and on a broken device.
        """
        if self._device is None:
            return True
        end = time.monotonic() + seconds
        with suppress(RuntimeError):
            while not self._device.is_idle():
                if time.monotonic() > end:
                    return False
                time.sleep(0.01)
        return True

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        after = self._limit * 0.8
        while not self._closed.wait(self._limit / 50):
            step = self._step
            if step is None or step.looked_at or time.monotonic() - step.began < after:
                continue
            step.looked_at = True
            if step.has_returned and self.device_ends_within(self._limit / 50):
                continue
            if step is self._step:  # else the device may be busy with the next one
                self._report(step, after)

    def _report(self, step: _Step, seconds: float) -> None:
        where = "on the device, after the call that launched it"
        if not step.has_returned and (frame := sys._current_frames().get(step.thread)):
            innermost, layer = frame.f_code.co_qualname, layer_of(frame)
            while layer is None and (frame := frame.f_back):
                layer = layer_of(frame)
            where = f"in {layer or 'no layer of the model'} ({innermost})"
        logger.error(
            "Rank %d: %s has not ended after %g s; it is %s. A rank that waits in a collective waits for another one. "
            "vLLM gives up after %g s (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS).",
            self._rank,
            step.description,
            seconds,
            where,
            self._limit,
        )
