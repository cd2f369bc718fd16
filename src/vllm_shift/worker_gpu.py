"""The worker of vLLM's CUDA backend, with Shift Parallelism; it serves the V1 and the V2 model runner."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_shift.worker import ShiftWorkerMixin


class ShiftGPUWorker(ShiftWorkerMixin, Worker):
    """``Worker`` with Shift Parallelism."""
