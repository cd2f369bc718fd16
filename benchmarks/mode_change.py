"""What a change of mode costs between two steps: steps of both modes in turn, over the mean of each by itself.

Steps are dummy runs of the model runner, with CUDA graphs as in serving, one right after the other; scheduling and
sampling, which know of no mode, are left out. Both ranks run in step, because of their collectives.
Example: python benchmarks/mode_change.py --shape 8b --sp 2 --threshold 256
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engines import SHAPES, add_engine_flags, engine_kwargs, write_config
from vllm import LLM
from vllm.plugins import load_general_plugins


class Steps:
    """A worker extension: what ``collective_rpc`` calls on every rank."""

    def time_steps(self: Any, tokens: list[int], rounds: int) -> float:
        """Milliseconds a step, of steps of so many tokens in turn."""
        for count in tokens * 3:
            self.model_runner._dummy_run(count)
        _synchronize()
        begin = time.perf_counter()
        for count in tokens * rounds:
            self.model_runner._dummy_run(count)
        _synchronize()
        return 1e3 * (time.perf_counter() - begin) / rounds / len(tokens)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(llm: LLM, tp_tokens: int, sp_tokens: int, rounds: int, repeats: int) -> dict[str, Any]:
    """Medians over ``repeats`` of the three, of the slowest rank, and of what a change adds."""
    kinds = {"tp_ms": [tp_tokens], "sp_ms": [sp_tokens], "in_turn_ms": [tp_tokens, sp_tokens]}
    times: dict[str, list[float]] = {kind: [] for kind in [*kinds, "change_ms"]}
    for _ in range(repeats):
        for kind, tokens in kinds.items():
            times[kind].append(max(llm.collective_rpc("time_steps", args=(tokens, rounds))))
        times["change_ms"].append(times["in_turn_ms"][-1] - (times["tp_ms"][-1] + times["sp_ms"][-1]) / 2)
    found: dict[str, Any] = {kind: round(statistics.median(each), 4) for kind, each in times.items()}
    return found | {"changes_ms": [round(each, 4) for each in times["change_ms"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_engine_flags(parser)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument(
        "--steps", nargs="*", default=["64/512", "256/512", "256/4096"], metavar="TP/SP", help="tokens in each mode"
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    load_general_plugins()  # which add their flags to LLM
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(SHAPES[args.shape], Path(folder))
        llm = LLM(model=str(model), load_format="dummy", worker_extension_cls="mode_change.Steps",
                  **engine_kwargs(args))  # fmt: skip
    for pair in args.steps:
        tp_tokens, sp_tokens = map(int, pair.split("/"))
        row = {"shape": args.shape, "tp_tokens": tp_tokens, "sp_tokens": sp_tokens}
        print("RESULT", json.dumps(row | measure(llm, tp_tokens, sp_tokens, args.rounds, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
