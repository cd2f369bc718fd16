"""What a failed step was doing: its mode, its size and the layer it was in; and captures of CUDA graphs that fail."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any

from torch import nn


def mode_name(num_tokens: int, max_tp_tokens: int) -> str:
    """The mode of a step of so many tokens with this threshold, for the log."""
    return "SP" if num_tokens > max_tp_tokens else "TP"


def describe_step(num_tokens: int, max_tp_tokens: int) -> str:
    """Name of a step for the log, from its tokens and the threshold."""
    return f"A step in {mode_name(num_tokens, max_tp_tokens)} mode of {num_tokens} tokens (threshold {max_tp_tokens})"


def describe_failure(error: BaseException, step: str) -> str:
    """One line for the log: the step, from ``describe_step``, and what it raised."""
    layer = innermost_layer(error.__traceback__)
    where = f" in {layer}" if layer else ""
    return f"{step} failed{where}: {type(error).__name__}: {error}"


def innermost_layer(traceback: TracebackType | None) -> str | None:
    """Name of the innermost layer that raised; None in CUDA graphs and compiled code, which have no such frames."""
    found = None
    while traceback is not None:
        found = layer_of(traceback.tb_frame) or found
        traceback = traceback.tb_next
    return found


def layer_of(frame: FrameType) -> str | None:
    """Name of the layer that a frame belongs to."""
    # The hooks of ModeSwitch have the module as `layer`, its own methods as `self`.
    for module in (frame.f_locals.get("layer"), frame.f_locals.get("self")):
        if isinstance(module, nn.Module):
            name = vars(module).get("layer_name") or vars(module).get("prefix")
            if isinstance(name, str) and name:
                return name
    return None


@contextmanager
def failed_captures_end_at_once(all_reduces: Iterable[Any]) -> Iterator[None]:
    """While this is open, an error during the capture of CUDA graphs ends the capture at once.

    vLLM's custom all-reduce ends every capture, also a failed one, with broadcasts among all ranks (``capture`` in
    vllm/distributed/device_communicators/custom_all_reduce.py). This rank would wait there, without a word, for ranks
    that wait for it on their GPUs.

    Args:
        all_reduces: ``CustomAllreduce`` of each group that graphs have.
    """
    # The engine may be made where its user handles an error; that one does not count.
    handled = sys.exc_info()[1]
    replaced = [(each, each.register_graph_buffers) for each in all_reduces]
    for each, register in replaced:
        each.register_graph_buffers = partial(_unless_an_error_passes, register, handled)
    try:
        yield
    finally:
        for each, _ in replaced:
            del each.register_graph_buffers


def _unless_an_error_passes(register: Callable[[], None], handled: BaseException | None) -> None:
    if sys.exc_info()[1] is handled:
        register()
