"""What the cost model of ``vllm-shift plan`` predicts, beside what was measured. Needs no GPU.

``results/planner_points.csv`` has the measured points, ``results/planner_points.md`` where they come from.

Example: python benchmarks/planner_accuracy.py
"""

import csv
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_shift_cli import costs
from vllm_shift_cli.plan import SHAPES

POINTS = Path(__file__).parent / "results" / "planner_points.csv"

# What timing a single prefill from outside adds: nothing runs before it to hide the host's work.
# ``device``: CUDA events around one step; ``caller``: the clock of who calls ``vllm.LLM``.
IDLE_START_MS = {"device": 1.5, "caller": 6.0}

# Larger steps have no CUDA graph in stock vLLM; the host takes longer to launch their kernels than the GPU to run them.
STOCK_GRAPH_TOKENS = 512

# Around the middle of the 64 steps that were timed, after prompts of 16 tokens.
DECODE_CACHED = 48


@dataclass(frozen=True)
class Point:
    """One measured figure beside its prediction, in the same unit."""

    source: str
    gpu: str
    quantity: str
    model: str
    layout: costs.Layout
    tokens: int
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted / measured."""
        return self.predicted / self.measured

    @property
    def group(self) -> str:
        """Points with one tolerance."""
        if self.quantity == "layer_us":
            rows = -(-self.tokens // self.layout.sp)
            return f"matrix products of a layer, {'512 rows and more' if rows >= 512 else 'fewer than 512 rows'}"
        without_graph = self.layout.sp == 1 and self.tokens > STOCK_GRAPH_TOKENS
        if self.quantity == "step_ms":
            return "step without attention, kernels launched one by one" if without_graph else "step without attention"
        if self.quantity == "prefill_ms":
            size = "2048 tokens and more" if self.tokens >= 2048 else "fewer than 2048 tokens"
            timed = "several GPUs" if _is_of_several(self.source) else "one rank"
            if timed == "several GPUs" and without_graph and self.tokens < 2048:
                return "prefill, several GPUs, kernels launched one by one"
            return f"prefill, {timed}, {size}"
        return {"decode_ms": "decode", "kv_tokens": "KV cache tokens", "weight_bytes": "weights",
                "bus_gb_s": "NCCL bus bandwidth"}[self.quantity]  # fmt: skip


def _is_of_several(source: str) -> bool:
    return "two GPUs" in source or "four GPUs" in source


def predict(row: dict[str, str], achieved: costs.Achieved) -> float:
    gpu, quantity = costs.GPUS[row["gpu"]], row["quantity"]
    if quantity == "bus_gb_s":
        return gpu.link_gb_s * achieved.link
    model, layout = SHAPES[row["model"]], costs.Layout(int(row["sp"]), int(row["tp"]))
    if quantity == "kv_tokens":
        return costs.kv_tokens(model, layout, gpu, achieved)
    if quantity == "weight_bytes":
        return costs.weight_bytes(model, layout)
    tokens, requests = int(row["tokens"]), int(row["requests"])
    if quantity == "layer_us":
        return 1e6 * costs.layer_matmul_s(model, layout, tokens, gpu, achieved)
    decode = quantity == "decode_ms"
    batch = costs.Batch(requests, 1, DECODE_CACHED) if decode else costs.Batch(requests, tokens // requests)
    step = costs.step_time(model, layout, batch, costs.Cluster(gpu), achieved)
    seconds = step.total if decode else step.gpu
    if quantity == "step_ms":
        return 1e3 * (seconds - step.attention - step.rest)
    if not _is_of_several(row["source"]):
        # One rank: vLLM saw no other, or collectives were local copies.
        seconds -= step.communication
        if layout.sp > 1:
            moved = 2 * model.layers * sum(costs.exchange_bytes(model, layout, tokens))
            seconds += moved / (gpu.hbm_gb_s * 1e9 * achieved.elementwise_bandwidth)
    return 1e3 * seconds + (0 if decode else IDLE_START_MS[row["timed_by"]])


def points(achieved: costs.Achieved = costs.ACHIEVED) -> Iterator[Point]:
    """Every measured point with its prediction."""
    with POINTS.open() as file:
        for row in csv.DictReader(file):
            layout = costs.Layout(int(row["sp"] or 1), int(row["tp"] or 1))
            yield Point(row["source"], row["gpu"], row["quantity"], row["model"], layout, int(row["tokens"] or 0),
                        float(row["value"]), predict(row, achieved))  # fmt: skip


def main() -> None:
    groups: dict[str, list[Point]] = {}
    for point in points():
        groups.setdefault(point.group, []).append(point)
    print("| points | number | predicted / measured: median | lowest | highest |\n| --- | --- | --- | --- | --- |")
    for name, found in sorted(groups.items()):
        ratios = [point.ratio for point in found]
        print(f"| {name} | {len(found)} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    print("\nThe ten farthest off:\n")
    for point in sorted(points(), key=lambda point: -abs(math.log(point.ratio)))[:10]:
        print(f"- {point.source}, {point.quantity} {point.model} {point.layout}, {point.tokens} tokens: "
              f"measured {point.measured:g}, predicted {point.predicted:.4g}")  # fmt: skip


if __name__ == "__main__":
    main()
