"""Breaks a running server and looks at what clients, the launcher and the machine are left with.

As a command it tries every combination and writes a line of JSON for each: ``python tests/faults.py > faults.jsonl``.
With ``--folder`` it keeps a JSON file, a table and the servers' logs there. ``--cuda`` is for two GPUs, with compiled
models and CUDA graphs, and ``--jobs`` servers may run side by side.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gpus
import httpx
import psutil
import tiny
from ports import free_ports

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
# What rank 1 can do by itself (fault_plants.py), or by SIGSTOP; on a GPU, too, give it work without end.
PLANTS = ("raises", "raises in sampling", "out of memory", "sleeps", "stopped")
ONLY_CUDA = ("busy GPU",)
# Not in SP mode alone, so nothing goes on in TP mode.
IN_ANY_MODE = ("raises in sampling", "stopped")
CLIENTS = 4
# Of vLLM, for one step; its default is 300.
STEP_TIMEOUT = 20


@dataclasses.dataclass(frozen=True)
class Device:
    """What differs between CPU and GPUs.

    Attributes:
        flags: of every server.
        sizes: of the model, where they are not those of ``tiny.SHAPE``.
        prompt: tokens of a prompt whose prefill takes a second or so.
        patience: seconds that a server may take to start.
    """

    flags: tuple[str, ...]
    sizes: dict[str, Any]
    prompt: int
    patience: float


CPU = Device(("--dtype", "float32", "--enforce-eager"), {}, 4000, 500)
# Sizes whose logits are alike in fp16 in both modes. The share of memory is only what has to be free at the start.
CUDA = Device(
    ("--dtype", "float16", "--gpu-memory-utilization", "0.05"),
    {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 64,
        "initializer_range": 0.08,
    },
    15_000,
    270,
)  # fmt: skip


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
    port: int = 0
    # Of the server's processes while it ran, as nvidia-smi lists them; 0 also where it lists none.
    gpu_mib: int = 0
    error: str = ""

    def row(self) -> str:
        """Of the table."""
        files = sum(name.startswith("TMPDIR/") for name in self.left)
        left = [name for name in self.left if not name.startswith("TMPDIR/")] + [f"{files} files"] * bool(files)
        cells = [self.victim, self.moment, self.server, ", ".join(self.clients) or "-", f"{self.clients_after:.1f}"]
        cells += [f"exit {self.exit_code}", f"{self.exit_after:.1f}", ", ".join(left), f"{self.gpu_mib}"]
        cells += [f"{self.ready_after:.0f}", str(self.port), self.error[:400] or self.cause]
        return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


HEAD = (
    "| victim | moment | server | clients | after | launcher | after | left | GPU, MiB | start | port | log |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


class Client(threading.Thread):
    """One streaming request; ``outcome`` says how it ended, and ``chunks`` how much came."""

    def __init__(self, url: str, number: int, moment: str, long_prompt: int = CPU.prompt) -> None:
        super().__init__(daemon=True)
        length, most = (long_prompt, 20) if moment == "prefill" else (3, 15_000)
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

    def __init__(
        self, flags: list[str], model: Path, port: int, folder: Path, env: Any = None, device: Device = CPU
    ) -> None:
        self.url, self.folder, self.device = f"http://127.0.0.1:{port}", folder, device
        folder.mkdir()
        self.log, caches = folder.with_suffix(".log"), folder.with_name(f"caches{port}")
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "tiny", *device.flags]
        # Few chunks: sending every token keeps an API server so busy that the engine gets far ahead of it.
        command += ["--stream-interval", "20"]
        command += ["--hf-overrides", '{"max_position_embeddings": 16384}', "--max-model-len", "16384"]
        command += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(128 << 20), *flags]
        env = os.environ | {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | (env or {})
        if device is not CPU:
            # What compilers keep: not in TMPDIR, and not of servers side by side in the same place.
            kept = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
            env |= {variable: str(caches / name) for variable, name in kept.items()}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)

    def __enter__(self) -> "Victim":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        self.process.kill()
        self.process.wait()

    def wait_until_ready(self) -> None:
        end = time.monotonic() + self.device.patience
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
        name = VICTIMS[victim]
        if name is None:
            return psutil.Process(self.process.pid)
        (found,) = [process for process in self.processes() if name in title(process)]
        return found

    def shared_memory(self) -> set[str]:
        """Names under /dev/shm that a process of the server has mapped or open."""
        names = set()
        for process in self.processes():
            text = Path(f"/proc/{process.pid}/maps").read_text()
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed by now
                    text += f"{os.readlink(fd)}\n"
            names.update(re.findall(r"/dev/shm/[^\n]+", text))
        return {name for name in names if not name.endswith("(deleted)")}

    def gpu_memory(self) -> dict[int, int]:
        """MiB of each process of the server that nvidia-smi lists, by its pid."""
        pids, listed = {process.pid for process in self.processes()}, gpus.used_by_process()
        return {pid: mib for pid, mib in listed.items() if pid in pids}

    def modes(self) -> dict[str, float]:
        """Steps by mode; empty for stock vLLM."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [re.match(r'vllm:shift_steps_total.*mode="(\w+)"[^}]*} (.+)', line) for line in lines]
        return {match[1]: float(match[2]) for match in found if match}


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "that has just ended"


