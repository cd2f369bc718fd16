"""The threshold that finds itself: the policy on given step times, and the cache of step times."""

import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_exchange import SimpleGroup
from torch import nn
from vllm.config import CUDAGraphMode

from vllm_shift import calibrate, threshold
from vllm_shift.dims import ParallelDims
from vllm_shift.graphs import fit_to_graphs, padded_sizes
from vllm_shift.switch import ModeSwitch
from vllm_shift.threshold import StepTimes, TimesCache, candidates, decided, find_threshold

MOST = 8192
NCCL = (False, False)
SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 2049, 64)]


def times(crossing: float, noise: float = 0.0, tokens: list[int] | None = None) -> list[StepTimes]:
    """Times of an engine whose modes are equally fast at ``crossing`` tokens."""
    generator = random.Random(0)

    def ms(fixed: float, per_token: float, count: int) -> float:
        return (fixed + per_token * count) * (1 + generator.uniform(-noise, noise))

    return [
        StepTimes(count, ms(4, 0.012, count), ms(4 + 0.004 * crossing, 0.008, count))
        for count in tokens or candidates(MOST)
    ]


def test_candidates_span_all_steps():
    assert candidates(8192) == [1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert candidates(300) == [1, 16, 32, 64, 128, 256, 300]
    assert candidates(1) == [1]
    assert candidates(16) == [1, 16]
    assert candidates(20_000) == candidates(16_384) == [*candidates(8192), 16_384]


@pytest.mark.parametrize("crossing", [100, 256, 700, 1500, 3000])
def test_the_crossing_is_found(crossing):
    found = find_threshold(times(crossing), MOST, [])
    assert crossing / 1.3 < found < crossing * 1.3


@pytest.mark.parametrize("crossing", [100, 256, 700, 1500])
def test_up_to_the_last_graph_size_the_threshold_is_a_size(crossing):
    found = find_threshold(times(crossing), MOST, SIZES)
    assert found in SIZES
    assert crossing / 1.4 < found < crossing * 1.3


def test_above_the_graph_sizes_it_is_any_number():
    assert find_threshold(times(5000), MOST, SIZES) > SIZES[-1]


@pytest.mark.parametrize("crossing", [256, 1500])
def test_noise_costs_little(crossing):
    noisy, exact = times(crossing, noise=0.03), {step.tokens: step for step in times(crossing)}
    found = find_threshold(noisy, MOST, SIZES)
    for count, step in exact.items():
        chosen = step.tp_ms if count <= found else step.sp_ms
        assert chosen <= 1.06 * min(step.tp_ms, step.sp_ms)


def test_one_outlier_does_not_split_the_range():
    steps = times(1500)
    steps[4] = StepTimes(steps[4].tokens, 2 * steps[4].tp_ms, steps[4].sp_ms)
    assert find_threshold(steps, MOST, SIZES) > 500


def test_any_two_neighbours_may_be_out_of_order():
    assert find_threshold([StepTimes(1, 2, 3), StepTimes(16, 2, 4)], MOST, SIZES) == MOST
    assert find_threshold([StepTimes(1, 2, 1), StepTimes(16, 2, 1.5)], MOST, SIZES) == 0
    steps = [StepTimes(1, 1, 2), StepTimes(16, 1, 1.2), StepTimes(64, 1, 1.5), StepTimes(256, 1, 0.8)]
    assert 64 < find_threshold(steps, MOST, []) < 256


def test_one_mode_may_be_always_faster():
    assert find_threshold([StepTimes(1, 2, 1), StepTimes(4096, 20, 10)], MOST, SIZES) == 0
    assert find_threshold([StepTimes(1, 1, 2), StepTimes(8192, 10, 20)], MOST, SIZES) == MOST
    assert find_threshold([StepTimes(1, 1, 2)], 1, []) == 1


def test_trials_end_when_sp_mode_has_won_twice():
    won, lost = StepTimes(8, 10, 9), StepTimes(8, 10, 9.8)
    assert decided([lost, won, won])
    assert not decided([won, lost])
    assert not decided([won])
    assert not decided([])


@pytest.mark.parametrize(
    ("found", "words"),
    [(0, "SP mode is always faster"), (300, "steps of up to 300 tokens run in TP mode"), (MOST, "TP mode is always")],
)
def test_the_log_says_what_was_seen_and_what_follows(found, words):
    line = calibrate.describe([StepTimes(16, 1.0, 2.5)], found, MOST, "measured now, 0.1 s")
    assert "(measured now, 0.1 s)" in line
    assert "16: 1.00 / 2.50" in line
    assert f"So {words}" in line


@pytest.fixture
def vllm_config(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))

    def build(config_hash: str = "a") -> SimpleNamespace:
        return SimpleNamespace(
            compute_hash=lambda: config_hash,
            scheduler_config=SimpleNamespace(max_num_batched_tokens=MOST),
            compilation_config=SimpleNamespace(cudagraph_mode=0, max_cudagraph_capture_size=512),
        )

    return build


