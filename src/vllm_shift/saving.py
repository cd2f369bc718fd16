"""Saves compiled traces in processes of their own, while start-up goes on.

vLLM pickles a trace for its compile cache as soon as it is compiled, in Python, and a shift engine has two. One takes 6
seconds with 32 layers and 13 to 18 with 80 (benchmarks/results/2026-11-27-x4.md). A fork of the worker has all that is
needed, as it was then. It uses no device, and does not outlive the worker.
"""

import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import psutil
from vllm import envs
from vllm.compilation.counter import compilation_counter
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

# Seconds that a save may take; then it is done as in stock vLLM.
PATIENCE = 120

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl


class BackgroundSaves:
    """The saves of an engine's compiled modules."""

    def __init__(self) -> None:
        self._running: list[tuple[psutil.Process, float, Callable[[], None]]] = []
        self._starting = True

    def take_over(self, module: Any) -> None:
        """Of a module with vLLM's ``support_torch_compile``: what it saves is saved in the background."""
        module.save_aot_compiled_function = partial(self._start, module.save_aot_compiled_function)

    def _start(self, save: Callable[[], None]) -> None:
        if envs.VLLM_DISABLE_COMPILE_CACHE or not self._starting:
            save()
            return
        worker = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                _save_and_end(save, worker)
            self._running.append((psutil.Process(pid), time.monotonic() + PATIENCE, save))
        except (OSError, psutil.NoSuchProcess) as error:  # no more processes, or no memory that may be promised
            logger.warning("Saving a compiled model holds up the start, as there is no process for it (%s).", error)
            save()

    def finish(self) -> None:
        """Wait for what is still being saved, and save here what a process could not."""
        for process, deadline, save in self._running:
            status = _status(process, max(0, deadline - time.monotonic()))
            if status == 0:
                compilation_counter.num_aot_artifacts_saved += 1
            else:
                logger.warning("Saving a compiled model holds up the start: a process for it ended with %s.", status)
                save()
        self._running.clear()
        self._starting = False


def _status(process: psutil.Process, timeout: float) -> int | None:
    """Exit status of a child, killed after so many seconds; None where SIGCHLD is ignored, so that nobody knows it."""
    try:
        status: int | None = process.wait(timeout)
    except psutil.TimeoutExpired:
        process.kill()
        status = process.wait()
    return status


def _save_and_end(save: Callable[[], None], worker: int) -> NoReturn:
    """In the fork: save, and end with status 0 if that went well."""
    status = 1
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # Garbage of the worker may be on the device.
        gc.disable()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if os.getppid() == worker:
            before = compilation_counter.num_aot_artifacts_saved
            save()
            status = int(compilation_counter.num_aot_artifacts_saved == before)
    finally:
        # Whatever is to be done at the end of a process is the worker's.
        os._exit(status)
