"""What a failed step was doing: its mode, its size and the layer it was in."""

from types import FrameType, TracebackType

from torch import nn


def describe_step(in_sp: bool, num_tokens: int, max_tp_tokens: int) -> str:
    """Name of a step for the log.

    Args:
        in_sp: whether the step runs in SP mode.
        num_tokens: tokens of the step.
        max_tp_tokens: the threshold.
    """
    return f"A step in {'SP' if in_sp else 'TP'} mode of {num_tokens} tokens (threshold {max_tp_tokens})"


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
    found = None
    # A module's own methods have it as `self`, the hooks of ModeSwitch as `layer`.
    for module in (frame.f_locals.get("self"), frame.f_locals.get("layer")):
        if isinstance(module, nn.Module):
            name = vars(module).get("layer_name") or vars(module).get("prefix")
            found = name if isinstance(name, str) and name else found
    return found
