"""Several ranks on one GPU, for correctness only: collectives go through host memory and gloo, because NCCL refuses it.

CUDA graphs cannot record that, so engines run with ``cudagraph_mode`` NONE.
"""

import os
import socket
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.platforms.cuda import CudaPlatform

from vllm_shift import exchange


class StagedCommunicator(DeviceCommunicatorBase):
    """Collectives on copies in host memory."""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        return super().all_reduce(input_.cpu()).to(input_.device)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return super().all_gather(input_.cpu(), dim).to(input_.device)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        gathered = super().gather(input_.cpu(), dst, dim)
        return None if gathered is None else gathered.to(input_.device)


def staged_all_to_all(received: torch.Tensor, x: torch.Tensor, group: Any) -> None:
    host = torch.empty(x.shape, dtype=x.dtype)
    dist.all_to_all_single(host, x.cpu(), group=group)
    received.copy_(host)


def engine_args() -> dict[str, Any]:
    """Prepare this process to be a rank; returns the arguments of ``vllm.LLM`` that go with it."""
    CudaPlatform.dist_backend = "gloo"
    CudaPlatform.get_device_communicator_cls = classmethod(lambda cls: "shared_gpu.StagedCommunicator")
    exchange.all_to_all_single = staged_all_to_all
    return {
        "distributed_executor_backend": "external_launcher",
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 2_000_000_000,
        "compilation_config": {"cudagraph_mode": "NONE", "pass_config": {"fuse_allreduce_rms": False}},
    }


def is_rank() -> bool:
    """Whether this process was started by ``run_ranks``."""
    return "RANK" in os.environ


def run_ranks(world: int) -> int:
    """Run this command again, once a rank, all on the first GPU; only rank 0 prints. Returns an exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env=env | {"RANK": str(rank)}, stdout=None if rank == 0 else subprocess.DEVNULL
        )
        for rank in range(world)
    ]
    return max(abs(process.wait()) for process in ranks)
