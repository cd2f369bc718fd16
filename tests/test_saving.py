"""Traces are saved by forks of the worker; these stand for them with a module that writes a file."""

import os
import signal
import subprocess
import sys
import time

import pytest
from vllm.compilation.counter import compilation_counter

import vllm_shift.saving as saving
from vllm_shift.saving import BackgroundSaves


class Module:
    """As vLLM's compiled modules: saves, counts it, and only logs what goes wrong. Waits for a file to be there."""

    def __init__(self, folder, in_fork=lambda: None):
        self.folder, self.in_fork, self.worker = folder, in_fork, os.getpid()

    def save_aot_compiled_function(self):
        if os.getpid() != self.worker:
            (self.folder / "started").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.01)
            if self.in_fork() == "fails":
                return
        (self.folder / "saved").write_text(str(os.getpid()))
        compilation_counter.num_aot_artifacts_saved += 1

    def saved_by(self):
        return int((self.folder / "saved").read_text())


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(compilation_counter, "num_aot_artifacts_saved", 0)


def start(module):
    saves = BackgroundSaves()
    saves.take_over(module)
    module.save_aot_compiled_function()
    return saves


def test_the_worker_goes_on_while_a_fork_saves(tmp_path, counted):
    module = Module(tmp_path)
    saves = start(module)
    assert not (tmp_path / "saved").exists()
    (tmp_path / "go").touch()
    saves.finish()
    assert module.saved_by() != os.getpid()
    assert compilation_counter.num_aot_artifacts_saved == 1
    with pytest.raises(ChildProcessError):  # nothing is left of it
        os.waitpid(module.saved_by(), os.WNOHANG)


@pytest.mark.parametrize(
    "in_fork",
    [lambda: "fails", lambda: 1 / 0, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: time.sleep(60)],
    ids=["fails", "raises", "is killed", "hangs"],
)
def test_what_a_fork_cannot_save_the_worker_saves(in_fork, tmp_path, counted, monkeypatch, caplog_vllm):
    monkeypatch.setattr(saving, "PATIENCE", 2)
    (tmp_path / "go").touch()
    module = Module(tmp_path, in_fork)
    saves = start(module)
    saves.finish()
    assert module.saved_by() == os.getpid()
    assert compilation_counter.num_aot_artifacts_saved == 1
    assert caplog_vllm.text.count("holds up the start") == 1
    saves.finish()
    assert compilation_counter.num_aot_artifacts_saved == 1


def test_what_nobody_would_wait_for_the_worker_saves(tmp_path, counted, monkeypatch):
    (tmp_path / "go").touch()
    module = Module(tmp_path)
    start(module).finish()
    module.save_aot_compiled_function()
    assert module.saved_by() == os.getpid()
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    (tmp_path / "saved").unlink()
    start(module)
    assert module.saved_by() == os.getpid()  # what vLLM does then is nothing


def test_where_there_can_be_no_fork_the_worker_saves_at_once(tmp_path, counted, monkeypatch, caplog_vllm):
    def fork():
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", fork)
    module = Module(tmp_path)
    start(module)
    assert module.saved_by() == os.getpid()
    assert "no more processes" in caplog_vllm.text


def test_where_children_leave_no_status_the_worker_saves_again(tmp_path, counted):
    (tmp_path / "go").touch()
    stock = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        module = Module(tmp_path)
        start(module).finish()
    finally:
        signal.signal(signal.SIGCHLD, stock)
    assert module.saved_by() == os.getpid()


WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_saving import Module, start

folder = Path(sys.argv[2])
start(Module(folder))
while not (folder / "started").exists():
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


def test_a_fork_ends_with_its_worker(tmp_path):
    command = [sys.executable, "-c", WORKER, os.path.dirname(__file__), tmp_path]
    # This waits for the end of the last process that has the output, and the fork waits for a file that is not there.
    assert subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=False).returncode == -signal.SIGKILL
