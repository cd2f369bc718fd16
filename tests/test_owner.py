"""A worker ends its engine when the process that made the config was killed, and in no other family of processes.

And it is ended itself when its engine core is gone.
"""

import contextlib
import os
import select
import signal
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from vllm_shift import owner


def start_family(by_owner: bool, late: bool = False) -> tuple[int, int, int]:
    """Child, grandchild and great-grandchild of this process, in the places of API server, engine core and worker.

    Args:
        by_owner: whether the first of them makes the config, or this process.
        late: whether the worker is ready only when the first of them has ended.

    Returns:
        The pids of the first and of the last, and a descriptor that is at its end when the engine core has ended.
    """
    reader, writer = os.pipe()
    if not by_owner:
        owner.name_owner()
    server = os.fork()
    if server:
        os.close(writer)
        return server, int(os.read(reader, 20)), reader
    try:
        if by_owner:
            owner.name_owner()
        server_of_core = os.getpid()
        if os.fork():
            os.close(writer)
        elif not os.fork():
            if not late:
                owner.end_with_owner()
            os.write(writer, str(os.getpid()).encode())
            os.close(writer)
            if late:
                core = psutil.Process(os.getppid())
                while core.ppid() == server_of_core:
                    time.sleep(0.01)
                owner.end_with_owner()
        time.sleep(30)
    finally:
        os._exit(0)


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("by_owner", [True, False])
def test_a_worker_without_its_api_server(by_owner, late, monkeypatch):
    monkeypatch.setenv("SHIFT_PARALLEL_OWNER", "0")  # and back to what it was, afterwards
    server, worker, at_end = start_family(by_owner, late)
    core = psutil.Process(worker).ppid()
    assert not select.select([at_end], [], [], 0.5)[0]
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    ended = bool(select.select([at_end], [], [], 5 if by_owner else 1)[0])
    for process in (worker, core):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os.close(at_end)
    assert ended == by_owner


def test_of_processes_without_the_owner_an_engine_core_alone_is_killed():
    """The owner is gone in all of them: its place has another process, with another start."""
    owner_pid, begin = os.getpid(), 1000.0
    older, younger = SimpleNamespace(create_time=lambda: begin - 1), SimpleNamespace(create_time=lambda: begin + 1)

    def has_left(pid=1, made=begin + 2, adopter=older):
        core = SimpleNamespace(pid=pid, create_time=lambda: made, parent=lambda: adopter)
        return owner._has_left(core, owner_pid, begin)

    assert has_left()
    assert not has_left(pid=owner_pid)  # the engine is within the owner
    assert not has_left(made=begin - 2)  # the worker was adopted, too
    assert not has_left(adopter=younger)
    assert not has_left(adopter=None)


def test_a_python_without_pidfds_starts_no_watch(monkeypatch):
    """Some builds for old kernels have none."""
    core = psutil.Process().parent()
    monkeypatch.setenv("SHIFT_PARALLEL_OWNER", str(core.ppid()))
    monkeypatch.delattr(os, "pidfd_open")
    owner.end_with_owner()
    assert "OwnerWatch" not in [thread.name for thread in threading.enumerate()]


def test_a_worker_that_does_not_end_with_its_engine_core(monkeypatch):
    monkeypatch.setenv("SHIFT_PARALLEL_OWNER", "0")
    monkeypatch.setattr(owner, "GRACE", 1)
    server, worker, at_end = start_family(by_owner=True)
    os.close(at_end)
    running = psutil.Process(worker)
    running.parent().kill()
    try:
        # It is nobody's child then, so it may stay a zombie.
        end = time.monotonic() + 10
        with contextlib.suppress(psutil.NoSuchProcess):
            while running.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < end
                time.sleep(0.05)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
