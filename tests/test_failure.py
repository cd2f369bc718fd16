"""A capture of CUDA graphs that fails on one rank, in vLLM's own code around captures."""

import pytest
from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

from vllm_shift.failure import captures_that_fail


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
    with captures_that_fail([one, other]):
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
        with captures_that_fail([all_reduce]):
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
