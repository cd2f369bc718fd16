"""Whether all ranks have the same settings, and, with ``VLLM_SHIFT_DEBUG=1``, whether they run the same steps.

Ranks that disagree wait for each other in different collectives, which is a hang without a word. Settings are compared
once, at start-up. To compare steps costs an all-gather of a few numbers on the CPU before each: off by default.
"""

import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup

from vllm_shift.failure import mode_name

VARIABLE = "VLLM_SHIFT_DEBUG"


def debug_wanted() -> bool:
    """Whether the environment asks for the comparison.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def check_settings(group: ProcessGroup, settings: Mapping[str, Any]) -> None:
    """Compare what decides the modes and sizes of steps; every rank has to call.

    The ranks of one node have it from one command line, each node has its own.

    Args:
        group: a process group of the CPU (gloo) with every rank of the engine.
        settings: this rank's, by name.

    Raises:
        ValueError: the ranks disagree; on every rank, with the values of each.
    """
    views: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(views, dict(settings), group=group)
    for name in {name: None for view in views for name in view}:
        values = [view.get(name) for view in views]
        if any(value != values[0] for value in values):
            shown = "; ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise ValueError(
                f"Shift Parallelism: {name} is not the same on all ranks: {shown}. "
                "Start all nodes with the same flags, variables and version"
            )


class StepCheck:
    """Compares steps across the ranks of a group.

    Args:
        group: a process group of the CPU (gloo) with every rank of the engine.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self._steps = group, 0

    def __call__(self, max_tp_tokens: int, num_tokens: Iterable[int]) -> None:
        """Compare the step that is about to run; every rank has to call.

        Args:
            max_tp_tokens: this rank's threshold.
            num_tokens: tokens of each request of the step, in the scheduler's order; none in a step without any.

        Raises:
            RuntimeError: the ranks disagree; on every rank, with the view of each.
        """
        counts = list(num_tokens)
        digest = zlib.crc32(repr(counts).encode())
        own = torch.tensor([self._steps, max_tp_tokens, sum(counts), len(counts), digest])
        views = [torch.empty_like(own) for _ in range(self._group.size())]
        torch.distributed.all_gather(views, own, group=self._group)
        if any(not torch.equal(view, own) for view in views):
            shown = "; ".join(f"rank {rank}: {_describe(*view.tolist())}" for rank, view in enumerate(views))
            raise RuntimeError(f"Shift Parallelism: the ranks disagree on a step. {shown}")
        self._steps += 1


def _describe(step: int, max_tp_tokens: int, tokens: int, requests: int, digest: int) -> str:
    return (
        f"step {step} in {mode_name(tokens, max_tp_tokens)} mode, {tokens} tokens of {requests} requests "
        f"(token counts {digest:08x}), threshold {max_tp_tokens}"
    )
