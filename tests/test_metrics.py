"""What is counted of the steps, and how it reaches /metrics; a fake device says how long steps take."""

import itertools
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.reader import get_metrics_snapshot

from vllm_shift import metrics, stats
from vllm_shift.stats import BUCKETS, COUNTS, StepCounter
from vllm_shift.timing import ClockMark, CudaMark


class Device:
    """A device that runs behind the process: a mark is passed once ``time`` has come to it."""

    def __init__(self, lag: float = 0.0) -> None:
        self.enqueued = self.passed = 0.0
        self.lag = lag

    def run(self, seconds: float) -> None:
        self.enqueued += seconds
        self.passed = max(self.passed, self.enqueued - self.lag)

    def mark(self) -> SimpleNamespace:
        at = self.enqueued
        return SimpleNamespace(at=at, has_passed=lambda: at <= self.passed, seconds_since=lambda start: at - start.at)


def samples(collector) -> dict[tuple, float]:
    """What a scraper reads: name, mode and bucket -> value."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        (sample.name, *(sample.labels[name] for name in ("mode", "le") if name in sample.labels)): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


@pytest.fixture
def engine():
    """A config as far as the metrics read it, under a name that no other engine has."""
    parallel = {
        "data_parallel_size": 1, "data_parallel_size_local": 1, "data_parallel_index": 0,
        "data_parallel_rank": 0, "data_parallel_rank_local": None, "local_engines_only": False,
    }  # fmt: skip
    return SimpleNamespace(
        instance_id=f"test-{time.time_ns()}",
        model_config=SimpleNamespace(served_model_name="a model"),
        parallel_config=SimpleNamespace(**parallel),
    )


@pytest.fixture(autouse=True)
def timer(monkeypatch):
    """Stands for the timer of the log line; what it is started with. A real one would write into other tests' logs."""
    started = []
    monkeypatch.setattr(stats, "Timer", lambda seconds, write: started.append(write) or SimpleNamespace(
        start=lambda: None, cancel=lambda: None, daemon=False))  # fmt: skip
    return started


@pytest.fixture(autouse=True)
def clean_registry():
    yield
    if metrics._collector is not None:
        REGISTRY.unregister(metrics._collector)
        metrics._collector = None


def take_steps(counter: StepCounter, device: Device, steps: list[tuple[bool, int, float]]) -> None:
    for in_sp, num_tokens, seconds in steps:
        with counter.step(in_sp, num_tokens):
            device.run(seconds)


# SP mode or not, tokens, seconds; sums of powers of two are exact.
STEPS = [(False, 1, 0.25), (False, 2, 0.5), (True, 100, 2.0), (True, 90, 20.0), (False, 3, 0.5078125)]


def test_steps_tokens_and_mode_changes():
    counter, device = StepCounter(ClockMark), Device()
    counter.start(32)
    take_steps(counter, device, STEPS)
    assert counter.totals() == {
        "tp_steps": 3, "tp_tokens": 6, "sp_steps": 2, "sp_tokens": 190, "mode_changes": 2,
    }  # fmt: skip
    counter.start(16)
    assert set(counter.totals().values()) == {0}
    take_steps(counter, device, [(True, 20, 0.1)])
    assert counter.totals()["mode_changes"] == 0  # the first step has no step before it


def test_from_the_worker_to_the_endpoint(engine):
    metrics.publish(engine)
    device = Device()
    counter = StepCounter(device.mark, metrics.open_counts(engine))
    counter.start(32)
    take_steps(counter, device, STEPS)
    found = samples(metrics._collector)
    assert found["vllm:shift_threshold_tokens",] == 32
    assert found["vllm:shift_mode_changes_total",] == 2
    for name, value in counter.totals().items():
        mode, _, what = name.partition("_")
        if mode in stats.MODES:
            assert found[f"vllm:shift_{what}_total", mode] == value
    # A step of exactly 0.5 s is one of at most 0.5 s; 20 s are above the largest bound.
    bucket = "vllm:shift_step_time_seconds_bucket"
    assert [found[bucket, "tp", bound] for bound in ("0.15", "0.25", "0.5", "1.0", "+Inf")] == [0, 1, 2, 3, 3]
    assert [found[bucket, "sp", bound] for bound in ("1.0", "2.5", "10.0", "+Inf")] == [0, 1, 1, 2]
    assert found["vllm:shift_step_time_seconds_sum", "tp"] == 1.2578125
    assert found["vllm:shift_step_time_seconds_count", "sp"] == 2
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_a_threshold_found_at_start_up_is_the_one_shown(engine):
    metrics.publish(engine)
    counter = StepCounter(ClockMark, metrics.open_counts(engine))
    counter.start(256)
    counter.start(777)
    assert samples(metrics._collector)["vllm:shift_threshold_tokens",] == 777


