"""A real server over HTTP, started by each of vLLM's two launch commands."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import http_fuzz
import httpx
import openai
import pytest
import tiny
import torch
import transformers
from prometheus_client.parser import text_string_to_metric_families
from vllm.utils.network_utils import get_open_port

from vllm_shift_cli.main import main as vllm_shift_command

pytestmark = pytest.mark.engine

THRESHOLD = 32
LAUNCH = {
    "vllm serve": [str(Path(sys.executable).with_name("vllm")), "serve", "{model}"],
    "api_server": [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}"],
}


class Server:
    """The server's processes, and clients for them."""

    def __init__(self, launch: str, model: Path, log: Path, flags: list[str], env: dict[str, str]) -> None:
        self.log, self.port = log, get_open_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [part.format(model=model) for part in LAUNCH[launch]]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny", *flags]
        command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "128"]
        command += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(16 << 20)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOG_STATS_INTERVAL": "1"} | env,
            )

    def wait_until_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        code = self.process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        pytest.fail(f"the server is not ready (exit code {code}):\n{self.log.read_text()[-4000:]}")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def stats(self) -> dict[str, int]:
        """Steps and tokens by mode; every rank must have counted the same."""
        response = httpx.post(f"{self.url}/collective_rpc", json={"method": "shift_stats"}).json()
        assert all(result == response["results"][0] for result in response["results"])
        return response["results"][0]

    def metrics(self) -> Counter[tuple[str, ...]]:
        """Samples of /metrics, by name and mode, each summed over its other labels."""
        found: Counter[tuple[str, ...]] = Counter()
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                found[sample.name, *(sample.labels[label] for label in ("mode",) if label in sample.labels)] += (
                    sample.value
                )
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            # Whatever still lives in the session after a clean stop is a leak; the assertion below says so.
            time.sleep(2)
            left = self.processes()
            if left:
                os.killpg(self.process.pid, signal.SIGKILL)
        assert left == []
        assert self.process.returncode == 0

    def processes(self) -> list[str]:
        found = subprocess.run(["ps", "-o", "pid=,stat=,args=", "--sid", str(self.process.pid)], capture_output=True)
        return [line for line in found.stdout.decode().splitlines() if " Z" not in line]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_checkpoint("llama", tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    flags = ["--tensor-parallel-size", "1", "--ulysses-sequence-parallel-size", "2", "--enforce-eager"]
    flags += ["--enable-shift-parallel", "--shift-parallel-threshold", str(THRESHOLD)]
    server = Server("vllm serve", model, tmp_path_factory.mktemp("log") / "log", flags, {})
    server.wait_until_ready(400)
    yield server
    server.stop()


def tokens(count: int, start: int = 3) -> list[int]:
    return [3 + (start + i * 7) % 490 for i in range(count)]


# A prompt above the threshold, then decoding below it.
REQUEST = {
    "model": "tiny",
    "prompt": tokens(90),
    "max_tokens": 12,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


@contextmanager
def both_modes_run(server: Server) -> Iterator[None]:
    before = server.stats()
    yield
    after = server.stats()
    assert after["sp_steps"] > before["sp_steps"]
    assert after["tp_steps"] > before["tp_steps"]


def test_the_start_up_line_and_the_stats_line(server):
    server.client().completions.create(model="tiny", prompt=tokens(100), max_tokens=4, temperature=0)
    deadline = time.monotonic() + 20
    while "SP mode" not in server.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.5)
    log = server.log.read_text()
    assert "Shift Parallelism on 2 ranks: steps of up to 32 tokens run in TP=2, larger ones in SP=2 x TP=1" in log
    assert "GiB a rank" in log
    assert re.search(r"SP mode 1 steps \(100 tokens, \d+\.\d ms each\), \d mode changes; threshold 32 tokens", log)


def test_metrics_equal_the_counts_of_the_workers(server):
    before = server.metrics()
    with both_modes_run(server):
        counted = server.stats()
        for length in (90, 20, 70):
            server.client().completions.create(**REQUEST | {"prompt": tokens(length, start=length)})
        stats, after = server.stats(), server.metrics()
    for mode in ("tp", "sp"):
        for what in ("steps", "tokens"):
            assert after[f"vllm:shift_{what}_total", mode] == stats[f"{mode}_{what}"]
        times = "vllm:shift_step_time_seconds"
        assert after[f"{times}_count", mode] == stats[f"{mode}_steps"]
        assert after[f"{times}_sum", mode] > before[f"{times}_sum", mode]
    assert after["vllm:shift_mode_changes_total",] == stats["mode_changes"]
    # Above the threshold and below it, three times; the 20 tokens never leave TP mode.
    assert stats["mode_changes"] - counted["mode_changes"] in (3, 4)
    assert after["vllm:shift_threshold_tokens",] == THRESHOLD
    # Every token of a prompt is scheduled, and every token of an answer but the last.
    new = {name: stats[name] - counted[name] for name in stats}
    assert new["tp_tokens"] + new["sp_tokens"] == 90 + 20 + 70 + 3 * (REQUEST["max_tokens"] - 1)


def test_the_dashboard_asks_for_metrics_that_exist(server):
    server.client().completions.create(**REQUEST)
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    found = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    dashboard = json.loads((Path(__file__).parents[1] / "dashboards" / "vllm-shift.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [item["definition"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    assert asked <= set(found)
    assert {name for name in found if name.startswith("vllm:shift")} - asked <= {
        "vllm:shift_step_time_seconds_count", "vllm:shift_step_time_seconds_sum",
    }  # fmt: skip
    for query in queries:
        for name, labels in re.findall(r"(vllm:\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)=", labels)) <= found[name]


def test_a_replay_equals_what_the_server_counted(server, tmp_path):
    trace = tmp_path / "trace.jsonl"
    traffic = ["--rate", "8", "--duration", "3", "--prompt-tokens", "4-100", "--output-tokens", "1-12"]
    assert vllm_shift_command(["trace", "steady", str(trace), *traffic]) == 0
    requests = [json.loads(line) for line in trace.read_text().splitlines()]
    prompts, outputs = (sum(request[f"{name}_tokens"] for request in requests) for name in ("prompt", "output"))
    before = server.metrics()
    with both_modes_run(server):
        words = ["replay", str(trace), "--url", server.url, "--output", str(tmp_path / "report"), "--interval", "0.2"]
        assert vllm_shift_command(words) == 0
    after = server.metrics()
    new = {key: after[key] - before[key] for key in after if key in before}
    summary = json.loads((tmp_path / "report.json").read_text())["summary"]
    assert (summary["completed"], summary["failed"], summary["other_length"]) == (len(requests), 0, 0)
    assert (summary["prompt_tokens"], summary["output_tokens"]) == (prompts, outputs)
    assert new["vllm:request_success_total",] == len(requests)
    assert new["vllm:prompt_tokens_total",] == prompts
    assert new["vllm:generation_tokens_total",] == outputs
    scheduled = sum(new["vllm:shift_tokens_total", mode] for mode in ("tp", "sp"))
    assert scheduled == prompts + outputs - len(requests)
    for mode in ("tp", "sp"):
        for what in ("steps", "tokens"):
            assert summary["modes"][f"{mode}_{what}"] == new[f"vllm:shift_{what}_total", mode]


def test_streaming_equals_not_streaming(server):
    client = server.client()
    with both_modes_run(server):
        whole = client.completions.create(**REQUEST).choices[0].text
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**REQUEST, stream=True))
    assert streamed == whole


