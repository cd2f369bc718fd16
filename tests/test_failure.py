"""What the log says of a step that failed, and captures of CUDA graphs that fail, in vLLM's own code around them."""

import pytest
from torch import nn
from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

from vllm_shift.failure import describe_failure, describe_step, failed_captures_end_at_once


class Layer(nn.Module):
    def __init__(self, prefix: str, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.prefix, self.inner = prefix, inner

    def forward(self) -> None:
        if self.inner is None:
            raise RuntimeError("connection closed by peer")
        self.inner()


def test_a_failed_step_names_mode_and_layer():
    with pytest.raises(RuntimeError) as raised:
        Layer("model", Layer("model.layers.1.mlp.down_proj"))()
    line = describe_failure(raised.value, describe_step(num_tokens=90, max_tp_tokens=32))
    assert line == (
        "A step in SP mode of 90 tokens (threshold 32) failed in model.layers.1.mlp.down_proj: "
        "RuntimeError: connection closed by peer"
    )
    assert "failed: ValueError: x" in describe_failure(ValueError("x"), "A step")
    assert "in TP mode of 32 tokens" in describe_step(num_tokens=32, max_tp_tokens=32)
    # The name of the layer around it, where the innermost one has none.
    with pytest.raises(RuntimeError) as raised:
        Layer("model", Layer(""))()
    assert "failed in model: " in describe_failure(raised.value, "A step")


class AllReduce(CustomAllreduce):
    """Without GPUs; ``broadcasts`` are the messages to other ranks."""

    def __init__(self):
        self.disabled, self.broadcasts = False, []

    def register_graph_buffers(self):
        self.broadcasts.append("addresses")

    def __del__(self):
        pass


def test_a_capture_that_fails_does_not_wait_for_other_ranks():
    one, other = AllReduce(), AllReduce()
    with failed_captures_end_at_once([one, other]):
        with one.capture():
            pass
        with pytest.raises(RuntimeError, match="out of memory"), one.capture(), other.capture():
            raise RuntimeError("out of memory")
        with other.capture():
            pass
    assert (one.broadcasts, other.broadcasts) == (["addresses"], ["addresses"])
    assert "register_graph_buffers" not in vars(one)


def test_a_capture_where_an_error_is_handled_is_registered():
    """As of an engine that is made with less memory after one that did not start."""
    all_reduce = AllReduce()
    try:
        raise RuntimeError("out of memory")
    except RuntimeError:
        with failed_captures_end_at_once([all_reduce]):
            with all_reduce.capture():
                pass
            with pytest.raises(ValueError, match="again"), all_reduce.capture():
                raise ValueError("again") from None
    assert all_reduce.broadcasts == ["addresses"]


def test_without_it_vllm_would_wait():
    all_reduce = AllReduce()
    with pytest.raises(RuntimeError), all_reduce.capture():
        raise RuntimeError("out of memory")
    assert all_reduce.broadcasts == ["addresses"]