def test_a_device_that_lags_is_not_waited_for_and_times_keep_their_mode(engine):
    metrics.publish(engine)
    device = Device(lag=1.5)
    counter = StepCounter(device.mark, metrics.open_counts(engine))
    counts = ("vllm:shift_step_time_seconds_count", "tp"), ("vllm:shift_step_time_seconds_count", "sp")
    for number in range(8):
        take_steps(counter, device, [(number % 2 == 1, 5, 1.0 + number % 2)])
        timed = sum(samples(metrics._collector)[key] for key in counts)
        assert timed in (number - 1, number)
    device.lag = 0.0
    take_steps(counter, device, [(False, 5, 1.0)])
    found = samples(metrics._collector)
    expected = {"tp": 5 * 1.0, "sp": 4 * 2.0}
    for mode, seconds in expected.items():
        assert found["vllm:shift_step_time_seconds_sum", mode] == pytest.approx(seconds)


def test_the_clock_of_the_cpu_backend():
    start = ClockMark()
    time.sleep(0.01)
    assert 0.01 <= ClockMark().seconds_since(start) < 5


def test_a_failed_step_is_counted_and_not_timed(engine):
    metrics.publish(engine)
    counter = StepCounter(ClockMark, metrics.open_counts(engine))
    with pytest.raises(RuntimeError), counter.step(True, 9):
        raise RuntimeError("out of memory")
    found = samples(metrics._collector)
    assert found["vllm:shift_steps_total", "sp"] == 1
    assert found["vllm:shift_step_time_seconds_count", "sp"] == 0


def test_a_second_engine_in_one_process_takes_the_place_of_the_first(engine):
    metrics.publish(engine)
    StepCounter(ClockMark, metrics.open_counts(engine)).start(1)
    second = SimpleNamespace(**vars(engine) | {"instance_id": engine.instance_id + "-2"})
    metrics.publish(second)
    unregister_vllm_metrics()  # as vLLM's own logger does for every engine
    counter = StepCounter(ClockMark, metrics.open_counts(second))
    counter.start(2)
    shown = [metric for metric in get_metrics_snapshot() if metric.name.startswith("vllm:shift")]
    (threshold,) = [metric.value for metric in shown if metric.name == "vllm:shift_threshold_tokens"]
    assert threshold == 2
    assert {metric.labels["model_name"] for metric in shown} == {"a model"}


def test_data_parallel_engines_have_their_own_counts(engine):
    engine.parallel_config.data_parallel_size = 2
    metrics.publish(engine)
    counters = []
    for index in (0, 1):
        engine.parallel_config.data_parallel_index = index
        counters.append(StepCounter(ClockMark, metrics.open_counts(engine)))
        counters[-1].start(100 + index)
    with counters[1].step(in_sp=True, num_tokens=200):
        pass
    families = {family.name: family.samples for family in metrics._collector.collect()}
    found = {sample.labels["engine"]: sample.value for sample in families["vllm:shift_threshold_tokens"]}
    assert found == {"0": 100, "1": 101}
    steps = {(each.labels["engine"], each.labels["mode"]): each.value for each in families["vllm:shift_steps"]}
    assert steps == {("0", "tp"): 0, ("0", "sp"): 0, ("1", "tp"): 0, ("1", "sp"): 1}


@pytest.mark.parametrize(
    ("parallel", "engines"),
    [
        ({}, ["0", "1", "2", "3"]),
        # Hybrid load balancing: this node's engines.
        ({"data_parallel_size_local": 2, "data_parallel_rank": 2, "local_engines_only": True}, ["2", "3"]),
        # External load balancing: an engine a server; without a server: an engine a process.
        ({"data_parallel_rank": 3, "local_engines_only": True}, ["3"]),
        ({"data_parallel_rank": 1, "data_parallel_rank_local": 1}, ["1"]),
    ],
)
def test_engines_that_this_process_serves(engine, parallel, engines):
    vars(engine.parallel_config).update({"data_parallel_size": 4} | parallel)
    metrics.publish(engine)
    for index in range(4):
        engine.parallel_config.data_parallel_index = index
        if str(index) in engines:
            StepCounter(ClockMark, metrics.open_counts(engine)).start(1)
        else:
            assert metrics.open_counts(engine) is None
    families = {family.name: family.samples for family in metrics._collector.collect()}
    assert [sample.labels["engine"] for sample in families["vllm:shift_threshold_tokens"]] == engines


