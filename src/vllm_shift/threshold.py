"""The threshold that finds itself: from step times in both modes to a number of tokens, and a cache of those times.

A small step is faster in TP mode, a large one in SP mode, and the ratio of the two falls as steps grow. Attention does
not matter for it: every rank attends to the same tokens with the same heads in both modes.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import envs
from vllm.config.utils import hash_factors
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_shift.graphs import fit_to_graphs

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class StepTimes:
    """How long a step takes.

    Attributes:
        tokens: tokens of the step.
        tp_ms: milliseconds in TP mode.
        sp_ms: milliseconds in SP mode.
    """

    tokens: int
    tp_ms: float
    sp_ms: float


def candidates(most: int) -> list[int]:
    """Numbers of tokens to try: 1, powers of two from 16, and ``most``, the largest step of the engine.

    None above 16,384, where a trial takes seconds, and the modes differ as they do there.
    """
    most = min(most, 16_384)
    powers = [2**power for power in range(4, most.bit_length())]
    return sorted({1, *powers, most})


def decided(times: list[StepTimes]) -> bool:
    """Whether larger steps need no trial: SP mode was faster by 5 % twice in a row."""
    return len(times) > 1 and all(step.sp_ms < 0.95 * step.tp_ms for step in times[-2:])


def find_threshold(times: list[StepTimes], most: int, sizes: list[int]) -> int:
    """Largest number of tokens that should still run in TP mode.

    Args:
        times: measured, ascending in tokens.
        most: the largest step of the engine, in tokens.
        sizes: CUDA graph sizes, ascending. Up to the last of them steps are padded to a size, so the threshold is one.

    Returns:
        0 when SP mode is always faster, ``most`` when TP mode is.
    """
    tokens = np.log2([step.tokens for step in times])
    # Above 0 TP mode is faster. Noise apart it only falls with the number of tokens.
    advantage = _falling(np.log([step.sp_ms / step.tp_ms for step in times]))
    if advantage[0] <= 0:
        return 0
    if advantage[-1] > 0:
        return most
    after = int(np.argmax(advantage <= 0))
    before = after - 1
    part = advantage[before] / (advantage[before] - advantage[after])
    crossing = int(2 ** (tokens[before] + part * (tokens[after] - tokens[before])))
    return fit_to_graphs(crossing, sizes)


def _falling(values: Any) -> Any:
    """The non-increasing sequence nearest to ``values`` in least squares, by pooling adjacent violators."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([float(value)])
        while len(pools) > 1 and np.mean(pools[-2]) < np.mean(pools[-1]):
            violator = pools.pop()
            pools[-1] += violator
    return np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])


class TimesCache:
    """Step times of an engine like this one, kept on disk under ``VLLM_CACHE_ROOT``.

    Args:
        vllm_config: the engine's config; its hash covers the model, its shapes, dtype and layout, and the code of this
            package (``code_hash``).
        exchange: how SP mode exchanges, see ``ModeSwitch``: through peers, and early.
    """

    def __init__(self, vllm_config: Any, exchange: tuple[bool, bool]) -> None:
        scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
        self._key = {
            "config": vllm_config.compute_hash(),
            "tokens": scheduler.max_num_batched_tokens,
            "graphs": [str(compilation.cudagraph_mode), compilation.max_cudagraph_capture_size],
            "device": current_platform.get_device_name(),
            "exchange": list(exchange),
            # As for vLLM's compile cache; it holds what chooses kernels and all-reduces, too.
            "environment": hash_factors(envs.compile_factors()),
            "version": torch.__version__,
        }
        name = hashlib.sha256(json.dumps(self._key).encode()).hexdigest()[:16]
        self._path = Path(envs.VLLM_CACHE_ROOT) / "shift_parallel" / f"{name}.json"

    def load(self) -> list[StepTimes] | None:
        """What ``save`` kept; None when there is nothing, or it cannot be read."""
        try:
            found = json.loads(self._path.read_text())
            if found["key"] == self._key:
                return [StepTimes(**step) for step in found["times"]] or None
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The step times in %s cannot be read (%r): measuring again.", self._path, error)
        return None

    def save(self, times: list[StepTimes]) -> None:
        """Keep step times for the next start; a disk that does not take them is no reason to fail."""
        text = json.dumps({"key": self._key, "times": [vars(step) for step in times]}, indent=1)
        partial = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.replace(self._path)
        except OSError as error:
            logger.warning("The step times cannot be kept in %s: %s", self._path, error)
