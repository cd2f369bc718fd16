"""How vLLM's API server ends, with and without the middleware, in front of an engine that is none."""

import multiprocessing
import os
import signal
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
import uvloop
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.launcher import serve_http
from vllm.entrypoints.serve.utils.server_utils import engine_error_handler, lifespan
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_shift.exit_code import ExitCode


class Engine:
    """What the API server asks of vLLM's ``AsyncLLM``; one that has been shut down counts as dead there, too."""

    errored = False
    vllm_config = SimpleNamespace(shutdown_timeout=0)

    @property
    def is_running(self):
        return not self.errored

    def shutdown(self, timeout=None):
        self.errored = True


def serve(middleware, sock, cleaned_up):
    """vLLM's web server and, around it, what its ``run_server`` does."""
    engine = Engine()
    app = FastAPI(lifespan=lifespan)
    app.state.engine_client, app.state.log_stats = engine, False
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.exception_handler(EngineDeadError)(engine_error_handler)
    if middleware:
        app.add_middleware(ExitCode)

    @app.get("/health")
    async def health():
        return os.getpid()

    @app.get("/dies")
    async def dies(noticed: bool):
        engine.errored = True
        if noticed:
            raise EngineDeadError

    async def main():
        try:
            end = await serve_http(app, sock, host="127.0.0.1", port=sock.getsockname()[1])
        finally:
            engine.shutdown()
        await end
        cleaned_up.touch()

    uvloop.run(main())


@pytest.fixture
def exit_code(tmp_path):
    """A function: the exit code of a server, with or without the middleware, to which something happens."""

    def run(middleware, happens):
        cleaned_up = tmp_path / "cleaned up"
        cleaned_up.unlink(missing_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            process = multiprocessing.get_context("fork").Process(target=serve, args=(middleware, sock, cleaned_up))
            process.start()
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        try:
            assert httpx.get(f"{url}/health", timeout=30).json() == process.pid
            happens(url, process.pid)
            process.join(30)
            assert cleaned_up.exists()
        finally:
            process.kill()
            process.join()
        return process.exitcode

    return run


def test_the_engine_dies(exit_code):
    def dies(url, pid):
        assert httpx.get(f"{url}/dies?noticed=true").status_code == 500

    assert exit_code(True, dies) == 1
    # vLLM's own, which may change.
    assert exit_code(False, dies) == 0


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["SIGTERM", "Ctrl-C twice"])
def test_a_stop_that_was_asked_for(exit_code, numbers, dead):
    def stop(url, pid):
        # As an engine that has got Ctrl-C, too, or one that the server outlives.
        if dead:
            assert httpx.get(f"{url}/dies?noticed=false").status_code == 200
        for number in numbers:
            os.kill(pid, number)
            time.sleep(0.05)

    assert exit_code(True, stop) == exit_code(False, stop) == 0


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_requests_go_straight_through(kind):
    call = {"type": kind}, object(), object()
    assert ExitCode(lambda *given: given)(*call) == call


def test_an_application_in_a_server_of_the_users_own_is_left_alone():
    """It starts in another thread than the main one, and its engine is shut down by hand."""
    app = FastAPI(lifespan=lifespan)
    app.state.engine_client, app.state.log_stats = Engine(), False
    app.add_middleware(ExitCode)
    before = signal.getsignal(signal.SIGTERM)
    with TestClient(app):
        app.state.engine_client.shutdown()
    assert signal.getsignal(signal.SIGTERM) is before
