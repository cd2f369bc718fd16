"""Servers with the same GPUs under the same traffic, one at a time: stock vLLM, vllm-shift and Arctic Inference.

Every contender is a server of its own; every workload is a trace, sent as ``vllm-shift replay`` does. Results are kept
in a folder, one file a contender and workload, so a second run of the same command does only what is missing, and what
failed. Then a table (Markdown), a plot and a summary (JSON) are made of everything in the folder.

With --together N, N servers start at the same time and then take each workload in turns, the others idle: that saves
most of the time, and what slows the machine down for a while slows all of them. They share the GPUs' memory, so each
needs to be told its part (--kv-cache-memory-bytes, --gpu-memory-utilization), and neither KV cache nor start-up time
is compared. With --rounds R each takes each workload R times, and the table has the medians.

Example: python benchmarks/compare.py --shape 8b --folder compare-8b
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import SHAPES, write_config

from vllm_shift_cli.replay.client import Outcome
from vllm_shift_cli.replay.generate import bursty, generate
from vllm_shift_cli.replay.report import latencies, make_report
from vllm_shift_cli.replay.run import Options, replay
from vllm_shift_cli.replay.trace import TraceRequest

FIRST_PORT = 8123


@dataclass(frozen=True)
class Contender:
    """A server to start: its flags, and the environment that goes with them."""

    flags: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def contenders(gpus: int, tp: int) -> dict[str, Contender]:
    """What is compared on ``gpus`` GPUs: TP over all, replicas of TP=``tp`` each, SP over groups of TP=``tp``."""
    stock, ours = {"VLLM_PLUGINS": ""}, {"VLLM_PLUGINS": "shift_parallel"}
    arctic = {"VLLM_PLUGINS": "arctic_inference", "ARCTIC_INFERENCE_ENABLED": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    part, parts = ("--tensor-parallel-size", str(tp)), str(gpus // tp)
    ulysses = (*part, "--ulysses-sequence-parallel-size", parts)
    shift = (*ulysses, "--enable-shift-parallel", "--shift-parallel-threshold")
    return {
        "stock TP": Contender(("--tensor-parallel-size", str(gpus)), stock),
        "stock DP": Contender((*part, "--data-parallel-size", parts), stock),
        "shift 256": Contender((*shift, "256"), ours),
        "shift auto": Contender((*shift, "auto"), ours),
        # As many tokens a step and rank as with data parallelism, where vLLM's default is 8192 an engine.
        "shift wide": Contender((*shift, "256", "--max-num-batched-tokens", str(8192 * gpus // tp)), ours),
        "shift V1": Contender((*shift, "256"), ours | {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
        "ulysses": Contender(ulysses, ours),
        "arctic": Contender((*shift, "256"), arctic),
    }


@dataclass(frozen=True)
class Figure:
    """One number of the table.

    Attributes:
        name: of the row.
        workload: whose report it is read from.
        read: from a report, in ``unit``.
        unit: of the number.
        higher_is_better: whether it is a rate.
    """

    name: str
    workload: str
    read: Callable[[dict[str, Any]], float]
    unit: str
    higher_is_better: bool = False


@dataclass(frozen=True)
class Workload:
    """Requests to send; ``in_turn``: each when the one before is answered, whatever the arrival times."""

    trace: list[TraceRequest]
    in_turn: bool = False


def workloads(scale: float, load: float, burst_s: float) -> dict[str, Workload]:
    """Workloads by name.

    Args:
        scale: below 1 makes prompts, answers and numbers of requests smaller, to try it.
        load: factor on how many requests are sent for throughput, and how many a second in the bursts.
        burst_s: seconds of traffic with bursts, one every 10.
    """

    def size(count: float) -> int:
        return max(1, round(count * scale))

    def in_turn(prompt: int, output: int) -> Workload:
        return Workload([TraceRequest(0.0, size(prompt), size(output))] * 4, in_turn=True)

    def at_once(count: int, prompt: int, output: int) -> Workload:
        return Workload([TraceRequest(0.0, size(prompt), size(output))] * count)

    prompts, answers = (size(256), size(4096)), (size(32), size(256))
    bursts = generate(bursty(2 * load, 40 * load, 10, 3), 40 * load, burst_s, prompts, answers, seed=0)
    return {
        "one 1k": in_turn(1000, 64),
        "one 8k": in_turn(8000, 64),
        "one 32k": in_turn(32000, 64),
        # Short prompts and long answers, so that prefills of other requests count for little.
        "batch 1": in_turn(16, 256),
        "batch 16": at_once(16, 16, 512),
        "batch 64": at_once(64, 16, 512),
        "2k/128": at_once(size(300 * load), 2000, 128),
        "8k/64": at_once(size(75 * load), 8000, 64),
        "bursts": Workload(bursts),
    }


def _latency(name: str, percent: str) -> Callable[[dict[str, Any]], float]:
    return lambda report: 1e3 * report["summary"]["latencies"][name][percent]


def _median_but_first(name: str) -> Callable[[dict[str, Any]], float]:
    # The first request of a length may load kernels.
    return lambda report: 1e3 * statistics.median(latencies(report, name)[1:])


def _tokens_per_s(report: dict[str, Any]) -> float:
    return float(report["summary"]["prompt_tokens_per_s"] + report["summary"]["output_tokens_per_s"])


FIGURES = (
    *(
        Figure(f"{what}, {size} prompt", f"one {size}", _median_but_first(key), "ms")
        for size in ("1k", "8k", "32k")
        for what, key in (("TTFT", "ttft"), ("completion", "completion"))
    ),
    *(Figure(f"TPOT, batch {batch}", f"batch {batch}", _latency("tpot", "p50"), "ms") for batch in (1, 16, 64)),
    *(Figure(f"throughput {load}", load, _tokens_per_s, "tokens/s", True) for load in ("2k/128", "8k/64")),
    *(
        Figure(f"{what} {percent}, bursts", "bursts", _latency(key, percent), "ms")
        for what, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("completion", "completion"))
        for percent in ("p50", "p99")
    ),
    Figure("KV cache", "server", lambda server: server["kv_tokens"], "tokens", True),
    Figure("start-up", "server", lambda server: server["start_s"], "s"),
)


class Server:
    """A contender that runs; a context manager, which starts it without waiting until it is up.

    Raises:
        RuntimeError: its port is in use, so another server would be measured in its place.
    """

    def __init__(self, contender: Contender, model: Path, flags: list[str], log: Path, port: int) -> None:
        self.url, self._port, self._log = f"http://127.0.0.1:{port}", port, log
        self._env = os.environ | contender.env
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
            "--load-format", "dummy", "--no-enable-prefix-caching", *contender.flags, *flags,
        ]  # fmt: skip

    def __enter__(self) -> "Server":
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError as error:
                raise RuntimeError(f"{self.url} is in use: stop what runs there first") from error
        self._begin = time.monotonic()
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.ask_to_end()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Whatever is left of it holds GPU memory that the next contender needs.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def ask_to_end(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self, patience_s: float) -> dict[str, Any]:
        """Wait until it is up; returns what there is to say of it.

        Raises:
            RuntimeError: it did not come up; holds the end of its log.
        """
        while (ended := self._process.poll() is not None) or not self._is_healthy():
            if ended or time.monotonic() - self._begin > patience_s:
                raise RuntimeError(f"the server did not start; {self._log} ends:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.5)
        # With data parallelism each replica says its own.
        found = re.findall(r"KV cache size: ([\d,]+) tokens", self._log.read_text())
        kv_tokens = sum(int(count.replace(",", "")) for count in found)
        return {"start_s": time.monotonic() - self._begin, "kv_tokens": kv_tokens, "command": self._command[1:]}

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def run_workload(workload: Workload, url: str, seed: int) -> dict[str, Any]:
    """The report of a replay; where requests are sent at once, after some of the same length to warm up.

    Raises:
        RuntimeError: a request failed.
    """
    trace = workload.trace
    batches = [[request] for request in trace] if workload.in_turn else [trace[:4], trace]
    outcomes: list[Outcome] = []
    for number, batch in enumerate(batches):
        # What was imported is so much that collecting garbage held answers up for 0.2 s.
        gc.collect()
        gc.freeze()
        result = asyncio.run(replay(batch, Options(url, seed=seed + number, timeout=900)))
        if workload.in_turn:
            result.outcomes = outcomes = [*outcomes, *result.outcomes]
        report = make_report(result, len(result.outcomes), {})
        if result.failed:
            raise RuntimeError(f"{result.failed} requests failed: {report['summary']['failures']}")
    return report


def folder_of(folder: Path, name: str) -> Path:
    """Where everything of a contender is kept."""
    return folder / name.replace(" ", "-")


def result_file(folder: Path, name: str, workload: str, turn: int = 0) -> Path:
    """Where the result of a contender's workload is kept, in a round of --rounds."""
    return folder_of(folder, name) / f"{workload.replace(' ', '-').replace('/', '-')}{f'-{turn}' if turn else ''}.json"


