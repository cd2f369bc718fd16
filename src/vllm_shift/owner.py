"""Ends an engine whose API server was killed without a word.

vLLM's engine core would go on without it, and keep the GPUs from the server that is started next. So a worker kills the
engine core in such a case; vLLM's workers, this one too, end by themselves when it is gone.
"""

import contextlib
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
    """In a worker: end the engine when that process has ended, if the engine core between is a process of its own.

    Does nothing where the three are not child, parent and grandparent, as with Ray or an engine within the user's own
    process, whose workers vLLM ends by itself.
    """
    core = psutil.Process().parent()
    if core is None or str(core.ppid()) != os.environ.get(_VARIABLE):
        return
    try:
        handles = os.pidfd_open(core.ppid()), os.pidfd_open(core.pid)
    except OSError:  # not in this kernel or container
        return
    threading.Thread(target=_kill_after, args=handles, name="OwnerWatch", daemon=True).start()


def _kill_after(owner: int, core: int) -> None:
    """Wait for the end of one process, then kill another; both given as pidfds."""
    poll = select.poll()
    poll.register(owner, select.POLLIN)  # readable once the process has ended
    poll.poll()
    logger.error("Shift Parallelism: the API server is gone without having stopped the engine; stopping it.")
    # Asked to stop in order, it would wait for the API server to read its last messages.
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(core, signal.SIGKILL)
