"""Soak: mixed traffic on a real server for a long time; memory, step times and answers must stay as they were.

As a command: ``python tests/soak.py --minutes 60 --folder soak``. The verdict is logged; the exit code is 1 where
something grew, slowed down or failed. ``--cuda`` is for two GPUs, which nothing else should use.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import gpus
import httpx
import numpy as np
import tiny
from faults import CPU, CUDA, Victim
from ports import free_ports
from prometheus_client.parser import text_string_to_metric_families
from storm import PROMPTS

logger = logging.getLogger("soak")

FLAGS = [
    "--tensor-parallel-size", "1", "--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel",
    "--shift-parallel-threshold", "32", "--max-num-batched-tokens", "128", "--block-size", "16",
    # A KV cache of 64 blocks: full soon, so that blocks are evicted and requests preempted all the time.
    "--num-gpu-blocks-override", "64", "--max-model-len", "512",
]  # fmt: skip

# On GPUs: more requests at a time, so that CUDA graphs are captured for steps of both modes.
CUDA_FLAGS = ["--max-num-seqs", "32"]
# The largest difference of log-probabilities in fp16 at which rounding may decide between two tokens.
CUDA_TIE = 0.25

NAMES = ("API server", "EngineCore", "Worker_TP0", "Worker_TP1", "resource_tracker")

# Set before the first run. Memory: the last quarter's median over the second's, for each process.
MOST_GROWTH = 1.02
# Step times: the same, for each mode; generous, because what else runs on the host changes them as well.
MOST_SLOWER = 1.25


@dataclass
class Traffic:
    """What became of the requests.

    Attributes:
        tie: two tokens whose log-probabilities differ by no more may come in each other's place.
    """

    tie: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    answers: dict[tuple[int, int], list[str]] = field(default_factory=dict)

    def check(self, key: tuple[int, int] | None, tokens: list[str], likely: list[dict[str, float]]) -> None:
        """Greedy answers to the same prompt have to be the same, whatever else is in the batch.

        Args:
            key: prompt and length; None for an answer that is not compared.
            tokens: of the answer.
            likely: log-probabilities of the likeliest tokens in each place.
        """
        self.counts["completed"] += 1
        if key is None:
            return
        self.counts["compared"] += 1
        before = self.answers.setdefault(key, tokens)
        place = next((i for i, pair in enumerate(zip(before, tokens, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            return
        here = likely[place]
        if here[tokens[place]] - here.get(before[place], -np.inf) > self.tie:
            self.failures.append(f"prompt {key}: {tokens}, before {before}, likely {here}")
        else:
            self.counts["other token by rounding"] += 1


async def ask(http: httpx.AsyncClient, traffic: Traffic, draw: random.Random) -> None:
    """One request of a random kind: known prompt or fresh one, streamed or not, left early or not."""
    known = draw.random() < 0.4
    number, most = draw.randrange(len(PROMPTS)), draw.choice((1, 4, 12, 24))
    prompt = PROMPTS[number] if known else [draw.randrange(3, 500) for _ in range(draw.randint(1, 200))]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": most, "ignore_eos": True}
    if known:
        # Named by their ids, because texts of several tokens can be the same.
        body |= {"logprobs": 5, "return_tokens_as_token_ids": True}
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
        traffic.check((number, most) if known else None, *tokens_of(answer["choices"][0]))
    except (httpx.HTTPError, AssertionError, LookupError, ValueError) as error:
        traffic.failures.append(f"{type(error).__name__}: {error}")


def tokens_of(choice: dict[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
    """Tokens of a part of an answer and the likeliest ones in each place; none where they were not asked for."""
    found = choice.get("logprobs") or {}
    return found.get("tokens", []), found.get("top_logprobs", [])


async def stream(
    http: httpx.AsyncClient, traffic: Traffic, body: dict[str, Any], leave_after: int | None, key: Any
) -> None:
    """A streamed request; with ``leave_after`` the client is gone after so many chunks."""
    tokens: list[str] = []
    likely: list[dict[str, float]] = []
    reason, chunks = None, 0
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
            for part, new in zip((tokens, likely), tokens_of(event["choices"][0]), strict=True):
                part += new
            reason = event["choices"][0]["finish_reason"] or reason
    assert reason == "length", f"finish_reason {reason}"
    traffic.check(key, tokens, likely)


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
    """Memory, open files and threads of every process, and what the server has counted; MiB where it is of GPUs."""
    processes, on_gpus = {}, server.gpu_memory()
    for process in server.processes():
        with process.oneshot():
            memory = process.memory_full_info()
            title = "API server" if process.pid == server.process.pid else " ".join(process.cmdline())
            name = next((part for part in NAMES if part in title), title[:40])
            processes[name] = {
                "uss": memory.uss, "rss": memory.rss, "files": process.num_fds(), "threads": process.num_threads(),
                "gpu": on_gpus.get(process.pid, 0),
            }  # fmt: skip
    found = {
        "processes": processes,
        "gpus": gpus.used(),
        "load": os.getloadavg()[0],
        "shm": len(list(Path("/dev/shm").iterdir())),
    }
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
        for what in ("uss", "rss", "files", "threads", "gpu"):
            if what == "gpu" and not any(sample["processes"][name][what] for sample in samples):
                continue
            # Connections of running requests are files, too: the least of a quarter is what stays open without them.
            middle = min if what == "files" else median
            values = [middle(s["processes"][name][what] for s in quarter) for quarter in quarters]
            shown = [round(value / 2**20, 2) if what in ("uss", "rss") else value for value in values]
            report[f"{name}, {what}, by quarter"] = shown
            if values[3] > values[1] * MOST_GROWTH:
                wrong.append(f"{name}: {what} went from {shown[1]} to {shown[3]}")
        uss = [sample["processes"][name]["uss"] / 2**20 for sample in samples]
        report[f"{name}, MiB an hour after the first quarter"] = round(np.polyfit(hours[after:], uss[after:], 1)[0], 2)
    for number in range(len(samples[0]["gpus"])):
        values = [median(s["gpus"][number] for s in quarter) for quarter in quarters]
        report[f"GPU {number}, MiB in use, by quarter"] = values
        if values[3] > values[1] * MOST_GROWTH:
            wrong.append(f"GPU {number}: MiB in use went from {values[1]} to {values[3]}")
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


async def soak(server: Victim, seconds: float, rate: float, tie: float) -> tuple[list[dict[str, Any]], Traffic]:
    traffic, samples, begin = Traffic(tie), [], time.monotonic()
    sending = asyncio.create_task(send(server.url, seconds, rate, traffic))
    while not sending.done():
        samples.append(await asyncio.to_thread(look, server) | {"time": time.monotonic() - begin})
        if len(samples) % 30 == 0:
            logger.info("%.0f s: %s, %d failed", samples[-1]["time"], dict(traffic.counts), len(traffic.failures))
        await asyncio.wait([sending], timeout=10)
    await sending
    return samples, traffic


def table(report: dict[str, Any], wrong: list[str]) -> str:
    """The report in Markdown."""
    rows = [f"| {name} | {value} |" for name, value in report.items()]
    found = [f"- {line}" for line in wrong[:20]] or ["All as at the beginning."]
    return "\n".join(["| | |", "| --- | --- |", *rows, "", *found]) + "\n"


def main() -> None:
    """Run, write samples and report, and say whether everything stayed as it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second, six times that in bursts")
    parser.add_argument("--cuda", action="store_true", help="two GPUs, compiled models and CUDA graphs")
    parser.add_argument("--folder", type=Path, default=Path("soak"), help="for soak.json, soak.md and the server's log")
    parser.add_argument("server_flags", nargs="*", help="more flags for the server, after --")
    args = parser.parse_args()
    if not args.cuda:
        import conftest  # noqa: F401  (the environment of the CPU backend)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    device, tie = (CUDA, CUDA_TIE) if args.cuda else (CPU, 0.0)
    flags = [*FLAGS, *CUDA_FLAGS * args.cuda, *args.server_flags]
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        model = tiny.make_checkpoint("llama", Path(name), **device.sizes)
        with Victim(flags, model, free_ports(1), Path(name) / "server", device=device) as server:
            try:
                server.wait_until_ready()
                samples, traffic = asyncio.run(soak(server, args.minutes * 60, args.rate, tie))
            except BaseException:
                lines = [line for line in server.log.read_text().splitlines() if "ERROR" in line]
                logger.error("the errors in the server's log begin with:\n%s", "\n".join(lines[:60]))
                raise
            finally:
                shutil.copy(server.log, args.folder)
    results = {"samples": samples, "failures": traffic.failures}
    (args.folder / "soak.json").write_text(json.dumps(results))
    report, wrong = verdict(samples, traffic)
    (args.folder / "soak.json").write_text(json.dumps({"report": report, "wrong": wrong} | results))
    (args.folder / "soak.md").write_text(table(report, wrong))
    for name, value in report.items():
        logger.info("%s: %s", name, value)
    for line in wrong[:20]:
        logger.error("%s", line)
    logger.info("verdict: %s", "not the same at the end" if wrong else "as at the beginning")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