def test_the_cache_gives_back_what_an_equal_engine_measured(vllm_config, monkeypatch):
    steps = times(300)
    assert TimesCache(vllm_config(), NCCL).load() is None
    TimesCache(vllm_config(), NCCL).save(steps)
    assert TimesCache(vllm_config(), NCCL).load() == steps
    assert TimesCache(vllm_config("b"), NCCL).load() is None
    assert TimesCache(vllm_config(), (True, False)).load() is None
    assert TimesCache(vllm_config(), (False, True)).load() is None
    with monkeypatch.context() as other:
        other.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
        assert TimesCache(vllm_config(), NCCL).load() is None
    assert TimesCache(vllm_config(), NCCL).load() == steps


def test_the_cache_is_of_this_engine_and_device(vllm_config, monkeypatch):
    TimesCache(vllm_config(), NCCL).save(times(300))
    for name, value in (("max_num_batched_tokens", 1), ("cudagraph_mode", 2), ("max_cudagraph_capture_size", 8)):
        other = vllm_config()
        place = other.scheduler_config if hasattr(other.scheduler_config, name) else other.compilation_config
        setattr(place, name, value)
        assert TimesCache(other, NCCL).load() is None
    with monkeypatch.context() as other:
        other.setattr(threshold.current_platform, "get_device_name", lambda: "another GPU")
        assert TimesCache(vllm_config(), NCCL).load() is None
    with monkeypatch.context() as other:
        other.setattr("torch.__version__", "0")
        assert TimesCache(vllm_config(), NCCL).load() is None
    assert TimesCache(vllm_config(), NCCL).load() is not None


class Positions(nn.Module):
    def forward(self, positions):
        return positions


def test_each_mode_is_timed_in_steps_of_its_own(monkeypatch):
    switch, model = ModeSwitch(ParallelDims(2, 1, 0), 5, SimpleGroup(unique_name="sp", world_size=2), None), Positions()
    runner = SimpleNamespace(device="cpu", get_model=lambda: model)
    # vLLM's model runners pad.
    runner._dummy_run = lambda count, cudagraph_runtime_mode: model(positions=torch.zeros(count + 3))
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE))
    monkeypatch.setattr(calibrate, "set_forward_context", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(calibrate, "_time", lambda run, device: 1.0 if switch.max_tp_tokens >= 16 else 2.0)
    assert calibrate._time_step(13, runner, switch, config) == StepTimes(16, tp_ms=1.0, sp_ms=2.0)
    assert switch.max_tp_tokens == 5


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 1, "times": []}', '{"key"', "null"])
def test_a_broken_cache_is_measured_again(vllm_config, tmp_path, content, caplog_vllm):
    cache = TimesCache(vllm_config(), NCCL)
    cache.save(times(300))
    (path,) = tmp_path.rglob("*.json")
    key = json.loads(path.read_text())["key"]
    path.write_text(content)
    assert cache.load() is None
    path.write_text(json.dumps({"key": key, "times": [{"tokens": 1}]}))
    assert cache.load() is None
    assert "cannot be read" in caplog_vllm.text


def test_a_cache_that_cannot_be_written_is_no_failure(vllm_config, tmp_path, caplog_vllm):
    (tmp_path / "shift_parallel").write_text("a file where the folder should be")
    TimesCache(vllm_config(), NCCL).save(times(300))
    assert "cannot be kept" in caplog_vllm.text


@pytest.mark.engine
def test_ranks_measure_one_threshold_and_the_next_start_finds_it(groups):
    first, again = ([result[name] for result in groups(2).results] for name in ("check-auto", "check-auto-again"))
    (threshold,) = {found["threshold"] for found in first + again}
    assert 0 <= threshold <= 128
    for ranks, source in ((first, "measured now"), (again, "measured before")):
        (line,) = [line for line in ranks[0]["lines"] if "step times" in line]
        assert source in line
        assert "1: " in line
        assert not any("step times" in line for line in ranks[1]["lines"])


def test_a_threshold_is_a_graph_size_up_to_the_last_of_them():
    # As vLLM rounds sizes with five draft tokens a request.
    sizes = [6, 12, 252, 258, 510]
    assert [fit_to_graphs(wanted, sizes) for wanted in (0, 5, 6, 256, 258, 510, 511, 9000)] == [
        0, 0, 6, 252, 258, 510, 511, 9000,
    ]  # fmt: skip
    assert fit_to_graphs(256, []) == 256


@pytest.mark.parametrize(
    ("mode", "drafts", "sizes"),
    [
        ("FULL_AND_PIECEWISE", 2, [1, 8, 256, 512]),
        ("FULL", 2, [1, 8, 256, 512]),
        ("FULL_DECODE_ONLY", 0, [1, 8, 256, 512]),
        ("FULL_DECODE_ONLY", 2, [3, 9, 258]),  # and 513, which is more than the largest
    ],
)
def test_steps_are_padded_to_what_graphs_are_made_of(mode, drafts, sizes):
    compilation = SimpleNamespace(cudagraph_capture_sizes=[1, 8, 256, 512], cudagraph_mode=CUDAGraphMode[mode])
    config = SimpleNamespace(compilation_config=compilation, num_speculative_tokens=drafts)
    assert padded_sizes(config) == sizes
    compilation.cudagraph_capture_sizes = None
    assert padded_sizes(config) == []


def test_the_crossing_is_where_the_lines_meet():
    steps = [StepTimes(1, 1, 4), StepTimes(16, 1, 2), StepTimes(64, 2, 1), StepTimes(256, 4, 1)]
    assert find_threshold(steps, MOST, []) == 32
    # Equally fast from 16 tokens on: the first of them.
    assert find_threshold([StepTimes(1, 1, 2), StepTimes(16, 1, 1), StepTimes(256, 1, 1)], 256, []) == 16


def test_equally_fast_modes_leave_steps_to_sp_mode():
    assert find_threshold([StepTimes(1, 1, 1), StepTimes(16, 1, 1)], MOST, []) == 0


def test_the_first_two_may_be_out_of_order():
    steps = [StepTimes(1, 1, 0.9), StepTimes(16, 1, 2), StepTimes(256, 1, 0.5)]
    assert 16 < find_threshold(steps, MOST, []) < 256


def test_a_second_engine_is_kept_beside_the_first(vllm_config):
    TimesCache(vllm_config(), NCCL).save(times(300))
    TimesCache(vllm_config("b"), NCCL).save(times(700))
    assert TimesCache(vllm_config(), NCCL).load() == times(300)
    assert TimesCache(vllm_config("b"), NCCL).load() == times(700)


def test_a_cache_without_times_is_measured_again(vllm_config):
    cache = TimesCache(vllm_config(), NCCL)
    cache.save([])
    assert cache.load() is None


@pytest.mark.parametrize(
    ("mode", "largest", "graphed"),
    [("PIECEWISE", 16, True), ("PIECEWISE", 15, False), ("PIECEWISE", None, False), ("NONE", 16, False)],
)
def test_steps_are_timed_as_they_will_run(mode, largest, graphed):
    compilation = SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode], max_cudagraph_capture_size=largest)
    assert calibrate._is_graphed(16, SimpleNamespace(compilation_config=compilation)) is graphed


