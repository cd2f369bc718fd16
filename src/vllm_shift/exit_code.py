"""Exit code 1 for an API server whose engine has died: vLLM alone would end it in order, with code 0.

A middleware is vLLM's extension point in the process of the API server. This one lets requests through as they are, and
takes part in nothing but the start and the end of the application (ASGI's scope ``lifespan``).
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

from vllm import envs
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

# Seconds that vLLM has to clean up, which it does in a few.
GRACE = 3600


def add_exit_code(args: Any) -> None:
    """Add the middleware, once, to the arguments of an API server; other arguments have no ``middleware``."""
    name = f"{ExitCode.__module__}.{ExitCode.__qualname__}"
    # The Rust front-end refuses middleware; the process that starts it ends with code 1 by itself.
    if name not in getattr(args, "middleware", [name]) and not envs.VLLM_USE_RUST_FRONTEND:
        args.middleware = [*args.middleware, name]


class ExitCode:
    """The middleware.

    Args:
        app: the ASGI application, which gets every call.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """Pass the call on, as it is, but for the one that spans start and end of the application."""
        call = self._lifespan if scope["type"] == "lifespan" else self._app
        return call(scope, receive, send)

    async def _lifespan(self, scope: Any, receive: Any, send: Any) -> None:
        state = scope["app"].state
        if not hasattr(state, "server"):  # not vLLM's: the application runs in a server of the user's own
            await self._app(scope, receive, send)
            return
        engine = state.engine_client  # None in a server that only renders prompts
        stops = _watch_for_stops()
        await self._app(scope, receive, send)
        # An engine that was asked to stop counts as dead, too.
        if engine is not None and engine.errored and not stops:
            logger.error("The engine has died, see the log above; the API server ends with exit code 1.")
            _exit_after_clean_up()


def _watch_for_stops() -> list[int]:
    """A list that gains every SIGINT and SIGTERM from now on; they are handled as before."""
    stops: list[int] = []
    # uvicorn, which runs the application, has its own handlers in place by now and takes them away when it ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):

            def handle(number: int, frame: FrameType | None, handler: Callable[..., Any] = handler) -> None:
                stops.append(number)
                handler(number, frame)

            signal.signal(number, handle)
    return stops


def _exit_after_clean_up() -> None:
    """Exit with code 1 when ``asyncio.run`` cancels what still runs, which it does after vLLM's main task has ended."""
    # The timer keeps the task, to which the loop has a weak reference only.
    end = asyncio.create_task(asyncio.sleep(GRACE))
    end.add_done_callback(lambda _: sys.exit(1))
