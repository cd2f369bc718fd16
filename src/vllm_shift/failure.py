"""What a failed step was doing: its mode, its size and the layer it was in."""

from types import FrameType, TracebackType

from torch import nn


def describe_failure(error: BaseException, in_sp: bool, num_tokens: int, max_tp_tokens: int) -> str:
    """One line for the log.

    Args:
        error: what the step raised.
        in_sp: whether the step ran in SP mode.
        num_tokens: tokens of the step.
        max_tp_tokens: the threshold.
    """
    layer = innermost_layer(error.__traceback__)
    where = f" in {layer}" if layer else ""
    mode = "SP" if in_sp else "TP"
    return (
        f"A step in {mode} mode of {num_tokens} tokens (threshold {max_tp_tokens}) failed{where}: "
        f"{type(error).__name__}: {error}"
    )


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
