"""An OpenAI-compatible server without a model, which fails as it is told to."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from aiohttp import web

METRICS = """# TYPE vllm:shift_steps_total counter
vllm:shift_steps_total{{engine="0",mode="tp",model_name="fake"}} {tp}.0
vllm:shift_steps_total{{engine="0",mode="sp",model_name="fake"}} {sp}.0
vllm:shift_tokens_total{{engine="0",mode="tp",model_name="fake"}} {tp_tokens}.0
vllm:shift_tokens_total{{engine="0",mode="sp",model_name="fake"}} {sp_tokens}.0
vllm:shift_mode_changes_total{{engine="0",model_name="fake"}} {changes}.0
vllm:shift_threshold_tokens{{engine="0",model_name="fake"}} 32.0
vllm:shift_step_time_seconds_bucket{{engine="0",le="0.001",mode="tp",model_name="fake"}} 0.0
"""


class FakeServer:
    """Answers ``/v1/completions``; a prompt of one of these lengths goes wrong in its own way.

    Attributes:
        bodies: of the requests that came.
        pause: seconds between two tokens.
        metrics: whether the page has the metrics of Shift Parallelism.
        damage: what becomes of the text of that page.
        hanging: pages that never answer.
        hung: how often one was asked for.
    """

    HTTP_500, DROPPED, ERROR_EVENT, NO_USAGE, HANGS, SHORT, BROKEN, BINARY, PLAIN = range(901, 910)
    # What comes between the second token and the third.
    ODD_EVENTS: ClassVar = {911: "[]", 912: "null", 913: "[" * 100_000, 914: "x" * 1_000_000}
    # What the usage says of the answer.
    ODD_COUNTS: ClassVar = {921: None, 922: "4", 923: float("nan"), 924: -1, 925: 10**18}

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.port = 0
        self.reset()
        self.counts = {"tp": 0, "sp": 0, "tp_tokens": 0, "sp_tokens": 0, "changes": 0}

    def reset(self) -> None:
        """Behave well."""
        self.bodies.clear()
        self.pause, self.metrics, self.hanging = 0.005, True, set[str]()
        self.hung = 0
        self.damage: Callable[[str], str] = str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        length = len(body["prompt"])
        mode = "sp" if length > 32 else "tp"
        self.counts[mode] += 1
        self.counts[f"{mode}_tokens"] += length
        if length == self.HTTP_500:
            error = {"error": {"message": f"request {len(self.bodies)} hit a wall", "code": 500}}
            return web.json_response(error, status=500)
        if length == self.BINARY:
            return web.Response(body=b"\xff\xfe", status=502, content_type="text/plain", charset="utf-8")
        if length == self.PLAIN:
            return web.json_response({"choices": [{"text": "x"}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def event(data: Any) -> None:
            await response.write(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())

        count = body["min_tokens"] - (length == self.SHORT)
        for number in range(count):
            await asyncio.sleep(self.pause)
            await event({"choices": [{"text": "x"}], "usage": None, "error": None})
            self.counts["tp"] += 1
            if number == 1 and length == self.DROPPED:
                request.transport.close()
                return response
            if number == 1 and length == self.ERROR_EVENT:
                await event({"error": {"message": "the engine died"}})
                return response
            if number == 1 and length == self.BROKEN:
                await event("{not json")
            if number == 1 and length in self.ODD_EVENTS:
                await event(self.ODD_EVENTS[length])
            if number == 1 and length == self.HANGS:
                await asyncio.sleep(60)
        if length != self.NO_USAGE:
            said = self.ODD_COUNTS.get(length, count)
            await event({"choices": [], "usage": {"prompt_tokens": length, "completion_tokens": said}})
        await event("[DONE]")
        return response

    async def page(self, request: web.Request) -> web.Response:
        await self.hang("metrics")
        return web.Response(text=self.damage(METRICS.format(**self.counts) if self.metrics else "other 1.0\n"))

    async def models(self, request: web.Request) -> web.Response:
        await self.hang("models")
        return web.json_response({"data": [{"id": "fake"}]})

    async def hang(self, page: str) -> None:
        if page in self.hanging:
            self.hung += 1
            await asyncio.sleep(60)


@contextmanager
def running_server() -> Iterator[FakeServer]:
    """A server in a thread of this process."""
    server, loop = FakeServer(), asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/metrics", server.page)
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.port = site._server.sockets[0].getsockname()[1]

    async def stop() -> None:
        await runner.cleanup()
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
