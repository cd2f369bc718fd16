"""Breaks a running server and looks at what clients, the launcher and the machine are left with.

As a command it tries every combination and writes a line of JSON for each: ``python tests/faults.py > faults.jsonl``.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import tiny
from rank_group import free_ports

# A mode is forced by a threshold that no step exceeds, or that every step does.
STEP = ["--max-num-batched-tokens", "16"]
SHIFT = ["--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel", *STEP, "--shift-parallel-threshold"]
SERVERS = {
    "stock": ["--tensor-parallel-size", "2", *STEP],
    "TP mode": [*SHIFT, "16"],
    "SP mode": [*SHIFT, "0"],
    # Prompts of all clients fit into a step of TP mode, a long prompt does not.
    "both modes": [*SHIFT, "14"],
}
VICTIMS = {"rank": "VLLM::Worker_TP1", "engine core": "VLLM::EngineCore", "API server": None}
MOMENTS = ("idle", "prefill", "decode")
# What rank 1 can do by itself (fault_plants.py), or by SIGSTOP.
PLANTS = ("raises", "out of memory", "sleeps", "stopped")
CLIENTS = 4
# Of vLLM, for one step; its default is 300.
STEP_TIMEOUT = 20


@dataclasses.dataclass
class Outcome:
    """What a kill led to; times are in seconds after it."""

    server: str
    victim: str
    moment: str
    ready_after: float = 0.0
    clients: list[str] = dataclasses.field(default_factory=list)
    clients_after: float = 0.0
    exit_code: int | None = None
    exit_after: float = 0.0
    cause: str = ""
    left: list[str] = dataclasses.field(default_factory=list)


class Client(threading.Thread):
    """One streaming request; ``outcome`` says how it ended, and ``chunks`` how much came."""

    def __init__(self, url: str, number: int, moment: str) -> None:
        super().__init__(daemon=True)
        length, most = (1000, 20) if moment == "prefill" else (3, 15_000)
        prompt = [3 + (number * 97 + i * 7) % 490 for i in range(length)]
        self._body = {"model": "tiny", "prompt": prompt, "max_tokens": most, "stream": True, "ignore_eos": True}
        self._url, self.chunks, self.outcome, self.ended = f"{url}/v1/completions", 0, "still waiting", 0.0

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
                self.outcome = "closed"
                reason = None
                for line in response.iter_lines():
                    reason = re.search(r'"finish_reason":"(\w+)"', line) or reason
                    self.chunks += line.startswith("data: {")
                    if '"error"' in line:
                        self.outcome = "error in the stream"
                    elif line == "data: [DONE]" and self.outcome == "closed":
                        self.outcome = f"finished ({reason[1] if reason else 'no reason'})"
                if response.status_code != 200:
                    self.outcome = f"status {response.status_code}"
        except httpx.HTTPError as error:
            self.outcome = type(error).__name__
        self.ended = time.monotonic()


class Victim:
    """A server in a session and a folder of its own; a context manager that leaves nothing behind."""

    def __init__(self, flags: list[str], model: Path, port: int, folder: Path, env: Any = None) -> None:
        self.url, self.folder = f"http://127.0.0.1:{port}", folder
        folder.mkdir()
        self.log = folder.with_suffix(".log")
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
        # Few chunks: sending every token keeps an API server so busy that the engine gets far ahead of it.
        command += ["--stream-interval", "20"]
        command += ["--hf-overrides", '{"max_position_embeddings": 16384}', "--max-model-len", "16384"]
        command += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(128 << 20), *flags]
        env = os.environ | {"TMPDIR": str(folder)} | (env or {})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)

    def __enter__(self) -> "Victim":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        self.process.kill()
        self.process.wait()

    def wait_until_ready(self, seconds: float = 500) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        lines = self.log.read_text().splitlines()
        shown = [line for line in lines if "ERROR" in line][:40] + lines[-20:]
        raise TimeoutError(f"exit code {self.process.poll()}:\n" + "\n".join(shown))

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def find(self, victim: str) -> psutil.Process:
        title = VICTIMS[victim]
        if title is None:
            return psutil.Process(self.process.pid)
        (found,) = [process for process in self.processes() if title in " ".join(process.cmdline())]
        return found

    def shared_memory(self) -> set[str]:
        """Names under /dev/shm that a process of the server has mapped or open."""
        names = set()
        for process in self.processes():
            text = Path(f"/proc/{process.pid}/maps").read_text()
            text += "".join(
                f"{os.readlink(fd)}\n" for fd in Path(f"/proc/{process.pid}/fd").iterdir() if fd.is_symlink()
            )
            names.update(re.findall(r"/dev/shm/[^\n]+", text))
        return {name for name in names if not name.endswith("(deleted)")}

    def modes(self) -> dict[str, float]:
        """Steps by mode; empty for stock vLLM."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [re.match(r'vllm:shift_steps_total.*mode="(\w+)"[^}]*} (.+)', line) for line in lines]
        return {match[1]: float(match[2]) for match in found if match}


