"""What the log says of a step that does not end, and that it says nothing of others."""

import contextlib
import threading
import time
from contextlib import contextmanager

import pytest
from torch import nn

from vllm_shift.failure import describe_step
from vllm_shift.stuck import StuckStepWatch

LIMIT = 0.5


class Layer(nn.Module):
    """Waits, as a rank does in a collective that the others do not come to."""

    def __init__(self, released: threading.Event) -> None:
        super().__init__()
        self.prefix, self._released = "model.layers.1.mlp.down_proj", released

    def forward(self) -> None:
        self._released.wait(30)


class IdleDevice:
    def is_idle(self) -> bool:
        return True


class BusyDevice:
    def is_idle(self) -> bool:
        return False


@contextmanager
def watch(device=None):
    found = StuckStepWatch(3, device, LIMIT)
    thread = next(each for each in reversed(threading.enumerate()) if each.name == "StuckStepWatch")
    yield found
    found.close()
    thread.join(5)
    assert not thread.is_alive()


def wait_for(caplog, count):
    end = time.monotonic() + 20
    while len(caplog.messages) < count and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.parametrize(("threshold", "mode"), [(32, "SP"), (64, "TP")])
def test_mode_size_and_layer_are_named_once(threshold, mode, caplog_vllm):
    released = threading.Event()
    layer = Layer(released)
    with watch() as found:

        def run():
            with found.step(describe_step(64, threshold)):
                layer()

        step = threading.Thread(target=run)
        step.start()
        wait_for(caplog_vllm, 1)
        time.sleep(LIMIT)
        released.set()
        step.join()
    (line,) = caplog_vllm.messages
    assert line.startswith(
        f"Rank 3: A step in {mode} mode of 64 tokens (threshold {threshold}) has not ended after 0.4 s"
    )
    assert "it is in model.layers.1.mlp.down_proj (Condition.wait)." in line
    assert "vLLM gives up after 0.5 s (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)" in line


def test_a_step_whose_device_does_not_come_to_its_end(caplog_vllm):
    with watch(BusyDevice) as found:
        with found.step(describe_step(64, 32)):
            pass
        wait_for(caplog_vllm, 1)
    assert "it is on the device, after the call that launched it" in caplog_vllm.text


class NearlyIdleDevice:
    def __init__(self):
        self._answers = iter([False])

    def is_idle(self) -> bool:
        return next(self._answers, True)


@pytest.mark.parametrize("device", [None, IdleDevice, NearlyIdleDevice])
def test_nothing_is_said_of_steps_that_end_or_fail(device, caplog_vllm):
    with watch(device) as found:
        with found.step(describe_step(64, 32)):
            pass
        time.sleep(2 * LIMIT)
        with pytest.raises(ZeroDivisionError), found.step(describe_step(64, 32)):
            raise ZeroDivisionError
        time.sleep(2 * LIMIT)
    assert caplog_vllm.messages == []


class BrokenDevice:
    def is_idle(self) -> bool:
        raise RuntimeError("CUDA error")


@pytest.mark.parametrize(
    ("device", "ends"), [(None, True), (IdleDevice, True), (BusyDevice, False), (BrokenDevice, True)]
)
def test_whether_the_device_ends(device, ends):
    with watch(device) as found:
        assert found.device_ends_within(0.05)  # no step has run
        with contextlib.suppress(ZeroDivisionError), found.step(describe_step(64, 32)):
            raise ZeroDivisionError
        assert found.device_ends_within(0.05) == ends
        with found.step(describe_step(64, 32)):
            pass
        assert found.device_ends_within(0.05) == ends
