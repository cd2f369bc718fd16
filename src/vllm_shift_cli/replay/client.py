"""One request to an OpenAI-compatible server, timed, with whatever went wrong."""

import json
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp

from vllm_shift_cli.arguments import MOST_TOKENS
from vllm_shift_cli.errors import CommandError

INTERRUPTED = "interrupted before the answer was complete"

# Seconds that a server has to say what model it has.
_MODELS_TIMEOUT = 10.0


@dataclass
class Outcome:
    """What became of one request. Times are seconds since the replay began.

    Attributes:
        due: when the trace has it.
        prompt_tokens: length of the prompt in the trace.
        output_tokens: length of the answer in the trace.
        sent: when it was sent.
        first: when the first token came.
        last: when the last token came.
        ended: when the answer was complete, or the request had failed.
        got_prompt_tokens: length of the prompt as the server counted it.
        got_output_tokens: length of the answer as the server counted it.
        error: why there is no complete answer (yet); None when there is one.
    """

    due: float
    prompt_tokens: int
    output_tokens: int
    sent: float
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    got_prompt_tokens: int | None = None
    got_output_tokens: int | None = None
    error: str | None = INTERRUPTED


def session(timeout: float, api_key: str | None) -> aiohttp.ClientSession:
    """A session whose requests never wait for each other.

    Args:
        timeout: seconds that one request may take.
        api_key: sent as a bearer token.
    """
    return aiohttp.ClientSession(
        # A connection for each request: a kept one may be closed by the server just when it is used again.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )


async def served_model(http: aiohttp.ClientSession, url: str) -> str:
    """The first model that a server has.

    Raises:
        CommandError: the server does not answer within 10 s, or has none.
    """
    try:
        async with http.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=_MODELS_TIMEOUT)) as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except Exception as error:
        raise CommandError(
            f"cannot ask {url}/v1/models for the model ({_describe(error)}); "
            "is the server up? If it has no such page, give --model"
        ) from None


def request_body(model: str, prompt: list[int], output_tokens: int) -> bytes:
    """The JSON of a streamed completion of exactly ``output_tokens`` tokens."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "min_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


async def send(http: aiohttp.ClientSession, url: str, body: bytes, outcome: Outcome, began: float) -> None:
    """Send one request and write what happens into ``outcome``, whose error is None only after a complete answer.

    Whatever is wrong with an answer becomes that error; only a cancellation is raised.

    Args:
        http: the session.
        url: of the server, without ``/v1``.
        body: from ``request_body``.
        outcome: with its fields of the trace set.
        began: ``perf_counter()`` at the begin of the replay.
    """
    try:
        headers = {"Content-Type": "application/json"}
        async with http.post(f"{url}/v1/completions", data=body, headers=headers) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}: {_message(await response.text(errors='replace'))}"
                return
            outcome.error = await _read_stream(response, outcome, began)
    except TimeoutError:
        outcome.error = f"no complete answer within {http.timeout.total:g} s"
    except Exception as error:
        outcome.error = _describe(error)


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome, began: float) -> str | None:
    """Read server-sent events; returns what is wrong with the answer."""
    usage: dict[str, Any] | None = None
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            if usage is None:
                return "the stream has no usage: the server ignores stream_options.include_usage"
            counts = [usage.get(f"{kind}_tokens") for kind in ("prompt", "completion")]
            if any(type(count) is not int or not 0 <= count <= MOST_TOKENS for count in counts):
                return f"the usage has no valid numbers of tokens: {usage}"[:300]
            outcome.got_prompt_tokens, outcome.got_output_tokens = counts
            return None if outcome.first is not None else "the answer has no tokens"
        event = json.loads(data)
        if not isinstance(event, dict) or not isinstance(event.get("usage") or {}, dict):
            return f"the stream has an event that is no completion: {data.decode()}"[:300]
        if event.get("error") is not None:
            return f"error in the stream: {_message(data.decode())}"
        if event.get("choices"):
            outcome.last = perf_counter() - began
            if outcome.first is None:
                outcome.first = outcome.last
        usage = event.get("usage") or usage
    if response.content_type != "text/event-stream":
        return f"the answer is no event stream, but {response.content_type}"
    return "the stream broke off"


def _message(text: str) -> str:
    """What a server says in the body of an error, in one line of bearable length."""
    try:
        found = json.loads(text)
        found = found.get("error", found)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError, RecursionError):
        pass
    return _one_line(text)


def _describe(error: BaseException) -> str:
    return _one_line(f"{type(error).__name__}: {error}".rstrip(": "))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
