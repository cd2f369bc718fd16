"""What the worker changes about the memory that vLLM leaves for the KV cache."""

from types import SimpleNamespace

import pytest

from vllm_shift.worker import ShiftWorkerMixin


class StockWorker:
    """Has 1,000 MiB, of which it keeps what its model runner counts."""

    def determine_available_memory(self):
        return 1000 * 2**20 - self.model_runner.profile_cudagraph_memory()


@pytest.mark.parametrize(
    ("counted", "through_peers", "left"),
    [(0, True, 1000 - 2 * 80 * 0.4), (0, False, 1000 - 2 * 80 * 0.8), (9, True, 991)],
)
def test_memory_for_graphs_of_sp_mode_is_left_where_vllm_counts_none(monkeypatch, counted, through_peers, left):
    class Worker(ShiftWorkerMixin, StockWorker):
        def __init__(self):
            self.switch = SimpleNamespace(is_sp_step=lambda tokens: tokens > 256, through_peers=through_peers)
            self.model_runner = SimpleNamespace(profile_run=None, profile_cudagraph_memory=lambda: counted * 2**20)
            compilation = SimpleNamespace(cudagraph_capture_sizes=[1, 256, 272, 512])
            self.vllm_config = SimpleNamespace(compilation_config=compilation)
            self.model_config, self.parallel_config = SimpleNamespace(get_num_layers=lambda parallel: 80), None
            self._shift_groups = []

    monkeypatch.setattr("vllm_shift.worker.current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr("vllm_shift.worker.get_tp_group", lambda: SimpleNamespace(device_communicator=None))
    assert Worker().determine_available_memory() == int(left * 2**20)
