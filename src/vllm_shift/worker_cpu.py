"""The worker of vLLM's CPU backend, with Shift Parallelism."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_shift.worker import ShiftWorkerMixin


class ShiftCPUWorker(ShiftWorkerMixin, CPUWorker):
    """``CPUWorker`` with Shift Parallelism."""
