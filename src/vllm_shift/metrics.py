"""The step counts on vLLM's own ``/metrics`` endpoint.

The counts are made in the worker of rank 0, the endpoint is served by another process. In between lies one small record
in shared memory: the worker counts in it, and a collector of ``prometheus_client`` reads it when the endpoint is asked.
No message is sent, no step waits, and nothing is registered in a server without Shift Parallelism.
"""

import os
import weakref
from collections.abc import Iterable
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
        counts: one ``COUNTS`` record, shape [1].
        model_name: value of the label that vLLM's own metrics have, too.
    """

    def __init__(self, counts: NDArray[np.void], model_name: str) -> None:
        self._counts, self._labels = counts, [model_name, "0"]

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
        threshold, changes, steps, tokens, times = families
        (counts,) = self._counts.copy()
        if not counts["started"]:
            logger.warning_once("Shift Parallelism has no metrics: the worker of rank 0 is not on this host.")
            return families
        threshold.add_metric(self._labels, int(counts["max_tp_tokens"]))
        changes.add_metric(self._labels, int(counts["mode_changes"]))
        for name, mode in zip(MODES, counts["modes"], strict=True):
            labels = [*self._labels, name]
            steps.add_metric(labels, int(mode["steps"]))
            tokens.add_metric(labels, int(mode["tokens"]))
            bounds = [*map(str, BUCKETS), "+Inf"]
            buckets = list(zip(bounds, mode["buckets"].cumsum().tolist(), strict=True))
            times.add_metric(labels, buckets=buckets, sum_value=float(mode["seconds"]))
        return families


def publish(vllm_config: Any) -> None:
    """In the process that serves ``/metrics``: show the counts of this engine, in place of an earlier engine's."""
    global _collector
    if os.getenv("PROMETHEUS_MULTIPROC_DIR") or envs.VLLM_RUST_FRONTEND_PATH:
        logger.warning(
            "/metrics will not have the metrics of Shift Parallelism: with PROMETHEUS_MULTIPROC_DIR or vLLM's Rust "
            "front-end it does not come from this process. Unset them to have these metrics."
        )
    if _collector is not None:
        REGISTRY.unregister(_collector)
    path = _path(vllm_config)
    np.zeros(1, COUNTS).tofile(path)
    _collector = ShiftCollector(_map(path), vllm_config.model_config.served_model_name)
    REGISTRY.register(_collector)
    # For an engine that never starts; open_counts removes the name otherwise.
    weakref.finalize(_collector, path.unlink, missing_ok=True)


def open_counts(vllm_config: Any) -> NDArray[np.void] | None:
    """In the worker of rank 0: the record to count in, or None where nobody reads it (``--disable-log-stats``)."""
    path = _path(vllm_config)
    if not path.exists():
        return None
    counts = _map(path)
    # Both sides have it mapped by now; without a name it goes when they do, however they end.
    path.unlink()
    return counts


def _path(vllm_config: Any) -> Path:
    # vLLM gives every engine an id of its own and sends it to the workers with the rest of the config.
    return _FOLDER / f"vllm-shift-{vllm_config.instance_id}"


def _map(path: Path) -> NDArray[np.void]:
    return np.memmap(path, dtype=COUNTS, mode="r+", shape=(1,))
