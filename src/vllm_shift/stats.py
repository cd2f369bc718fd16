"""What is counted of the steps in each mode, and the periodic line that the first worker logs."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

import numpy as np
from numpy.typing import NDArray
from vllm import envs
from vllm.logger import init_logger

from vllm_shift.timing import Mark

logger = init_logger(f"vllm.{__name__}")

MODES = ("tp", "sp")

# Upper bounds of the buckets of step times, in seconds; one bucket more takes what is above.
BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)

_MODE = np.dtype([("steps", "i8"), ("tokens", "i8"), ("seconds", "f8"), ("buckets", "i8", (len(BUCKETS) + 1,))])

# One record holds everything, so that it can lie in memory that another process reads (see metrics.py).
COUNTS = np.dtype([("started", "i8"), ("max_tp_tokens", "i8"), ("mode_changes", "i8"), ("modes", _MODE, (2,))])


class StepCounter:
    """Counts steps, tokens and mode changes, and sorts step times into buckets.

    Args:
        mark: makes a mark of time.
        counts: the ``COUNTS`` record, shape [1], that ``/metrics`` reads. With it steps are timed, and logged every
            ``VLLM_LOG_STATS_INTERVAL`` seconds (vLLM's own, default 10) in which some ran; without, only counted.
    """

    def __init__(self, mark: Callable[[], Mark], counts: NDArray[np.void] | None = None) -> None:
        self._counts = np.zeros(1, COUNTS) if counts is None else counts
        self._modes = self._counts["modes"][0]
        # Views, because every step counts.
        self._steps, self._tokens = self._modes["steps"], self._modes["tokens"]
        self._mark = None if counts is None else mark
        self._timer: Timer | None = None
        self.start(0)
        self._log = False  # the stock worker runs steps to warm up

    def start(self, max_tp_tokens: int) -> None:
        """Count from zero, with this threshold in force: the largest number of tokens of a step in TP mode."""
        self._counts[:] = np.zeros(1, COUNTS)
        self._counts["max_tp_tokens"], self._counts["started"] = max_tp_tokens, 1
        self._last_mode: int | None = None
        self._timed: deque[tuple[int, Mark, Mark]] = deque()
        self._logged = self._counts.copy()
        self._log = self._mark is not None

    @contextmanager
    def step(self, in_sp: bool, num_tokens: int) -> Iterator[None]:
        """Count the step of ``num_tokens`` scheduled tokens that runs inside, and time it."""
        mode = int(in_sp)
        self._steps[mode] += 1
        self._tokens[mode] += num_tokens
        if self._last_mode not in (None, mode):
            self._counts["mode_changes"] += 1
        self._last_mode = mode
        if self._log and self._timer is None:
            self._timer = Timer(envs.VLLM_LOG_STATS_INTERVAL, self._write)
            self._timer.daemon = True
            self._timer.start()
        if self._mark is None:
            yield
            return
        start = self._mark()
        yield
        self._timed.append((mode, start, self._mark()))
        self._collect_times()

    def _collect_times(self) -> None:
        # In order, and as far as the device has come: with asynchronous scheduling it is a step or two behind.
        while self._timed:
            mode, start, end = self._timed[0]
            if not end.has_passed():
                return
            self._timed.popleft()
            seconds = end.seconds_since(start)
            self._modes["seconds"][mode] += seconds
            self._modes["buckets"][mode, bisect_left(BUCKETS, seconds)] += 1

    def totals(self) -> dict[str, int]:
        """Since the start: ``tp_steps``, ``tp_tokens``, ``sp_steps``, ``sp_tokens`` and ``mode_changes``."""
        found = {
            f"{mode}_{name}": int(self._modes[name][i]) for i, mode in enumerate(MODES) for name in ("steps", "tokens")
        }
        return found | {"mode_changes": int(self._counts["mode_changes"][0])}

    def close(self) -> None:
        """Stop logging."""
        self._log = False
        if self._timer is not None:
            self._timer.cancel()

    def _write(self) -> None:
        self._timer = None  # first, so that a step counted from here on starts the next one
        now, before = self._counts.copy(), self._logged
        self._logged = now
        parts = [_describe(name, now["modes"][0][i], before["modes"][0][i]) for i, name in enumerate(MODES)]
        logger.info(
            "Shift Parallelism: %s, %s, %d mode changes; threshold %d tokens; since start TP %d, SP %d steps.",
            *parts,
            now["mode_changes"][0] - before["mode_changes"][0],
            now["max_tp_tokens"][0],
            *now["modes"][0]["steps"],
        )


def _describe(name: str, now: np.void, before: np.void) -> str:
    steps, tokens = now["steps"] - before["steps"], now["tokens"] - before["tokens"]
    timed = now["buckets"].sum() - before["buckets"].sum()
    each = f", {(now['seconds'] - before['seconds']) / timed * 1000:.1f} ms each" if timed else ""
    return f"{name.upper()} mode {steps} steps ({tokens} tokens{each})"
