"""Soak: mixed traffic on a real server for a long time; memory, step times and answers must stay as they were.

As a command: ``python tests/soak.py --minutes 60 --output soak.json``. The verdict is logged; the exit code is 1 where
something grew, slowed down or failed.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import tiny
from faults import Victim
from prometheus_client.parser import text_string_to_metric_families
from rank_group import free_ports
from storm import PROMPTS

logger = logging.getLogger("soak")

FLAGS = [
    "--tensor-parallel-size", "1", "--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel",
    "--shift-parallel-threshold", "32", "--max-num-batched-tokens", "128", "--block-size", "16",
    # A KV cache of 64 blocks: full soon, so that blocks are evicted and requests preempted all the time.
    "--num-gpu-blocks-override", "64", "--max-model-len", "512",
]  # fmt: skip

NAMES = ("API server", "EngineCore", "Worker_TP0", "Worker_TP1", "resource_tracker")

# Set before the first run. Memory: the last quarter's median over the second's, for each process.
MOST_GROWTH = 1.02
# Step times: the same, for each mode; generous, because what else runs on the host changes them as well.
MOST_SLOWER = 1.25


@dataclass
class Traffic:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    answers: dict[tuple[int, int], str] = field(default_factory=dict)

    def check(self, key: tuple[int, int] | None, text: str) -> None:
        """Greedy answers to the same prompt have to be the same, whatever else is in the batch."""
        self.counts["completed"] += 1
        if key is None:
            return
        if self.answers.setdefault(key, text) != text:
            self.failures.append(f"prompt {key}: {text!r}, before {self.answers[key]!r}")
        self.counts["compared"] += 1


async def ask(http: httpx.AsyncClient, traffic: Traffic, draw: random.Random) -> None:
    """One request of a random kind: known prompt or fresh one, streamed or not, left early or not."""
    known = draw.random() < 0.4
    number, most = draw.randrange(len(PROMPTS)), draw.choice((1, 4, 12, 24))
    prompt = PROMPTS[number] if known else [draw.randrange(3, 500) for _ in range(draw.randint(1, 200))]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": most, "ignore_eos": True}
    # No "seed": with a chunked prompt it ends the engine of vLLM's CPU backend (see docs/reliability.md).
    body |= {"temperature": 0} if known else {"temperature": 1.0, "top_p": 0.9}
    leaves = draw.random() < 0.15
    if leaves:
        body |= {"max_tokens": 200}
    traffic.counts["sent"] += 1
    try:
        if leaves or draw.random() < 0.5:
            await stream(http, traffic, body | {"stream": True}, draw.randint(0, 8) if leaves else None,
                         (number, most) if known else None)  # fmt: skip
            return
        response = await http.post("/v1/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        assert answer["usage"]["completion_tokens"] == most, answer["usage"]
        traffic.check((number, most) if known else None, answer["choices"][0]["text"])
    except (httpx.HTTPError, AssertionError, LookupError, ValueError) as error:
        traffic.failures.append(f"{type(error).__name__}: {error}")


async def stream(
    http: httpx.AsyncClient, traffic: Traffic, body: dict[str, Any], leave_after: int | None, key: Any
) -> None:
    """A streamed request; with ``leave_after`` the client is gone after so many chunks."""
    text, reason, chunks = "", None, 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if leave_after is not None and chunks >= leave_after:
                traffic.counts["left early"] += 1
                return
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            chunks += 1
            text += event["choices"][0]["text"]
            reason = event["choices"][0]["finish_reason"] or reason
    assert reason == "length", f"finish_reason {reason}"
    traffic.check(key, text)


async def send(url: str, seconds: float, rate: float, traffic: Traffic) -> None:
    """Requests at random moments; every minute ends with five seconds at six times the rate."""
    draw = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http, asyncio.TaskGroup() as group:
        begin = time.monotonic()
        while (now := time.monotonic() - begin) < seconds:
            group.create_task(ask(http, traffic, draw))
            await asyncio.sleep(draw.expovariate(rate * (6 if now % 60 > 55 else 1)))


def look(server: Victim) -> dict[str, Any]:
    """Memory, open files and threads of every process, and what the server has counted."""
    processes = {}
    for process in server.processes():
        with process.oneshot():
            memory = process.memory_full_info()
            title = "API server" if process.pid == server.process.pid else " ".join(process.cmdline())
            name = next((part for part in NAMES if part in title), title[:40])
            processes[name] = {
                "uss": memory.uss, "rss": memory.rss, "files": process.num_fds(), "threads": process.num_threads(),
            }  # fmt: skip
    found = {"processes": processes, "load": os.getloadavg()[0], "shm": len(list(Path("/dev/shm").iterdir()))}
    names = {
        "vllm:shift_step_time_seconds_sum": "seconds", "vllm:shift_tokens_total": "tokens",
        "vllm:shift_steps_total": "steps", "vllm:shift_mode_changes_total": "changes",
        "vllm:num_preemptions_total": "preemptions", "vllm:prefix_cache_hits_total": "hits",
    }  # fmt: skip
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=60).text):
        for sample in family.samples:
            if sample.name in names:
                found[f"{sample.labels.get('mode', '')} {names[sample.name]}".strip()] = sample.value
    return found


def verdict(samples: list[dict[str, Any]], traffic: Traffic) -> tuple[dict[str, Any], list[str]]:
    """The figures by quarter, and what is wrong."""
    quarters = [list(part) for part in np.array_split(np.array(samples, dtype=object), 4)]
    wrong = [f"failed: {failure}" for failure in traffic.failures]
    report: dict[str, Any] = {"requests": dict(traffic.counts), "failed": len(traffic.failures)}
    report["load average, by quarter"] = [round(median(s["load"] for s in quarter), 1) for quarter in quarters]
    names = set(samples[0]["processes"])
    if any(set(sample["processes"]) != names for sample in samples):
        wrong.append("the processes have changed")
        return report, wrong
    hours = [sample["time"] / 3600 for sample in samples]
    after = len(samples) // 4
    for name in sorted(names):
        for what in ("uss", "rss", "files", "threads"):
            # Connections of running requests are files, too: the least of a quarter is what stays open without them.
            middle = min if what == "files" else median
            values = [middle(s["processes"][name][what] for s in quarter) for quarter in quarters]
            shown = [round(value / 2**20, 2) if what in ("uss", "rss") else value for value in values]
            report[f"{name}, {what}, by quarter"] = shown
            if values[3] > values[1] * MOST_GROWTH:
                wrong.append(f"{name}: {what} went from {shown[1]} to {shown[3]}")
        uss = [sample["processes"][name]["uss"] / 2**20 for sample in samples]
        report[f"{name}, MiB an hour after the first quarter"] = round(np.polyfit(hours[after:], uss[after:], 1)[0], 2)
    report["names in /dev/shm, by quarter"] = [median(s["shm"] for s in quarter) for quarter in quarters]
    for mode in ("tp", "sp"):
        for per in ("step", "token"):
            times = []
            for quarter in quarters:
                new = [(b[f"{mode} seconds"] - a[f"{mode} seconds"], b[f"{mode} {per}s"] - a[f"{mode} {per}s"])
                       for a, b in pairwise(quarter)]  # fmt: skip
                times.append(median(seconds / count for seconds, count in new if count))
            report[f"{mode} mode, ms a {per}, by quarter"] = [round(seconds * 1000, 3) for seconds in times]
            if times[3] > times[1] * MOST_SLOWER:
                wrong.append(f"{mode} mode: {times[1] * 1000:.3f} ms a {per} became {times[3] * 1000:.3f}")
    for what in ("tp steps", "sp steps", "changes", "preemptions", "hits"):
        report[what] = samples[-1][what] - samples[0][what]
    return report, wrong


async def soak(server: Victim, seconds: float, rate: float) -> tuple[list[dict[str, Any]], Traffic]:
    traffic, samples, begin = Traffic(), [], time.monotonic()
    sending = asyncio.create_task(send(server.url, seconds, rate, traffic))
    while not sending.done():
        samples.append(await asyncio.to_thread(look, server) | {"time": time.monotonic() - begin})
        if len(samples) % 30 == 0:
            logger.info("%.0f s: %s, %d failed", samples[-1]["time"], dict(traffic.counts), len(traffic.failures))
        await asyncio.wait([sending], timeout=10)
    await sending
    return samples, traffic


def main() -> None:
    """Run, write the samples and the report, and say whether everything stayed as it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second, six times that in bursts")
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        model = tiny.make_checkpoint("llama", Path(name))
        with Victim(FLAGS, model, free_ports(1), Path(name) / "server") as server:
            server.wait_until_ready()
            try:
                samples, traffic = asyncio.run(soak(server, args.minutes * 60, args.rate))
            except BaseException:
                lines = [line for line in server.log.read_text().splitlines() if "ERROR" in line]
                logger.error("the errors in the server's log begin with:\n%s", "\n".join(lines[:60]))
                raise
    args.output.write_text(json.dumps({"samples": samples, "failures": traffic.failures}))
    report, wrong = verdict(samples, traffic)
    args.output.write_text(json.dumps({"report": report, "wrong": wrong, "samples": samples}))
    for name, value in report.items():
        logger.info("%s: %s", name, value)
    for line in wrong:
        logger.error("%s", line)
    logger.info("verdict: %s", "not the same at the end" if wrong else "as at the beginning")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    import conftest  # noqa: F401  (the environment of the CPU backend)

    main()