def test_concurrent_requests_equal_single_ones(server):
    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")

        async def ask(length: int) -> str:
            answer = await client.completions.create(
                model="tiny",
                prompt=tokens(length, start=length),
                max_tokens=8,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            return answer.choices[0].text

        lengths = [3, 20, 31, 32, 33, 70, 130, 200, 5, 90]
        together = await asyncio.gather(*(ask(length) for length in lengths))
        assert together == [await ask(length) for length in lengths]

    with both_modes_run(server):
        asyncio.run(run())


def test_a_client_that_leaves_frees_its_request(server):
    client = server.client()
    stream = client.completions.create(
        model="tiny", prompt=tokens(60), max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    running = None
    while running != 0.0 and time.monotonic() < deadline:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        (line,) = [line for line in lines if line.startswith("vllm:num_requests_running")]
        running = float(line.split()[-1])
        time.sleep(0.2)
    assert running == 0.0
    assert client.completions.create(model="tiny", prompt=tokens(60), max_tokens=3).choices[0].text


def test_bad_requests_leave_the_server_alive(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=tokens(600), max_tokens=3)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[10**7], max_tokens=3)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_odd_requests_by_hand(server):
    """Nothing but refusals and answers; after each the known answer comes as before, at the end in both modes."""
    with both_modes_run(server):
        answers = http_fuzz.by_hand(server.url, http_fuzz.ODD)
    # Stock vLLM answers these two in the same way.
    assert answers.pop("a list").startswith("500")
    assert answers.pop("regex of nested repeats").startswith("500")
    assert {answer[:3] for answer in answers.values()} == {"200", "400", "404"}


def test_requests_made_up_from_the_openapi_page(server):
    """vLLM itself answers some of them with 500; the engine has to live and to answer as before."""
    paths = ("/v1/completions", "/inference/v1/generate", "/tokenize", "/load")
    with http_fuzz.client(server.url) as http:
        expected = http_fuzz.known(http)
        counts = http_fuzz.from_openapi(server.url, examples=20, only=paths)
        assert {endpoint.split()[1] for endpoint, _ in counts} == set(paths)
        assert http_fuzz.known(http) == expected
    assert server.process.poll() is None


def test_plain_ulysses_by_the_other_command_with_a_compiled_model(server, model, tmp_path):
    """The same answers from the other launch command, SP in every step, and vLLM's default of compiling the model."""
    expected = server.client().completions.create(**REQUEST).choices[0].text
    flags = ["--ulysses-sequence-parallel-size", "2", "--disable-log-stats"]
    other = Server("api_server", model, tmp_path / "log", flags, {"TORCHDYNAMO_DISABLE": "0"})
    try:
        other.wait_until_ready(300)
        client = other.client()
        assert client.completions.create(**REQUEST).choices[0].text == expected
        stats = other.stats()
        assert stats["tp_steps"] == 0
        assert stats["sp_steps"] >= 12
        # vLLM's own variable makes a line due after a second.
        time.sleep(2)
        assert "mode changes; threshold" not in other.log.read_text()
        assert not [name for name, *_ in other.metrics() if name.startswith("vllm:")]
    finally:
        other.stop()


def assert_equal_to_transformers(model: Path, prompts: list[list[int]], answers: list[openai.types.Completion]) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for prompt, answer in zip(prompts, answers, strict=True):
        found = reference.generate(torch.tensor([prompt]), max_new_tokens=REQUEST["max_tokens"], do_sample=False)
        expected = tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)
        assert answer.choices[0].text.split() == expected.split()


