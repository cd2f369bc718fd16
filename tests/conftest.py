"""Shared by all tests: the environment of vLLM's CPU backend, set before anything imports vLLM."""

import os

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # more ranks than NUMA nodes
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # halves the start of an eager engine
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tests send functions to workers
    "HF_HUB_OFFLINE": "1",
}

import logging

import pytest
from rank_group import Group


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    """Results of all engines of a number of ranks, made once."""
    made: dict[tuple[int, bool], Group] = {}

    def group(world: int, nightly: bool = False) -> Group:
        key = world, nightly
        if key not in made:
            made[key] = Group(world, nightly, tmp_path_factory.mktemp(f"ranks{world}"))
        return made[key]

    return group


@pytest.fixture
def caplog_vllm(caplog):
    """``caplog`` for vLLM's logger, which does not propagate to the root."""
    logging.getLogger("vllm").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("vllm").removeHandler(caplog.handler)