def test_a_time_is_the_median_after_a_first_run(monkeypatch):
    clock, runs = iter([0, 3, 10, 11, 20, 22, 30, 32, 40, 49]), []
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(clock))
    waited = SimpleNamespace(synchronize=lambda: runs.append("wait"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: waited)
    assert calibrate._time(lambda: runs.append("run"), "cpu") == 2000
    assert runs == ["run", *["wait", "run", "wait"] * 5]


def test_rank_0_decides_for_all_and_keeps_what_was_measured(vllm_config, monkeypatch):
    config, measured, messages = vllm_config(), [], []
    config.compilation_config.cudagraph_capture_sizes = SIZES
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    switch = SimpleNamespace(exchange=SimpleNamespace(peers=None), early=False)

    def group(rank):
        def broadcast(value, src):
            if rank == src:
                messages.append(value)
            return value if rank == src else messages.pop(0)

        return SimpleNamespace(rank_in_group=rank, broadcast_object=broadcast)

    def on_rank(rank):
        monkeypatch.setattr(calibrate, "get_world_group", lambda: group(rank))
        return calibrate.calibrate(None, switch, config)

    def time_step(tokens, *_):
        measured.append(tokens)
        return StepTimes(tokens, tp_ms=1.0, sp_ms=300 / tokens)

    monkeypatch.setattr(calibrate, "_time_step", time_step)
    monkeypatch.setattr(calibrate, "_slowest_rank", lambda step: step)
    found = on_rank(0)
    assert 200 < found <= 512
    assert found in SIZES
    # SP mode had won twice by then.
    assert measured == [1, 16, 32, 64, 128, 256, 512, 1024]
    assert on_rank(1) == found
    assert len(measured) == 16
    # The next engine has the times from the cache, and other ranks have them from rank 0.
    assert on_rank(0) == on_rank(1) == found
    assert len(measured) == 16


def test_the_slowest_rank_counts(monkeypatch):
    def all_reduce(milliseconds, op, group):
        assert (op, group) == (torch.distributed.ReduceOp.MAX, "cpu")
        milliseconds.copy_(torch.maximum(milliseconds, torch.tensor([2.0, 3.0], dtype=milliseconds.dtype)))

    monkeypatch.setattr(calibrate, "get_world_group", lambda: SimpleNamespace(cpu_group="cpu"))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert calibrate._slowest_rank(StepTimes(16, 1.25, 5.1)) == StepTimes(16, 2.0, 5.1)
