"""The mode of the server over time, from the metrics of vllm-shift on its ``/metrics`` page."""

import asyncio
from dataclasses import dataclass
from operator import add
from time import perf_counter

import aiohttp
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class ModeSample:
    """Counts since the server's start, summed over all engines behind the page.

    Attributes:
        time: seconds since the replay began.
        tp_steps, sp_steps: steps by mode.
        tp_tokens, sp_tokens: tokens in them.
        mode_changes: steps that ran in another mode than the step before.
        threshold: largest number of tokens of a step in TP mode; of several engines the largest.
    """

    time: float
    tp_steps: int
    sp_steps: int
    tp_tokens: int
    sp_tokens: int
    mode_changes: int
    threshold: int


class ModeSampler:
    """Reads the page again and again.

    Args:
        http: the session.
        url: of the server, without ``/metrics``.
        interval: seconds between two samples.

    Attributes:
        samples: what has been read.
        problems: how often reading failed, by reason.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str, interval: float) -> None:
        self._http, self._url, self._interval = http, f"{url}/metrics", interval
        self.samples: list[ModeSample] = []
        self.problems: dict[str, int] = {}

    async def run(self, began: float) -> None:
        """Take samples until cancelled; ``began`` is ``perf_counter()`` at the begin of the replay."""
        while True:
            await asyncio.sleep(self._interval)
            await self.sample(began)

    async def sample(self, began: float) -> None:
        """Take one sample."""
        try:
            async with self._http.get(self._url, timeout=aiohttp.ClientTimeout(total=10)) as response:
                response.raise_for_status()
                sample = parse(await response.text(), perf_counter() - began)
        except Exception as error:
            # Whatever is wrong with one page, the replay goes on and so does the sampling.
            problem = f"{self._url}: {type(error).__name__} {error}"
        else:
            if sample is not None:
                self.samples.append(sample)
                return
            problem = f"{self._url} has no vllm:shift_steps_total: the server runs without Shift Parallelism"
        self.problems[problem] = self.problems.get(problem, 0) + 1


def parse(page: str, time: float) -> ModeSample | None:
    """A sample from the text of the page; None when it lacks our metrics.

    Raises:
        ValueError: the page is damaged, or lacks some of our metrics.
        OverflowError: a number is infinite.
    """
    ours = [line for line in page.splitlines() if line.startswith("vllm:shift_") and "_bucket" not in line]
    found: dict[tuple[str, str | None], float] = {}
    for family in text_string_to_metric_families("\n".join(ours) + "\n"):
        for sample in family.samples:
            key = name, _ = sample.name.removeprefix("vllm:shift_"), sample.labels.get("mode")
            combine = max if name == "threshold_tokens" else add
            found[key] = combine(found[key], sample.value) if key in found else sample.value
    if ("steps_total", "tp") not in found:
        return None
    steps, tokens = "steps_total", "tokens_total"
    counts = ((steps, "tp"), (steps, "sp"), (tokens, "tp"), (tokens, "sp"))
    keys = (*counts, ("mode_changes_total", None), ("threshold_tokens", None))
    if missing := [" ".join(filter(None, key)) for key in keys if key not in found]:
        raise ValueError(f"the page lacks vllm:shift_ {', '.join(missing)}")
    return ModeSample(time, *(int(found[key]) for key in keys))
