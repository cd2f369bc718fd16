"""Several ranks on one GPU, for correctness only: collectives go through shared host memory, because NCCL refuses it.

Each collective is three things in a CUDA stream, which CUDA graphs record, too: a copy to the rank's place in memory
that all ranks share, a host function that waits for the other ranks (meeting.c), and copies from their places.
"""

import ctypes
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.platforms.cuda import CudaPlatform

from vllm_shift import exchange

PLACE_BYTES = 64 << 20
COUNTERS_BYTES = mmap.PAGESIZE

_regions: dict[Any, "Region"] = {}


class Region:
    """The host memory that the ranks of a process group share: counters, then one place a rank."""

    def __init__(self, cpu_group: Any) -> None:
        self.rank, self.world = dist.get_rank(cpu_group), dist.get_world_size(cpu_group)
        size = COUNTERS_BYTES + self.world * PLACE_BYTES
        path = [tempfile.mkstemp(dir="/dev/shm")[1] if self.rank == 0 else None]
        dist.broadcast_object_list(path, group=cpu_group, group_src=0)
        with open(path[0], "r+b") as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), size, 0))
        dist.barrier(cpu_group)
        if self.rank == 0:
            os.unlink(path[0])
        # Kept alive, because host functions in CUDA graphs point to it.
        self._meeting = (ctypes.c_long * 3)(self._bytes.data_ptr(), self.rank, self.world)
        self._cudart = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        self._meet = ctypes.CDLL(os.environ["SHARED_GPU_MEETING"]).meet

    def meet(self) -> None:
        """Let the current stream wait until all ranks' streams are here."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = self._cudart.cudaLaunchHostFunc(stream, self._meet, ctypes.byref(self._meeting))
        assert error == 0, error

    def close(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr()))

    def place(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        """A rank's place, as a tensor of this shape and dtype."""
        assert like.nbytes <= PLACE_BYTES, like.shape
        begin = COUNTERS_BYTES + rank * PLACE_BYTES
        return self._bytes[begin : begin + like.nbytes].view(like.dtype).view(like.shape)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``x`` of every rank, on the device."""
        x = x.contiguous()
        self.place(self.rank, x).copy_(x, non_blocking=True)
        self.meet()
        gathered = [torch.empty_like(x) for _ in range(self.world)]
        for rank, copy in enumerate(gathered):
            copy.copy_(self.place(rank, x), non_blocking=True)
        self.meet()  # before a place is written again
        return gathered


class StagedCommunicator(CudaCommunicator):
    """Collectives through a ``Region``. A ``CudaCommunicator`` by name only: CUDA graphs ask for one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        DeviceCommunicatorBase.__init__(self, *args, **kwargs)
        self.ca_comm = self.qr_comm = self.symm_mem_comm = self.fi_ar_comm = None
        # The mode switch asks whether vLLM can reduce-scatter; here the method below does.
        self.pynccl_comm: Any = SimpleNamespace(disabled=False)
        self.region = _regions[self.device_group] = Region(self.cpu_group)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.region.gather(input_)).sum(0, dtype=torch.float32).to(input_.dtype)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self.region.gather(input_), dim)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        gathered = self.all_gather(input_, dim)
        return gathered if self.rank_in_group == dst else None

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return self.all_reduce(input_).chunk(self.world_size, dim)[self.rank_in_group].contiguous()

    def destroy(self) -> None:
        _regions.pop(self.device_group).close()


def staged_all_to_all(received: torch.Tensor, x: torch.Tensor, group: Any) -> None:
    region = _regions[group]
    for block, sent in zip(received, region.gather(x), strict=True):
        block.copy_(sent[region.rank])


def engine_args(own_gpus: bool = False) -> dict[str, Any]:
    """Prepare this process to be a rank; returns the arguments of ``vllm.LLM`` that go with it."""
    if not own_gpus:
        CudaPlatform.dist_backend = "gloo"
        CudaPlatform.get_device_communicator_cls = classmethod(lambda cls: "shared_gpu.StagedCommunicator")
        exchange.all_to_all_single = staged_all_to_all
    return {
        "distributed_executor_backend": "external_launcher",
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 2_000_000_000,
        "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
    }


def is_rank() -> bool:
    """Whether this process was started by ``run_ranks``."""
    return "RANK" in os.environ


def run_ranks(world: int, own_gpus: bool = False) -> int:
    """Run this command again, once a rank, all on the first GPU or each on its own; only rank 0 prints.

    Returns an exit code.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(port), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        env["SHARED_GPU_MEETING"] = library = f"{folder}/meeting.so"
        source = Path(__file__).with_name("meeting.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        ranks = [
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank if own_gpus else 0)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(world)
        ]
        return max(abs(process.wait()) for process in ranks)
