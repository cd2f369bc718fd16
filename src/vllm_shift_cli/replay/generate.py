"""Traces made up: requests that arrive at random, at a rate that is steady, comes in bursts, or follows a day.

All are Poisson processes: at every moment requests arrive independently of each other, at the rate of that moment.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vllm_shift_cli.replay.trace import TraceRequest

Times = NDArray[np.float64]
Rate = Callable[[Times], Times]


def steady(rate: float) -> Rate:
    """Always ``rate`` requests a second."""
    return lambda times: np.full_like(times, rate)


def bursty(rate: float, peak: float, period: float, burst: float) -> Rate:
    """``rate`` requests a second, and ``peak`` in the last ``burst`` seconds of every ``period`` seconds."""
    return lambda times: np.where(times % period >= period - burst, peak, rate)


def diurnal(rate: float, peak: float, period: float) -> Rate:
    """A wave between ``rate`` at the start and ``peak`` requests a second after half of ``period`` seconds."""
    return lambda times: rate + (peak - rate) * (1 - np.cos(2 * np.pi * times / period)) / 2


def generate(
    rate: Rate, most: float, duration: float, prompt: tuple[int, int], output: tuple[int, int], seed: int
) -> list[TraceRequest]:
    """Draw a trace.

    Args:
        rate: requests a second at given times.
        most: the largest that ``rate`` becomes.
        duration: of the trace, in seconds.
        prompt: least and largest number of prompt tokens; all between are equally likely.
        output: the same for the tokens of answers.
        seed: the same seed gives the same trace.
    """
    random = np.random.default_rng(seed)
    # By thinning: arrivals at the largest rate, of which each is kept with the share that the rate of its time has.
    times = np.sort(random.uniform(0, duration, random.poisson(most * duration)))
    times = times[random.uniform(0, most, len(times)) < rate(times)]
    prompts = random.integers(*prompt, len(times), endpoint=True)
    outputs = random.integers(*output, len(times), endpoint=True)
    return [TraceRequest(*row) for row in zip(times.tolist(), prompts.tolist(), outputs.tolist(), strict=True)]