@pytest.mark.nightly
def test_a_rank_on_each_of_two_nodes(model, tmp_path):
    """Both on this host."""
    prompts = [tokens(length, start=length) for length in (90, 20)]
    flags = ["--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel", "--shift-parallel-threshold", "32"]
    flags += ["--enforce-eager", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(get_open_port())]
    first = Server("vllm serve", model, tmp_path / "log", [*flags, "--node-rank", "0"], {})
    second = Server("vllm serve", model, tmp_path / "log2", [*flags, "--node-rank", "1", "--headless"], {})
    try:
        first.wait_until_ready(300)
        answers = [first.client().completions.create(**REQUEST | {"prompt": prompt}) for prompt in prompts]
        stats = first.metrics()
        assert stats["vllm:shift_steps_total", "sp"] == 1
        assert stats["vllm:shift_steps_total", "tp"] > 1
    finally:
        second.stop()
        first.stop()
    assert_equal_to_transformers(model, prompts, answers)


@pytest.mark.nightly
def test_nodes_with_other_settings_end_with_the_values_of_both(model, tmp_path):
    flags = ["--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel", "--enforce-eager", "--nnodes", "2"]
    flags += ["--master-addr", "127.0.0.1", "--master-port", str(get_open_port()), "--shift-parallel-threshold"]
    first = Server("vllm serve", model, tmp_path / "log", [*flags, "32", "--node-rank", "0"], {})
    second = Server("vllm serve", model, tmp_path / "log2", [*flags, "16", "--node-rank", "1", "--headless"], {})
    try:
        assert [server.process.wait(200) for server in (first, second)] == [1, 1]
        assert [*first.processes(), *second.processes()] == []
    finally:
        for server in (first, second):
            with suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
    for server in (first, second):
        assert "shift_parallel_threshold is not the same on all ranks: rank 0: 32; rank 1: 16" in server.log.read_text()


@pytest.mark.nightly
def test_two_replicas_behind_two_api_servers(model, tmp_path):
    """Data parallelism, and API servers that read the flags before they load plugins."""
    prompts = [tokens(length, start=length) for length in (90, 20, 70, 3, 100, 50)]
    flags = ["--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel", "--shift-parallel-threshold", "32"]
    flags += ["--data-parallel-size", "2", "--api-server-count", "2", "--enforce-eager"]
    server = Server("vllm serve", model, tmp_path / "log", flags, {})
    try:
        server.wait_until_ready(800)
        # A connection each, so that both API servers take part.
        answers = [server.client().completions.create(**REQUEST | {"prompt": prompt}) for prompt in prompts]
        time.sleep(2)  # vLLM's own variable makes a line due after a second
    finally:
        server.stop()
    assert_equal_to_transformers(model, prompts, answers)
    log = server.log.read_text()
    assert log.count("self-check passed") == 2
    # Each replica took some of the requests: its line counts steps since its own start.
    by_engine = defaultdict(list)
    for worker, steps in re.findall(r"Worker_TP0 pid=(\d+).*since start TP \d+, SP (\d+) steps", log):
        by_engine[worker].append(int(steps))
    assert len(by_engine) == 2
    assert sum(steps[-1] for steps in by_engine.values()) == sum(len(prompt) > THRESHOLD for prompt in prompts)
