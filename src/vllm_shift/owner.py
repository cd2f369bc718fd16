"""Ends an engine whose API server was killed without a word, and workers that do not come to their own end.

vLLM's engine core would go on without its API server, and keep the GPUs from the server that is started next. So a
worker kills the engine core in such a case. vLLM's workers, this one too, end by themselves when that is gone, unless
their GPU waits for a rank that has ended before: then nobody is left to kill them.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable

import psutil
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

_VARIABLE = "SHIFT_PARALLEL_OWNER"

# Seconds that a worker has to end in order once its engine core is gone.
GRACE = 8


def name_owner() -> None:
    """In the process that makes the config: let the workers know which one it is."""
    os.environ[_VARIABLE] = f"{os.getpid()} {psutil.Process().create_time()}"


def end_with_owner() -> None:
    """In a worker: end the engine when that process has ended, if the engine core between is a process of its own.

    And end this worker when the engine core has ended.

    Does nothing where the three are not child, parent and grandparent, as with an engine within the user's own process,
    whose workers vLLM ends by itself.
    """
    core = psutil.Process().parent()
    owner = os.environ.get(_VARIABLE, "").split()
    if core is None or not owner:
        return
    if str(core.ppid()) != owner[0]:
        if _has_left(core, int(owner[0]), float(owner[1])):
            _end(core.kill)
            end_within(GRACE)
        return
    try:
        handles = os.pidfd_open(core.ppid()), os.pidfd_open(core.pid)
    except (AttributeError, OSError):  # not in this Python, which may be built for older kernels, or not in this kernel
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # for the thread, which cannot
    threading.Thread(target=_watch, args=handles, name="OwnerWatch", daemon=True).start()


def _has_left(core: psutil.Process, owner: int, created: float) -> bool:
    """Whether the owner, made at that time, has ended, and has left this engine core to a process that is older."""
    # A parent of this worker that is older than the owner is none of its engine cores.
    if core.pid == owner or core.create_time() <= created:
        return False
    # A parent of the core that is younger got the config from the owner, and is a parent in its own right.
    adopter = core.parent()
    if adopter is None or adopter.create_time() >= created:
        return False
    try:
        process = psutil.Process(owner)
        return bool(process.create_time() != created or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def end_within(seconds: int) -> None:
    """Let this process end in order, but not for longer: then the kernel kills it, whatever it waits for by then.

    An alarm, not a thread: the main thread may wait for the GPU without giving the GIL away, and no thread runs in the
    last part of the interpreter's end.
    """
    with contextlib.suppress(ValueError):  # in another thread than the main one
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def _watch(owner: int, core: int) -> None:
    """Wait for the end of the API server or the engine core, both pidfds; then end what is left, this process, too."""
    poll = select.poll()
    for handle in (owner, core):
        poll.register(handle, select.POLLIN)  # readable once the process has ended
    if core not in dict(poll.poll()):
        _end(lambda: signal.pidfd_send_signal(core, signal.SIGKILL))
    end_within(GRACE)


def _end(kill_core: Callable[[], None]) -> None:
    logger.error("Shift Parallelism: the API server is gone without having stopped the engine; stopping it.")
    # Asked to stop in order, the engine core would wait for the API server to read its last messages.
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        kill_core()