def try_kill(
    server: str,
    victim: str,
    moment: str,
    model: Path,
    port: int,
    folder: Path,
    device: Device = CPU,
    more: tuple[str, ...] = (),
) -> Outcome:
    """Start a server, kill -9 one of its processes at a moment, and report; ``more`` are flags of the server."""
    outcome = Outcome(server, victim, moment, port=port)
    begin = time.monotonic()
    with Victim([*SERVERS[server], *more], model, port, folder, device=device) as running:
        running.wait_until_ready()
        outcome.ready_after = time.monotonic() - begin
        warm_up(running)
        modes = running.modes()
        if server in ("TP mode", "SP mode"):
            other = "tp" if server == "SP mode" else "sp"
            assert modes[server[:2].lower()] > 0, modes
            assert modes[other] == 0, modes
        memory, target, on_gpus = running.shared_memory(), running.find(victim), running.gpu_memory()
        clients = [] if moment == "idle" else start_clients(running, moment)
        if moment == "prefill":
            # Stock vLLM does not say how many steps it has run.
            time.sleep(0 if modes else 0.3)
            end = time.monotonic() + 20
            while modes and running.modes() == modes:
                assert time.monotonic() < end, "no prefill"
                time.sleep(0.01)
            assert not all(client.chunks for client in clients), "all prefills were over"
        fault = time.monotonic()
        target.send_signal(signal.SIGKILL)
        look_at_the_end(outcome, fault, running, clients, memory, on_gpus)
    return outcome


def extensions() -> dict[str, str]:
    """Variables of a server that finds the worker extensions of this folder."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def try_plant(
    server: str,
    plant: str,
    model: Path,
    port: int,
    folder: Path,
    device: Device = CPU,
    more: tuple[str, ...] = (),
) -> Outcome:
    """Start a server and let rank 1 fail in the middle of the model while clients stream."""
    outcome = Outcome(server, f"rank 1 {plant}", "decode", port=port)
    begin = time.monotonic()
    env = extensions() | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(STEP_TIMEOUT)}
    # A compiled model would not call what is planted in a layer.
    flags = [*SERVERS[server], *more, "--enforce-eager", "--worker-extension-cls", "fault_plants.Plant"]
    with Victim(flags, model, port, folder, env, device) as running:
        running.wait_until_ready()
        outcome.ready_after = time.monotonic() - begin
        warm_up(running)
        memory, on_gpus = running.shared_memory(), running.gpu_memory()
        told = folder.with_suffix(".failed")

        def fail() -> None:
            if plant == "stopped":
                told.write_text(str(time.monotonic()))
                running.find("rank").send_signal(signal.SIGSTOP)
                return
            body = {"method": "plant", "kwargs": {"what": plant, "rank": 1, "told": str(told)}}
            httpx.post(f"{running.url}/collective_rpc", json=body, timeout=60).raise_for_status()

        if server == "both modes":
            # Decoding goes on in TP mode, until a long prompt comes.
            fail()
            clients = start_clients(running, "decode")
            clients.append(Client(running.url, CLIENTS, "prefill", device.prompt))
            clients[-1].start()
        else:
            clients = start_clients(running, "decode")
            fail()
        # An API server that is busy with streams takes a while to let the long prompt in.
        end = time.monotonic() + 60
        while not (told.exists() and told.read_text()):
            assert time.monotonic() < end, "nothing failed"
            time.sleep(0.01)
        look_at_the_end(outcome, float(told.read_text()), running, clients, memory, on_gpus)
    return outcome


def warm_up(running: Victim) -> None:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
    httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).raise_for_status()


def start_clients(running: Victim, moment: str) -> list[Client]:
    clients = [Client(running.url, i, moment, running.device.prompt) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    end = time.monotonic() + 60
    while moment == "decode" and not all(client.chunks > 2 for client in clients):
        assert time.monotonic() < end, [(client.chunks, client.outcome) for client in clients]
        time.sleep(0.01)
    return clients


def still_on_gpus(pids: dict[int, int]) -> list[int]:
    """Those that nvidia-smi still lists; the driver may take a moment longer than the process."""
    end = time.monotonic() + 5
    while (found := sorted(pids.keys() & gpus.used_by_process().keys())) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def look_at_the_end(
    outcome: Outcome,
    fault: float,
    running: Victim,
    clients: list[Client],
    memory: set[str],
    on_gpus: dict[int, int],
) -> None:
    """From the ``fault`` on: how clients, launcher and processes end; what is left of files and processes on GPUs."""
    outcome.gpu_mib = sum(on_gpus.values())
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
    outcome.left += [f"process {title(process)[:60]}" for process in running.processes()]
    outcome.left += [f"GPU memory of process {pid}" for pid in still_on_gpus(on_gpus)]
    outcome.left += sorted(name for name in memory if Path(name).exists())
    outcome.left += sorted(f"TMPDIR/{path.name}" for path in running.folder.rglob("*") if not path.is_dir())
    log = running.log.read_text().splitlines()
    ours = [
        line
        for line in log
        if re.search(r"A step in .P mode|Shift Parallelism: the API server|the device is still busy", line)
    ]
    lines = ours + [line for line in log if re.search(r"ERROR|died|dead", line)]
    outcome.cause = " | ".join(re.sub(r"^.*?\] ", "", line)[:250] for line in (ours[:2] or lines[:1]))


def run_all(cases: list[Callable[..., Outcome]], jobs: int, folder: Path) -> Any:
    """Outcomes as they come, of so many cases at a time; each server starts on the port of one that has just ended."""
    ports: SimpleQueue[int] = SimpleQueue()
    first = free_ports(jobs)
    for port in range(first, first + jobs):
        ports.put(port)

    def run(number: int, case: Callable[..., Outcome]) -> Outcome:
        port = ports.get()
        try:
            return case(port=port, folder=folder / f"server{number}")
        except Exception as error:  # the other cases go on
            return Outcome(*(*case.args, "decode")[:3], port=port, error=repr(error)[-2000:])
        finally:
            ports.put(port)

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(run, *numbered) for numbered in enumerate(cases)]):
            yield future.result()


def write(outcomes: list[Outcome], memory: list[list[int]], logs: Path, folder: Path) -> None:
    """What is known so far: ``faults.json``, ``faults.md`` and the servers' logs."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [dataclasses.asdict(outcome) for outcome in outcomes]
    (folder / "faults.json").write_text(json.dumps({"GPUs, MiB, before and after": memory, "cases": cases}, indent=1))
    (folder / "faults.md").write_text("\n".join([HEAD, *(outcome.row() for outcome in outcomes)]) + "\n")
    for log in logs.glob("*.log"):
        shutil.copy(log, folder)


