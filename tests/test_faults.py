"""A server that breaks while clients stream: they are told soon, the log says why, and no process stays."""

import signal
import time

import faults
import psutil
import pytest
import tiny
from ports import free_ports

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_checkpoint("llama", tmp_path_factory.mktemp("faults"))


def assert_clean_end(outcome):
    assert outcome.clients_after < 10
    bad = ("process ", "the launcher", "/dev/shm/vllm-shift")
    assert not [line for line in outcome.left if line.startswith(bad)]


def test_a_rank_that_raises_in_sp_mode_only(model, tmp_path):
    """Rank 1, whose errors vLLM's executor does not hear of; TP mode goes on until a long prompt comes."""
    outcome = faults.try_plant("both modes", "raises", model, free_ports(1), tmp_path / "server")
    assert outcome.clients == [f"{faults.CLIENTS + 1} x error in the stream"]
    assert "(threshold 14) failed in model.layers.1.self_attn.o_proj: RuntimeError: planted" in outcome.cause
    assert "A step in SP mode of 16 tokens" in outcome.cause
    assert outcome.exit_code == 1
    assert "the API server ends with exit code 1" in (tmp_path / "server.log").read_text()
    assert_clean_end(outcome)


NIGHTLY = pytest.mark.nightly


# In the first step, where rank 0 waits for a sum; and where it waits for this rank's word on the CPU.
@pytest.mark.parametrize(
    "failing",
    [
        "vllm_shift.switch:ModeSwitch._own_positions",
        pytest.param("vllm_shift.self_check:SelfCheck._compare", marks=NIGHTLY),
        pytest.param("vllm_shift.calibrate:_time_step", marks=NIGHTLY),
    ],
)
def test_a_rank_that_fails_at_start_up_ends_the_start(model, tmp_path, failing):
    told = tmp_path / "told"
    threshold = "auto" if "calibrate" in failing else "14"
    flags = [*faults.SHIFT, threshold, "--worker-extension-cls", "start_plant.StartPlant"]
    env = faults.extensions() | {"START_PLANT": failing, "START_PLANT_TOLD": str(told)}
    env |= {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}  # no times of another run
    with faults.Victim(flags, model, free_ports(1), tmp_path / "server", env) as running:
        assert running.process.wait(timeout=running.device.patience) == 1
        assert time.monotonic() - float(told.read_text()) < 60
        _, alive = psutil.wait_procs(running.processes(), timeout=10)
        assert not alive
    log = (tmp_path / "server.log").read_text()
    assert "OutOfMemoryError: planted" in log
    assert "EngineCore failed to start" in log


def test_an_api_server_that_is_killed_takes_its_engine_along(model, tmp_path):
    outcome = faults.try_kill("SP mode", "API server", "decode", model, free_ports(1), tmp_path / "server")
    assert outcome.clients == [f"{faults.CLIENTS} x RemoteProtocolError"]
    assert "the API server is gone" in outcome.cause
    assert outcome.exit_code == -signal.SIGKILL
    assert_clean_end(outcome)
