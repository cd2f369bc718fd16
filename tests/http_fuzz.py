"""Bad input over HTTP: requests made up by schemathesis from vLLM's OpenAPI page, odd values by hand, disconnects.

As a command it starts a server and logs what was answered: ``python tests/http_fuzz.py --examples 100``.
"""

import argparse
import contextlib
import json
import logging
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import requests
import schemathesis
import tiny
from faults import Victim
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from ports import free_ports
from schemathesis import GenerationMode

logger = logging.getLogger("http_fuzz")

# Elastic expert parallelism changes a data-parallel engine, which a shift engine is not; the rest needs dev mode.
NOT_TRIED = (
    "/scale_elastic_ep", "/is_scaling_elastic_ep", "/collective_rpc", "/sleep", "/wake_up", "/is_sleeping", "/reset_",
    "/pause", "/resume", "/is_paused", "/update_weights", "/start_", "/finish_", "/init_", "/get_world_size",
    "/abort_requests", "/server_info",
)  # fmt: skip

# A greedy answer, asked for again and again: prompt above the threshold, decoding below it.
KNOWN = {"model": "tiny", "prompt": [3 + i * 7 % 490 for i in range(90)], "max_tokens": 8, "temperature": 0}
KNOWN |= {"ignore_eos": True}

BASE = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2}
VALID = {
    "/v1/completions": BASE,
    "/inference/v1/generate": {"model": "tiny", "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2}},
}
# By hand: what is sent in place of BASE's values.
ODD: dict[str, dict[str, Any]] = {
    "prompt longer than the model": {"prompt": [5] * 5000},
    "prompt of 300,000 tokens": {"prompt": [5] * 300_000},
    "prompt of exactly the model's length": {"prompt": [5] * 1024},
    "token id -1": {"prompt": [-1]},
    "token id of the vocabulary size": {"prompt": [tiny.SHAPE["vocab_size"]]},
    "token id 2**31": {"prompt": [2**31]},
    "token id 2**63": {"prompt": [2**63]},
    "token id 1.5": {"prompt": [1.5]},
    "token id true": {"prompt": [True]},
    "no tokens": {"prompt": []},
    "no text": {"prompt": ""},
    "prompts of no tokens": {"prompt": [[], []]},
    "mixed prompts": {"prompt": [[5], "w5"]},
    "200 prompts at once": {"prompt": [[i + 3] for i in range(200)]},
    "max_tokens 0": {"max_tokens": 0},
    "max_tokens -1": {"max_tokens": -1},
    "max_tokens 10**9": {"max_tokens": 10**9},
    "min_tokens above max_tokens": {"min_tokens": 9},
    "n 0": {"n": 0},
    "n -1": {"n": -1},
    "n 64": {"n": 64, "temperature": 1.0},
    "n 10**6": {"n": 10**6, "temperature": 1.0},
    "n 3, greedy": {"n": 3, "temperature": 0},
    "best_of 5": {"best_of": 5, "temperature": 1.0},
    "temperature -1": {"temperature": -1},
    "temperature 1e-30": {"temperature": 1e-30},
    "temperature 1e308": {"temperature": 1e308},
    "temperature NaN": {"temperature": float("nan")},
    "top_p 0": {"top_p": 0},
    "top_p 2": {"top_p": 2},
    "top_k -5": {"top_k": -5},
    "top_k 10**12": {"top_k": 10**12, "temperature": 1.0},
    "logprobs 10**6": {"logprobs": 10**6},
    "logprobs -1": {"logprobs": -1},
    "prompt_logprobs 5": {"prompt_logprobs": 5, "prompt": [5] * 100},
    "echo": {"echo": True, "logprobs": 1, "prompt": [5] * 100},
    "penalties 1e30": {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1e30},
    "repetition_penalty 0": {"repetition_penalty": 0},
    "logit_bias of a token that is not there": {"logit_bias": {"10000000": 5}},
    "logit_bias of token -1": {"logit_bias": {"-1": 100}},
    "allowed_token_ids of none": {"allowed_token_ids": []},
    "allowed_token_ids not there": {"allowed_token_ids": [10**9]},
    "stop_token_ids not there": {"stop_token_ids": [-1, 10**9]},
    "1,000 stop words": {"stop": [f"w{i}" for i in range(1000)]},
    "empty stop word": {"stop": [""]},
    "bad_words empty": {"bad_words": [""]},
    "JSON schema that is none": {"structured_outputs": {"json": {"type": "nothing"}}},
    "regex that is none": {"structured_outputs": {"regex": "(("}},
    "regex of nested repeats": {"structured_outputs": {"regex": "(a{1,100}){1,100}b"}},
    "grammar that is none": {"structured_outputs": {"grammar": "root ::= nothing"}},
    "priority": {"priority": -(2**40)},
    "truncate_prompt_tokens -5": {"truncate_prompt_tokens": -5},
    "cache_salt": {"cache_salt": "x" * 10_000},
    "another model": {"model": "other"},
    "stream and n": {"stream": True, "n": 4, "temperature": 1.0},
}
# By hand: bodies that are no request at all.
BODIES = {
    "no body": b"",
    "not JSON": b"{",
    "null": b"null",
    "a list": b"[]",
    "nested 100,000 deep": b"[" * 100_000,
    "8 MiB of spaces": b" " * (8 << 20),
    "not UTF-8": b"\xff\xfe{}",
}
# Ends the engine of vLLM's CPU backend, with and without this plugin: see docs/reliability.md.
DEADLY = {"seed with a chunked prompt": {"seed": 1, "prompt": [5] * 200, "temperature": 1.0}}


def from_openapi(url: str, examples: int, only: tuple[str, ...] = ()) -> Counter[tuple[str, str]]:
    """Sends requests, valid ones and invalid ones, to every endpoint or to some; counts of endpoint and answer."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    counts: Counter[tuple[str, str]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        if not operation.path.startswith(NOT_TRIED) and (not only or operation.path in only):
            endpoint = f"{operation.method.upper()} {operation.path}"
            for answer, count in send_cases(operation, examples).items():
                counts[endpoint, answer] = count
    return counts


def send_cases(operation: Any, examples: int) -> Counter[str]:
    answers: Counter[str] = Counter()
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))
    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            if operation.path in VALID and sum(answers.values()) % 2:
                # A body of odd values alone seldom comes as far as the engine.
                case.body = VALID[operation.path] | dict(list(case.body.items())[:2])
            tame(case.body)
        try:
            answer = str(case.call(timeout=20).status_code)
        except requests.RequestException as error:
            answer = type(error).__name__
        answers[answer] += 1
        if answer.startswith("5") or not answer.isdecimal():
            logger.warning("%s %s: %s", answer, operation.path, str(case.body)[:300])

    with contextlib.suppress(Unsatisfiable):  # an endpoint without parameters has no invalid requests
        send()
    return answers


def tame(body: dict[str, Any]) -> None:
    """Leaves out what would end vLLM's CPU engine, and what only takes long; lets the model be found."""
    body.pop("seed", None)
    if isinstance(body.get("n"), int) and body["n"] > 16:
        body["n"] = 16
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"


def by_hand(url: str, odd: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What is answered to each odd request; after each of them the known answer has to come."""
    answers = {}
    bodies = {name: json.dumps(BASE | change).encode() for name, change in odd.items()} | BODIES
    with client(url) as http:
        expected = known(http)
        for name, body in bodies.items():
            answers[name] = answer_to(http, body)
            logger.info("| %s | %s |", name, answers[name])
            assert known(http) == expected, name
        disconnect(url)
        assert known(http) == expected, "disconnects"
    return answers


def client(url: str) -> httpx.Client:
    """One connection for each request: a kept one may be closed by the server just when it is used again."""
    return httpx.Client(base_url=url, timeout=120, limits=httpx.Limits(max_keepalive_connections=0))


def known(http: httpx.Client) -> str:
    return str(http.post("/v1/completions", json=KNOWN).raise_for_status().json()["choices"][0]["text"])


def answer_to(http: httpx.Client, body: bytes) -> str:
    try:
        response = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    except httpx.HTTPError as error:
        return type(error).__name__
    if response.status_code == 200:
        return "200"
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text
    return f"{response.status_code} {' '.join(message.split())[:110]}"


def disconnect(url: str) -> None:
    """Clients that leave: before the body, in the middle of it, right after it, and after the first bytes."""
    place = urlsplit(url)
    body = json.dumps(BASE | {"max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.hostname}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    for _ in range(5):
        for sent in (head[:30].encode(), head.encode(), head.encode() + body[:20], head.encode() + body):
            for reads in (0, 100):
                with socket.create_connection((place.hostname, place.port), timeout=2) as client:
                    client.sendall(sent)
                    if reads and sent.endswith(body):
                        client.recv(reads)


def main() -> None:
    """Starts a server, with the plugin or without, and logs what became of all requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="for each endpoint")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATH", help="endpoints (default: all)")
    parser.add_argument("--stock", action="store_true", help="stock vLLM with TP=2")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    shift = ["--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel", "--shift-parallel-threshold", "32"]
    flags = ["--tensor-parallel-size", "2"] if args.stock else shift
    with tempfile.TemporaryDirectory() as name:
        model = tiny.make_checkpoint("llama", Path(name))
        flags += ["--max-num-batched-tokens", "128", "--max-model-len", "1024"]
        with Victim(flags, model, free_ports(1), Path(name) / "s") as server:
            server.wait_until_ready()
            by_hand(server.url, ODD)
            if args.examples:
                with client(server.url) as http:
                    expected = known(http)
                    found = from_openapi(server.url, args.examples, tuple(args.only))
                    for (endpoint, answer), count in sorted(found.items()):
                        logger.info("| %s | %s | %d |", endpoint, answer, count)
                    logger.info("the known answer afterwards: %s", known(http) == expected)
            with client(server.url) as http:
                for what, change in DEADLY.items():
                    logger.info("| %s | %s |", what, answer_to(http, json.dumps(BASE | change).encode()))


if __name__ == "__main__":
    import conftest  # noqa: F401  (the environment of the CPU backend)

    main()