def try_kill(server: str, victim: str, moment: str, model: Path, port: int, folder: Path) -> Outcome:
    """Start a server, kill -9 one of its processes at a moment, and report."""
    outcome = Outcome(server, victim, moment)
    begin = time.monotonic()
    with Victim(SERVERS[server], model, port, folder) as running:
        running.wait_until_ready()
        outcome.ready_after = time.monotonic() - begin
        warm_up(running)
        modes = running.modes()
        if server in ("TP mode", "SP mode"):
            other = "tp" if server == "SP mode" else "sp"
            assert modes[server[:2].lower()] > 0, modes
            assert modes[other] == 0, modes
        memory, target = running.shared_memory(), running.find(victim)
        clients = [] if moment == "idle" else start_clients(running, moment)
        if moment == "prefill":
            time.sleep(0.3)
            assert not any(client.chunks for client in clients), "the prefill was over"
        target.send_signal(signal.SIGKILL)
        look_at_the_end(outcome, running, clients, memory)
    return outcome


def try_plant(server: str, plant: str, model: Path, port: int, folder: Path) -> Outcome:
    """Start a server and let rank 1 fail in the middle of the model while clients stream."""
    outcome = Outcome(server, f"rank 1 {plant}", "decode")
    begin = time.monotonic()
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(STEP_TIMEOUT)}
    env |= {"PYTHONPATH": str(Path(__file__).parent)}
    flags = [*SERVERS[server], "--worker-extension-cls", "fault_plants.Plant"]
    with Victim(flags, model, port, folder, env) as running:
        running.wait_until_ready()
        outcome.ready_after = time.monotonic() - begin
        warm_up(running)
        memory = running.shared_memory()

        def fail() -> None:
            if plant == "stopped":
                running.find("rank").send_signal(signal.SIGSTOP)
                return
            body = {"method": "plant", "kwargs": {"what": plant, "rank": 1}}
            httpx.post(f"{running.url}/collective_rpc", json=body, timeout=60).raise_for_status()

        if server == "both modes":
            # Decoding goes on in TP mode, until a long prompt comes.
            fail()
            clients = start_clients(running, "decode")
            clients.append(Client(running.url, CLIENTS, "prefill"))
            clients[-1].start()
        else:
            clients = start_clients(running, "decode")
            fail()
        look_at_the_end(outcome, running, clients, memory)
    return outcome


def warm_up(running: Victim) -> None:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
    httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).raise_for_status()


def start_clients(running: Victim, moment: str) -> list[Client]:
    clients = [Client(running.url, i, moment) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    end = time.monotonic() + 60
    while moment == "decode" and not all(client.chunks > 2 for client in clients):
        assert time.monotonic() < end, [(client.chunks, client.outcome) for client in clients]
        time.sleep(0.01)
    return clients


def look_at_the_end(outcome: Outcome, running: Victim, clients: list[Client], memory: set[str]) -> None:
    """From the fault on: how clients, launcher and processes end, and what is left of the files in ``memory``."""
    fault = time.monotonic()
    try:
        outcome.exit_code = running.process.wait(90)
    except subprocess.TimeoutExpired:
        outcome.left.append("the launcher is still running")
    outcome.exit_after = time.monotonic() - fault
    for client in clients:
        client.join(max(0.0, fault + 90 - time.monotonic()))
    counts = Counter(client.outcome for client in clients)
    outcome.clients = [f"{count} x {name}" for name, count in sorted(counts.items())]
    outcome.clients_after = max((client.ended - fault for client in clients), default=0.0)
    # A process whose parent is gone takes a moment to notice.
    while running.processes() and time.monotonic() < fault + max(30, outcome.exit_after + 5):
        time.sleep(0.2)
    gone_after = time.monotonic() - fault
    if gone_after > outcome.exit_after + 1:
        outcome.left.append(f"processes until {gone_after:.0f} s")
    outcome.left += [f"process {' '.join(process.cmdline())[:60]}" for process in running.processes()]
    outcome.left += sorted(name for name in memory if Path(name).exists())
    outcome.left += sorted(f"TMPDIR/{path.name}" for path in running.folder.rglob("*") if not path.is_dir())
    log = running.log.read_text().splitlines()
    ours = [line for line in log if re.search(r"A step in .P mode|Shift Parallelism: the API server", line)]
    lines = ours + [line for line in log if re.search(r"ERROR|died|dead", line)]
    outcome.cause = " | ".join(re.sub(r"^.*?\] ", "", line)[:250] for line in (ours[:2] or lines[:1]))


def main() -> None:
    """Every combination, each on the port of the one before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--victims", nargs="*", default=list(VICTIMS), choices=VICTIMS)
    parser.add_argument("--moments", nargs="+", default=list(MOMENTS), choices=MOMENTS)
    parser.add_argument("--plants", nargs="*", default=list(PLANTS), choices=PLANTS)
    args = parser.parse_args()
    port = free_ports(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny.make_checkpoint("llama", folder)
        kills = [(s, v, m) for m in args.moments for v in args.victims for s in args.servers if s != "both modes"]
        plants = [
            (s, p) for p in args.plants for s in args.servers if s != "TP mode" and (s, p) != ("both modes", "stopped")
        ]
        cases: list[Any] = [partial(try_plant, *case) for case in plants] + [partial(try_kill, *case) for case in kills]
        for number, case in enumerate(cases):
            outcome = case(model, port, folder / f"server{number}")
            sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    import conftest  # noqa: F401  (the environment of the CPU backend)

    main()
