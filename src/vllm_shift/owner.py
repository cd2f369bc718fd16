"""Ends an engine whose API server was killed without a word.

vLLM's engine core would go on without it, and keep the GPUs from the server that is started next. What a worker can do
is to end itself: vLLM then ends the engine core and the other workers, as it does whenever a worker has died.
"""

import os
import select
import signal
import threading

import psutil
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

_VARIABLE = "SHIFT_PARALLEL_OWNER"


def name_owner() -> None:
    """In the process that makes the config: let the workers know which one it is."""
    os.environ[_VARIABLE] = str(os.getpid())


def end_with_owner() -> None:
    """In a worker: end when that process has ended, if the engine core between the two is a process of its own.

    Does nothing where the three are not child, parent and grandparent, as with Ray or an engine within the user's own
    process, whose workers vLLM ends by itself.
    """
    core = psutil.Process().parent()
    if core is None or str(core.ppid()) != os.environ.get(_VARIABLE):
        return
    try:
        handle = os.pidfd_open(core.ppid())
    except OSError:  # not in this kernel or container
        return
    threading.Thread(target=_end_with, args=(handle,), name="OwnerWatch", daemon=True).start()


def _end_with(handle: int) -> None:
    poll = select.poll()
    poll.register(handle, select.POLLIN)  # readable once the process has ended
    poll.poll()
    logger.error("Shift Parallelism: the API server is gone without having stopped the engine; stopping it.")
    os.kill(os.getpid(), signal.SIGTERM)
