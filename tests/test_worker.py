"""What the worker changes about the memory that vLLM leaves for the KV cache, what it leaves alone, what it refuses."""

import gc
import inspect
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.config import CUDAGraphMode
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.worker.worker_base import WorkerBase

from vllm_shift.config import CONFIG_KEY, ShiftConfig
from vllm_shift.worker import ShiftWorkerMixin


class StockWorker:
    """Has 1,000 MiB, of which it keeps what its model runner counts."""

    def determine_available_memory(self):
        return 1000 * 2**20 - self.model_runner.profile_cudagraph_memory()


@pytest.mark.parametrize(
    ("counted", "collectives", "of_runner", "left"),
    [
        (0, 0, {}, 1000 - 2 * 80 * 0.4),
        (0, 2, {"lora_capture_cases": [0]}, 1000 - 2 * 80 * 0.8),
        (0, 4, {}, 1000 - 2 * 80 * 1.2),
        (0, 0, {"lora_capture_cases": [0, 1, 2, 4, 5]}, 1000 - 5 * 2 * 80 * 0.4),
        (9, 0, {}, 991),
    ],
)
def test_memory_for_graphs_of_sp_mode_is_left_where_vllm_counts_none(
    monkeypatch, counted, collectives, of_runner, left
):
    class Worker(ShiftWorkerMixin, StockWorker):
        def __init__(self):
            self.switch = SimpleNamespace(is_sp_step=lambda tokens: tokens > 256, nccl_collectives=lambda: collectives)
            self.model_runner = SimpleNamespace(
                profile_run=None, profile_cudagraph_memory=lambda: counted * 2**20, **of_runner
            )
            compilation = SimpleNamespace(cudagraph_capture_sizes=[1, 256, 272, 512])
            self.vllm_config = SimpleNamespace(compilation_config=compilation)
            self.model_config, self.parallel_config = SimpleNamespace(get_num_layers=lambda parallel: 80), None
            self._shift_groups = []

    monkeypatch.setattr("vllm_shift.worker.current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr("vllm_shift.worker.get_tp_group", lambda: SimpleNamespace(device_communicator=None))
    assert Worker().determine_available_memory() == int(left * 2**20)


@pytest.mark.parametrize(
    ("sp", "tp", "made"),
    [(4, 1, []), (2, 2, [("ulysses_sp", [[0, 1], [2, 3]]), ("ulysses_tp", [[0, 2], [1, 3]])])],
)
def test_an_engine_with_sp_over_all_ranks_shares_their_group(monkeypatch, sp, tp, made):
    class Stock(WorkerBase):
        def init_device(self):
            pass

    class Worker(ShiftWorkerMixin, Stock):
        def __init__(self):
            settings = ShiftConfig(ulysses_sequence_parallel_size=sp, tensor_parallel_size=tp).to_dict()
            self.vllm_config = SimpleNamespace(additional_config={CONFIG_KEY: settings})

        def _check_settings(self):
            pass

    all_ranks = SimpleNamespace(unique_name="tp:0", rank_in_group=1, world_size=4)
    groups = []

    def new_group(ranks, stage_size, name):
        groups.append((name, ranks))
        return SimpleNamespace(unique_name=f"{name}:0", world_size=2)

    monkeypatch.setattr("vllm_shift.worker.get_tp_group", lambda: all_ranks)
    monkeypatch.setattr("vllm_shift.worker.why_not_direct", lambda group: None)
    monkeypatch.setattr("vllm_shift.worker._new_group", new_group)
    worker = Worker()
    worker.init_device()
    assert groups == made
    assert (worker.switch.sp_group is all_ranks) == (not made)
    # vLLM destroys its own itself.
    assert [group.unique_name for group in worker._shift_groups] == [f"{name}:0" for name, _ in made]


def attention_group(**attributes):
    return SimpleNamespace(metadata_builders=[SimpleNamespace(**attributes)])


@pytest.mark.parametrize(
    ("mode", "speculated", "largest"),
    [("FULL_AND_PIECEWISE", 0, 256), ("FULL_DECODE_ONLY", 3, 1024), ("FULL", 0, 4096), ("PIECEWISE", 0, 256)],
)
def test_attention_splits_keys_up_to_the_largest_step_of_a_full_cuda_graph(mode, speculated, largest):
    groups = [[attention_group(max_cudagraph_size=4096), attention_group()], [attention_group(max_cudagraph_size=128)]]
    draft = attention_group(max_cudagraph_size=4096)
    runner = SimpleNamespace(attn_groups=groups, drafter=SimpleNamespace(draft_attn_groups=[draft]))
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
        scheduler_config=SimpleNamespace(max_num_seqs=256),
        num_speculative_tokens=speculated,
    )

    class Stock(WorkerBase):
        def initialize_from_config(self, kv_cache_config):
            assert kv_cache_config == "of this rank"
            self.model_runner, self.vllm_config = runner, config  # builders are made there

    class Worker(ShiftWorkerMixin, Stock):
        def __init__(self):
            pass

    Worker().initialize_from_config("of this rank")
    sizes = [vars(builder) for group in (*groups[0], *groups[1], draft) for builder in group.metadata_builders]
    assert sizes == [{"max_cudagraph_size": largest}, {}, {"max_cudagraph_size": 128}, {"max_cudagraph_size": largest}]


def test_vllms_attention_has_the_limit_of_its_splits_where_it_is_set():
    source = inspect.getsource(FlashAttentionMetadataBuilder.build)
    assert "num_actual_tokens <= self.max_cudagraph_size" in source


def test_the_watch_of_a_worker_that_is_deleted_ends():
    class Stock(WorkerBase):
        def __init__(self):
            self.rank, self.vllm_config = 1, None
            self.parallel_config = SimpleNamespace(distributed_executor_backend="external_launcher")

    class Worker(ShiftWorkerMixin, Stock):
        pass

    worker = Worker()
    watch = worker._watch
    assert not watch._closed.is_set()
    del worker
    gc.collect()
    assert watch._closed.is_set()


@pytest.mark.parametrize(("seconds", "patience"), [(None, 2), (60, 57), (1, 0)])
def test_a_busy_device_has_as_long_as_vllm_gives_workers(monkeypatch, seconds, patience):
    class Worker(ShiftWorkerMixin, WorkerBase):
        def __init__(self):
            self.rank, self._shift_groups = 1, []
            self.parallel_config = SimpleNamespace(distributed_executor_backend="mp")
            self.shift_counter = SimpleNamespace(close=lambda: None)
            self._watch = SimpleNamespace(close=lambda: None, device_ends_within=self.device_ends_within)

        def device_ends_within(self, limit):
            self.asked = limit
            return True

    if seconds is not None:
        monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", str(seconds))
    monkeypatch.setattr(WorkerBase, "shutdown", lambda self: None)
    worker = Worker()
    worker.shutdown()
    assert worker.asked == patience


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
            self.switch = SimpleNamespace(
                graph_capture=lambda: lambda capture: capture, max_tp_tokens=256, finish_saves=lambda: None
            )
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