def main() -> None:
    """Every combination, each on the port of one before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--victims", nargs="*", default=list(VICTIMS), choices=VICTIMS)
    parser.add_argument("--moments", nargs="+", default=list(MOMENTS), choices=MOMENTS)
    parser.add_argument("--plants", nargs="*", choices=(*PLANTS, *ONLY_CUDA), help="by default all that there are")
    parser.add_argument("--cuda", action="store_true", help="two GPUs, compiled models and CUDA graphs")
    parser.add_argument("--jobs", type=int, default=1, help="servers that run at the same time")
    parser.add_argument("--folder", type=Path, help="for faults.json, faults.md and the servers' logs")
    parser.add_argument("server_flags", nargs="*", help="more flags for every server, after --")
    args = parser.parse_args()
    if not args.cuda:
        import conftest  # noqa: F401  (the environment of the CPU backend)
    device = CUDA if args.cuda else CPU
    chosen = (*PLANTS, *ONLY_CUDA * args.cuda) if args.plants is None else args.plants
    memory = [gpus.used()]
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny.make_checkpoint("llama", folder, **device.sizes)
        kills = [(s, v, m) for m in args.moments for v in args.victims for s in args.servers if s != "both modes"]
        plants = [
            (s, p) for p in chosen for s in args.servers if s != "TP mode" and (s == "SP mode" or p not in IN_ANY_MODE)
        ]
        same = {"model": model, "device": device, "more": tuple(args.server_flags)}
        cases = [partial(try_plant, *case, **same) for case in plants] + [
            partial(try_kill, *case, **same) for case in kills
        ]
        for outcome in run_all(cases, args.jobs, folder):
            outcomes.append(outcome)
            sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            sys.stdout.flush()
            if args.folder:
                write(outcomes, memory, folder, args.folder)
        memory.append(gpus.used())
        if args.folder:
            write(outcomes, memory, folder, args.folder)
    if args.folder:
        sys.stderr.write((args.folder / "faults.md").read_text())
        sys.stderr.write(f"MiB in use on the GPUs, before and after: {memory}\n")


if __name__ == "__main__":
    main()
