"""Workers for ``one_rank.py``: one rank of an engine on one GPU, collectives replaced by local copies of the same size.

vLLM sees an engine of one rank and a model whose heads, intermediate size and vocabulary are those of a TP=P shard.
"""

import itertools
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

from vllm_shift import exchange
from vllm_shift.config import CONFIG_KEY, ShiftConfig
from vllm_shift.dims import ParallelDims
from vllm_shift.switch import ModeSwitch
from vllm_shift.worker import ShiftWorkerMixin, weight_bytes


class MeasuredWorker(Worker):
    """The stock worker; every step is timed with CUDA events, which are read when ``timings`` is called."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        self.facts = {"weight_bytes": weight_bytes(self.model_runner.get_model())}

    def compile_or_warm_up_model(self) -> Any:
        capture = self.model_runner.capture_model

        def measured_capture() -> int:
            self.facts["graph_bytes"] = capture()
            return self.facts["graph_bytes"]

        self.model_runner.capture_model = measured_capture
        times = super().compile_or_warm_up_model()
        self.events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        output = super().execute_model(scheduler_output)
        end.record()
        if (num_tokens := scheduler_output.total_num_scheduled_tokens) and hasattr(self, "events"):
            self.events.append((num_tokens, begin, end))
        return output

    def timings(self) -> list[tuple[int, float, float]]:
        """Tokens, ms on the GPU and ms until the next step began, for every step since the last call."""
        torch.cuda.synchronize()
        events, self.events = self.events, []
        begins = [begin for _, begin, _ in events]
        waits = [begin.elapsed_time(after) for begin, after in itertools.pairwise(begins)]
        return [
            (tokens, begin.elapsed_time(end), wait)
            for (tokens, begin, end), wait in zip(events, [*waits, float("nan")], strict=False)
        ]

    def start_trace(self) -> None:
        self.trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.trace.start()

    def stop_trace(self) -> list[tuple[str, int, float]]:
        """Name, calls and ms of every kernel since ``start_trace``."""
        torch.cuda.synchronize()
        self.trace.stop()
        return [(event.key, event.count, event.self_device_time_total / 1e3) for event in self.trace.key_averages()]


class OneRankDims(ParallelDims):
    """Rank 0 of an engine whose other ranks do not exist."""

    @property
    def world(self) -> int:
        return 1


class LocalGroup(SimpleNamespace):
    """In place of a process group: every collective is a copy as large as its result."""

    __hash__ = object.__hash__
    device_communicator = None

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([x] * self.world_size, dim)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def graph_capture(self, context: Any) -> AbstractContextManager[Any]:
        return nullcontext(context)


class LocalHandle:
    """In place of the handle of symmetric memory: the buffers of all other ranks are one, on this GPU."""

    rank = 0

    def __init__(self, memory: torch.Tensor, ranks: int) -> None:
        self.world_size = ranks
        self._elsewhere = torch.empty_like(memory)
        self.buffer_ptrs = [memory.data_ptr()] + [self._elsewhere.data_ptr()] * (ranks - 1)
        memory.normal_()  # nobody writes what would come

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def get_buffer(self, rank: int, shape: torch.Size, dtype: torch.dtype, first: int) -> torch.Tensor:
        return self._elsewhere[first : first + shape.numel()].view(shape)


def local_all_to_all(received: torch.Tensor, x: torch.Tensor, group: Any) -> None:
    received.copy_(x)


class OneRankWorker(ShiftWorkerMixin, MeasuredWorker):
    """One rank with Shift Parallelism; its settings are in ``additional_config["one_rank"]``."""

    def init_device(self) -> None:
        MeasuredWorker.init_device(self)
        exchange.all_to_all_single = local_all_to_all
        self.vllm_config.additional_config[CONFIG_KEY] = settings = self.vllm_config.additional_config["one_rank"]
        self.shift_config = ShiftConfig.from_dict(settings)
        sp, tp = self.shift_config.ulysses_sequence_parallel_size, self.shift_config.tensor_parallel_size
        sp_group, tp_group = (
            LocalGroup(
                unique_name=name,
                world_size=size,
                device_group=SimpleNamespace(group_name=name),
                device=self.device,
                rank=0,
                rank_in_group=0,
                first_rank=0,
                ranks=[0],
            )
            for name, size in (("sp", sp), ("rows", tp))
        )
        self.switch = ModeSwitch(
            OneRankDims(sp, tp, 0), self.shift_config.max_tp_tokens, sp_group, tp_group if tp > 1 else None
        )
        if self.vllm_config.additional_config["exchange"] == "peers":
            from vllm_shift import peers  # here, for machines without Triton

            peers.why_not_direct = lambda group: None
            peers.symmetric_memory.rendezvous = lambda memory, name: LocalHandle(memory, sp)
        # Local copies take no memory of a CUDA graph.
        self.switch.nccl_collectives = lambda: 0