def run_contenders(args: argparse.Namespace, group: dict[str, Contender], model: Path) -> None:
    """Start these contenders at the same time, and run what is missing of their workloads, each in turns."""
    everything = workloads(args.scale, args.load, args.burst_seconds)
    turns = [(key, turn) for key in everything if key in (args.only or (key,)) for turn in range(args.rounds)]
    facts_too = [("server", 0)] if args.together == 1 else []
    missing = {
        name: [each for each in turns + facts_too if not result_file(args.folder, name, *each).exists()]
        for name in group
    }
    servers: dict[str, Server] = {}

    def give_up(name: str, error: RuntimeError) -> None:
        failed = folder_of(args.folder, name) / "failed.txt"
        failed.write_text(str(error))
        print(f"{name} failed, see {failed}", flush=True)
        servers.pop(name).stop()  # so that the others have the GPUs to themselves

    with contextlib.ExitStack() as stack:
        for port, (name, contender) in enumerate(group.items(), FIRST_PORT):
            if missing[name]:
                folder = folder_of(args.folder, name)
                folder.mkdir(exist_ok=True)
                (folder / "failed.txt").unlink(missing_ok=True)
                server = Server(contender, model, args.server_flags, folder / "server.log", port)
                servers[name] = stack.enter_context(server)
        # Before the stack waits for the end of one after the other.
        stack.callback(lambda: [server.ask_to_end() for server in servers.values()])
        for name, server in list(servers.items()):
            try:
                facts = server.wait(args.patience)
                if args.together == 1:
                    result_file(args.folder, name, "server").write_text(json.dumps(facts))
            except RuntimeError as error:
                give_up(name, error)
        for key, turn in turns:
            for name, server in list(servers.items()):
                if (key, turn) not in missing[name]:
                    continue
                try:
                    report = run_workload(everything[key], server.url, seed=100 * len(key) + 10 * turn)
                    result_file(args.folder, name, key, turn).write_text(json.dumps(report))
                    print(f"{name}: {key} done", flush=True)
                except RuntimeError as error:
                    give_up(name, error)


