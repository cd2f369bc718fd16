"""The replay itself: open loop, each request leaves when it is due, whatever became of the earlier ones."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from vllm_shift_cli.replay.client import Outcome, request_body, send, served_model, session
from vllm_shift_cli.replay.modes import ModeSample, ModeSampler
from vllm_shift_cli.replay.prompts import prompt_ids
from vllm_shift_cli.replay.trace import TraceRequest


@dataclass
class Replay:
    """What a replay has seen.

    Attributes:
        model: that was asked for.
        outcomes: of the requests that were sent.
        ended: how many of them are over.
        failed: how many of these have no complete answer.
        samples: of the server's modes.
        sample_problems: how often the modes could not be read, by reason.
        seconds: from the begin to the end.
        interrupted: whether the user stopped it.
    """

    model: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    ended: int = 0
    failed: int = 0
    samples: list[ModeSample] = field(default_factory=list)
    sample_problems: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False


@dataclass(frozen=True)
class Options:
    """How to replay.

    Attributes:
        url: of the server, without ``/v1``.
        model: to ask for; None asks the server.
        seed: of the prompts.
        timeout: seconds that one request may take.
        api_key: sent as a bearer token.
        interval: seconds between two samples of the server's modes.
    """

    url: str
    model: str | None = None
    seed: int = 0
    timeout: float = 600.0
    api_key: str | None = None
    interval: float = 1.0


async def replay(
    requests: list[TraceRequest], options: Options, on_change: Callable[[Replay], None] = lambda replay: None
) -> Replay:
    """Send the requests of a schedule and wait for all answers.

    A cancellation ends it early, and what has come is returned; it is raised only as long as nothing has been sent.
    A second one ends the last look at the server's mode, too.

    Args:
        requests: from ``trace.schedule``.
        options: how.
        on_change: called when a request has been sent, and when it has ended.

    Raises:
        CommandError: the server does not say what model it has.
    """
    result = Replay()
    http = session(options.timeout, options.api_key)
    try:
        result.model = options.model or await served_model(http, options.url)
        sampler = ModeSampler(http, options.url, options.interval)
        result.samples, result.sample_problems = sampler.samples, sampler.problems
        await sampler.sample(perf_counter())
        began = perf_counter()
        sampling = asyncio.create_task(sampler.run(began))
        sending: list[asyncio.Task[None]] = []

        def end(outcome: Outcome, _: asyncio.Task[None]) -> None:
            outcome.ended = perf_counter() - began
            result.ended += 1
            result.failed += outcome.error is not None
            on_change(result)

        try:
            for index, request in enumerate(requests):
                body = request_body(result.model, prompt_ids(request, index, options.seed), request.output_tokens)
                await asyncio.sleep(began + request.arrival - perf_counter())
                sent = perf_counter() - began
                outcome = Outcome(request.arrival, request.prompt_tokens, request.output_tokens, sent)
                result.outcomes.append(outcome)
                sending.append(asyncio.create_task(send(http, options.url, body, outcome, began)))
                # Not in the task itself: one that is cancelled before it starts ends, too.
                sending[-1].add_done_callback(partial(end, outcome))
                on_change(result)
            await asyncio.gather(*sending)
        except asyncio.CancelledError:
            result.interrupted = True
        for task in (*sending, sampling):
            task.cancel()
        # From here on a cancellation only ends the waiting: what has come must not be lost.
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*sending, sampling, return_exceptions=True)
        result.seconds = perf_counter() - began
        try:
            await sampler.sample(began)
        except asyncio.CancelledError:
            result.interrupted = True
    finally:
        with suppress(asyncio.CancelledError):
            await http.close()
    return result