def test_no_file_is_left(engine):
    metrics.publish(engine)
    metrics.open_counts(engine)
    assert not metrics._path(engine, 0).exists()
    never_starts = SimpleNamespace(**vars(engine) | {"instance_id": engine.instance_id + "-2"})
    metrics.publish(never_starts)
    path = metrics._path(never_starts, 0)
    assert path.exists()
    REGISTRY.unregister(metrics._collector)
    metrics._collector = None
    assert not path.exists()


def test_without_log_stats_nothing_is_published(engine):
    assert metrics.open_counts(engine) is None


def test_a_worker_on_another_host_is_named(engine, caplog_vllm):
    metrics.publish(engine)
    assert samples(metrics._collector) == {}
    assert "its rank 0 has not started, or is on another host" in caplog_vllm.text


def test_a_registry_that_others_have_emptied(engine):
    metrics.publish(engine)
    REGISTRY.unregister(metrics._collector)
    metrics.publish(engine)
    assert metrics._collector in REGISTRY._collector_to_names


def test_a_registry_that_cannot_show_the_metrics_is_named(engine, monkeypatch, caplog_vllm):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", os.curdir)
    metrics.publish(engine)
    assert "will not have the metrics of Shift Parallelism" in caplog_vllm.text


def test_the_line_has_what_is_new_since_the_last(caplog_vllm):
    device = Device()
    counter = StepCounter(device.mark, np.zeros(1, COUNTS))
    counter.start(32)
    take_steps(counter, device, STEPS)
    counter._write()
    take_steps(counter, device, [(False, 7, 0.25)])
    counter._write()
    assert caplog_vllm.messages[-2:] == [
        "Shift Parallelism: TP mode 3 steps (6 tokens, 419.3 ms each), SP mode 2 steps (190 tokens, 11000.0 ms each), "
        "2 mode changes; threshold 32 tokens; since start TP 3, SP 2 steps.",
        "Shift Parallelism: TP mode 1 steps (7 tokens, 250.0 ms each), SP mode 0 steps (0 tokens), "
        "0 mode changes; threshold 32 tokens; since start TP 4, SP 2 steps.",
    ]


def test_the_line_comes_only_while_steps_run(timer):
    counter = StepCounter(ClockMark, np.zeros(1, COUNTS))
    take_steps(counter, Device(), STEPS)
    assert len(timer) == 0  # a step of the start-up
    counter.start(32)
    take_steps(counter, Device(), STEPS)
    assert len(timer) == 1
    timer[0]()
    assert len(timer) == 1
    take_steps(counter, Device(), STEPS)
    assert len(timer) == 2
    counter.close()
    take_steps(counter, Device(), STEPS)
    timer[1]()
    take_steps(counter, Device(), STEPS)
    assert len(timer) == 2


def test_the_timer_holds_nothing_up(monkeypatch):
    made = []

    class Timer:
        daemon = False

        def __init__(self, seconds, write):
            self.events = []
            made.append(self)

        def start(self):
            self.events.append(("start", self.daemon))

        def cancel(self):
            self.events.append("cancel")

    monkeypatch.setattr(stats, "Timer", Timer)
    counter = StepCounter(ClockMark, np.zeros(1, COUNTS))
    counter.close()  # before any step
    counter.start(32)
    take_steps(counter, Device(), STEPS)
    counter.close()
    assert [timer.events for timer in made] == [[("start", True), "cancel"]]


def test_without_a_record_steps_are_counted_and_no_more(timer):
    counter = StepCounter(lambda: pytest.fail("timed"))
    counter.start(32)
    take_steps(counter, Device(), STEPS)
    assert counter.totals()["tp_steps"] == 3
    assert not timer


def test_only_what_cannot_show_the_metrics_is_named(engine, monkeypatch, caplog_vllm):
    metrics.publish(engine)
    assert "will not have the metrics" not in caplog_vllm.text
    monkeypatch.setattr(metrics, "envs", SimpleNamespace(VLLM_RUST_FRONTEND_PATH="/bin/frontend"))
    metrics.publish(engine)
    assert "will not have the metrics of Shift Parallelism" in caplog_vllm.text


def test_a_gpu_counts_milliseconds(monkeypatch):
    class Event:
        clock = itertools.count(0, 1500)

        def record(self):
            self.at = next(self.clock)

        def elapsed_time(self, end):
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    start, end = CudaMark(), CudaMark()
    assert end.seconds_since(start) == 1.5