def collect(folder: Path, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """All figures that there are: by row, then by contender, one of each round."""
    found: dict[str, dict[str, list[float]]] = {}
    for figure in FIGURES:
        for name in names:
            files = (result_file(folder, name, figure.workload, turn) for turn in itertools.count())
            rounds = [figure.read(json.loads(path.read_text())) for path in itertools.takewhile(Path.exists, files)]
            if rounds:
                found.setdefault(figure.name, {})[name] = rounds
    return found


def medians(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Of the rounds."""
    return {row: {name: statistics.median(rounds) for name, rounds in cells.items()} for row, cells in found.items()}


def relative(figure: Figure, value: float, values: dict[str, float]) -> float:
    """How much of the best contender's result this one reaches; 1 for the best."""
    return value / max(values.values()) if figure.higher_is_better else min(values.values()) / value


def table(found: dict[str, dict[str, float]], names: list[str]) -> str:
    """All figures as Markdown; in brackets the share of the best contender's result."""
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for figure in FIGURES:
        if (values := found.get(figure.name)) is None:
            continue
        cells = [
            f"{values[name]:,.4g} ({relative(figure, values[name], values):.2f})" if name in values else ""
            for name in names
        ]
        lines.append(f"| {figure.name}, {figure.unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, float]], names: list[str], path: Path) -> None:
    """Shares of the best contender's result, a row a figure."""
    from matplotlib.figure import Figure as Canvas

    rows = [figure for figure in FIGURES if figure.name in found]
    canvas = Canvas(figsize=(9, 0.32 * len(rows) + 1.6), layout="constrained")
    axes = canvas.subplots()
    axes.axvline(1, color="0.6", linewidth=1)
    for name, marker in zip(names, "os^DvPX*", strict=False):
        points = [
            (relative(figure, found[figure.name][name], found[figure.name]), row)
            for row, figure in enumerate(rows)
            if name in found[figure.name]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, markersize=6, label=name, alpha=0.8)
    axes.set_yticks(range(len(rows)), [figure.name for figure in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", color="0.9")
    axes.set_xlabel("share of the best contender's result (right is better)")
    axes.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, columnspacing=1)
    canvas.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1, help="TP degree of a replica, and of SP mode")
    parser.add_argument("--folder", type=Path, required=True, help="of the results")
    parser.add_argument("--contenders", nargs="+", choices=contenders(1, 1), help="only these, in this order")
    parser.add_argument("--only", nargs="+", choices=workloads(1, 1, 1), help="only these workloads")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: smaller workloads, to try it")
    parser.add_argument("--load", type=float, default=1.0, help="factor on requests; smaller for larger models")
    parser.add_argument("--burst-seconds", type=float, default=40, help="length of the traffic with bursts")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="servers that start at the same time")
    parser.add_argument("--rounds", type=int, default=1, help="times that each server takes each workload")
    parser.add_argument("--patience", type=float, default=600, help="seconds that a server may take to start")
    parser.add_argument("server_flags", nargs="*", help="more flags for every server, after --")
    args = parser.parse_args()
    # Where a time limit ends this command, its servers have to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.gpus % args.tp:
        parser.error(f"{args.gpus} GPUs cannot be divided into groups of {args.tp}")
    args.folder.mkdir(parents=True, exist_ok=True)
    everyone = contenders(args.gpus, args.tp)
    chosen = {name: everyone[name] for name in args.contenders or everyone}
    model = write_config(SHAPES[args.shape], args.folder, tokenizer=True)
    names = list(chosen)
    for first in range(0, len(names), args.together):
        run_contenders(args, {name: chosen[name] for name in names[first : first + args.together]}, model)
    found = collect(args.folder, list(chosen))
    (args.folder / "figures.json").write_text(json.dumps(found, indent=1))
    shown = medians(found)
    (args.folder / "table.md").write_text(text := table(shown, list(chosen)) + "\n")
    plot(shown, list(chosen), args.folder / "plot.png")
    print(text)


if __name__ == "__main__":
    main()
