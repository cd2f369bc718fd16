"""What the worker changes about the memory that vLLM leaves for the KV cache, what it leaves alone, what it refuses."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.worker_base import WorkerBase

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


class DrawingSelfCheck:
    """Its requests draw seeds, as those of vLLM's V2 model runner do."""

    def __init__(self, worker, execute):
        pass

    def run(self):
        np.random.randint(100, size=3)
        return False


def test_the_self_check_leaves_random_numbers_as_they_were(monkeypatch):
    class Stock(WorkerBase):
        execute_model = None

        def compile_or_warm_up_model(self):
            set_random_seed(self.model_config.seed)

    class Worker(ShiftWorkerMixin, Stock):
        def __init__(self):
            self.rank, self.model_config = 0, SimpleNamespace(seed=7)
            self.shift_config = SimpleNamespace(is_auto=False, self_check=True)
            self.switch = SimpleNamespace(graph_capture=lambda: lambda capture: capture, max_tp_tokens=256)
            self.model_runner = SimpleNamespace(capture_model=None)
            self.shift_counter = SimpleNamespace(start=lambda threshold: None)
            self._fit_threshold_to_graphs, self._run_largest_step = lambda: None, lambda in_sp: None

    monkeypatch.setattr("vllm_shift.worker.SelfCheck", DrawingSelfCheck)
    Worker()._warm_up()
    drawn = np.random.randint(2**31, size=4).tolist()
    set_random_seed(7)
    assert drawn == np.random.randint(2**31, size=4).tolist()


def worker(quantization=None, lora_config=None, rank=1, executor="mp"):
    """One of two ranks."""
    worker = SimpleNamespace(
        model_config=SimpleNamespace(quantization=quantization),
        vllm_config=SimpleNamespace(lora_config=lora_config),
        parallel_config=SimpleNamespace(distributed_executor_backend=executor, world_size=2),
        rank=rank,
    )
    worker._refuse = partial(ShiftWorkerMixin._refuse, worker)
    return worker


@pytest.mark.parametrize("of", [worker(quantization="fp8"), worker(lora_config=object())], ids=["quantized", "LoRA"])
def test_sleep_that_gives_up_what_could_not_be_loaded_again_is_refused(of):
    with pytest.raises(NotImplementedError, match="sleep at level 1"):
        ShiftWorkerMixin.sleep(of, level=2)


def test_reloads_that_would_leave_old_weights_are_refused():
    with pytest.raises(NotImplementedError, match="quantized model"):
        ShiftWorkerMixin.reload_weights(worker(quantization="fp8"))
    with pytest.raises(NotImplementedError, match="layout of a checkpoint"):
        ShiftWorkerMixin.reload_weights(worker(), is_checkpoint_format=False)


@pytest.mark.parametrize("method", ["save_sharded_state", "save_tensorized_model"])
def test_saving_weights_is_refused(method, monkeypatch):
    monkeypatch.setattr("vllm_shift.worker.get_tp_group", lambda: SimpleNamespace(world_size=2))
    with pytest.raises(NotImplementedError, match="stock vLLM with TP=2"):
        getattr(ShiftWorkerMixin, method)(worker(), "folder")


def test_the_last_rank_refuses_for_all_where_one_process_reads_their_answers():
    first = worker(quantization="fp8", rank=0)
    ShiftWorkerMixin.sleep(first, level=2)
    ShiftWorkerMixin.reload_weights(first)
    with pytest.raises(NotImplementedError):
        ShiftWorkerMixin.sleep(worker(quantization="fp8", rank=0, executor="external_launcher"), level=2)
