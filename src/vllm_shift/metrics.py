"""The step counts on vLLM's own ``/metrics`` endpoint.

The counts are made in the worker of rank 0, the endpoint is served by another process. In between lies one small record
in shared memory: the worker counts in it, and a collector of ``prometheus_client`` reads it when the endpoint is asked.
No message is sent, no step waits, and nothing is registered in a server without Shift Parallelism.
"""

import os
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm import envs
from vllm.logger import init_logger

from vllm_shift.stats import BUCKETS, COUNTS, MODES

logger = init_logger(f"vllm.{__name__}")

# Memory, not disk: a step must not wait until a page has been written back. vLLM's own queues are there, too.
_FOLDER = Path("/dev/shm")

_collector: "ShiftCollector | None" = None


class ShiftCollector(Collector):
    """Turns a record of counts into Prometheus metrics.

    Args:
        counts: one ``COUNTS`` record, shape [1], by engine: the number that vLLM's own metrics have as a label, too.
        model_name: value of the other label of vLLM's.
    """

    def __init__(self, counts: dict[int, NDArray[np.void]], model_name: str) -> None:
        self._counts, self._model_name = counts, model_name

    def describe(self) -> Iterable[Metric]:
        """The metrics without values, for the registry's check of names."""
        names = ["model_name", "engine"]
        yield GaugeMetricFamily(
            "vllm:shift_threshold_tokens", "Largest number of tokens of a step that runs in TP mode.", labels=names
        )
        yield CounterMetricFamily(
            "vllm:shift_mode_changes", "Steps that ran in another mode than the step before.", labels=names
        )
        names = [*names, "mode"]
        yield CounterMetricFamily("vllm:shift_steps", "Steps, by mode (tp or sp).", labels=names)
        yield CounterMetricFamily("vllm:shift_tokens", "Tokens scheduled in steps, by mode (tp or sp).", labels=names)
        yield HistogramMetricFamily(
            "vllm:shift_step_time_seconds", "Time of a step's forward pass, by mode (tp or sp).", labels=names
        )

    def collect(self) -> Iterable[Metric]:
        """The metrics with their values now; without values where no worker counts in the record."""
        families: list[Any] = list(self.describe())
        for engine, record in self._counts.items():
            (counts,) = record.copy()
            if counts["started"]:
                self._add(families, counts, [self._model_name, str(engine)])
            else:
                logger.warning_once(
                    "Shift Parallelism has no metrics of engine %d: its rank 0 has not started, or is on another host.",
                    engine,
                )
        return families

    def _add(self, families: list[Any], counts: np.void, of_engine: list[str]) -> None:
        threshold, changes, steps, tokens, times = families
        threshold.add_metric(of_engine, int(counts["max_tp_tokens"]))
        changes.add_metric(of_engine, int(counts["mode_changes"]))
        for name, mode in zip(MODES, counts["modes"], strict=True):
            labels = [*of_engine, name]
            steps.add_metric(labels, int(mode["steps"]))
            tokens.add_metric(labels, int(mode["tokens"]))
            bounds = [*map(str, BUCKETS), "+Inf"]
            buckets = list(zip(bounds, mode["buckets"].cumsum().tolist(), strict=True))
            times.add_metric(labels, buckets=buckets, sum_value=float(mode["seconds"]))


def publish(vllm_config: Any) -> None:
    """In the process that serves ``/metrics``: show the counts of this engine, in place of an earlier engine's."""
    global _collector
    if os.getenv("PROMETHEUS_MULTIPROC_DIR") or envs.VLLM_RUST_FRONTEND_PATH:
        logger.warning(
            "/metrics will not have the metrics of Shift Parallelism: with several API server processes, "
            "PROMETHEUS_MULTIPROC_DIR or vLLM's Rust front-end it does not come from this process."
        )
    if _collector is not None:
        with suppress(KeyError):  # others may have emptied the registry
            REGISTRY.unregister(_collector)
        _collector = None
    paths = {engine: _path(vllm_config, engine) for engine in _engines(vllm_config.parallel_config)}
    for path in paths.values():
        np.zeros(1, COUNTS).tofile(path)
    counts = {engine: _map(path) for engine, path in paths.items()}
    _collector = ShiftCollector(counts, vllm_config.model_config.served_model_name)
    REGISTRY.register(_collector)
    for path in paths.values():
        # For an engine that never starts; open_counts removes the name otherwise.
        weakref.finalize(_collector, path.unlink, missing_ok=True)


def open_counts(vllm_config: Any) -> NDArray[np.void] | None:
    """In the worker of rank 0: the record to count in, or None where nobody reads it (``--disable-log-stats``)."""
    path = _path(vllm_config, vllm_config.parallel_config.data_parallel_index)
    if not path.exists():
        return None
    counts = _map(path)
    # Both sides have it mapped by now; without a name it goes when they do, however they end.
    path.unlink()
    return counts


def _engines(parallel: Any) -> range:
    """Of this process: as the ``engine_ranks_managed`` of vLLM's MPClient (vllm/v1/engine/core_client.py)."""
    size = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    if parallel.data_parallel_rank_local is not None:  # one engine a process, without a server
        size = 1
    return range(parallel.data_parallel_rank, parallel.data_parallel_rank + size)


def _path(vllm_config: Any, engine: int) -> Path:
    # vLLM gives every config an id and sends it to the workers with the rest; data-parallel engines share it.
    return _FOLDER / f"vllm-shift-{vllm_config.instance_id}-{engine}"


def _map(path: Path) -> NDArray[np.void]:
    # A plain view of it: steps count in it, and every access of a memmap makes another memmap.
    return np.asarray(np.memmap(path, dtype=COUNTS, mode="r+", shape=(1,)))
