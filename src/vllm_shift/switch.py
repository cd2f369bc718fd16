"""Which mode a step runs in, and what happens to the model's inputs and outputs when it is SP.

Everything is attached to the finished model from outside, with PyTorch's own hooks: on the model, to enter and leave
SP mode; on its attention layers, to exchange tokens for heads. In TP mode the hooks return at once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention

from vllm_shift.dims import ParallelDims
from vllm_shift.exchange import heads_to_tokens, register_group, tokens_to_heads


class ModeSwitch:
    """The mode of the running step, shared by the layers of one rank's model.

    Args:
        dims: the rank's place.
        max_tp_tokens: steps of up to this many tokens run in TP mode, larger ones in SP mode.
        sp_group: the rank's SP group.
        tp_group: the rank's TP group of SP mode; None when T = 1.

    Attributes:
        in_sp: whether the step that runs is in SP mode.
    """

    def __init__(
        self,
        dims: ParallelDims,
        max_tp_tokens: int,
        sp_group: GroupCoordinator,
        tp_group: GroupCoordinator | None,
    ) -> None:
        self.dims, self.max_tp_tokens = dims, max_tp_tokens
        self.sp_group, self._tp_group = sp_group, tp_group
        self._group_name = register_group(sp_group)
        self.in_sp = False
        self._num_tokens = 0

    def is_sp_step(self, num_tokens: int) -> bool:
        """Whether a step of this many tokens runs in SP mode."""
        return num_tokens > self.max_tp_tokens

    def all_reduce_tp(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the TP group of SP mode."""
        return x if self._tp_group is None else self._tp_group.all_reduce(x)

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on a model and its attention layers.

        Raises:
            NotImplementedError: the model has no attention layer to exchange at.
        """
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        if not layers:
            raise NotImplementedError(f"{type(model).__name__} has no attention layer that SP mode knows")
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)
        for layer in layers:
            layer.register_forward_pre_hook(self._before_attention, with_kwargs=True)
            layer.register_forward_hook(self._after_attention)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model: decide the mode; in SP mode, keep only this rank's tokens.

        ``input_ids`` [N] become [n]; ``positions`` [N] become [n*S], each of this rank's repeated for every slot.
        """
        num_tokens = kwargs["positions"].shape[-1]
        if not self.is_sp_step(num_tokens):
            return None
        # The compiled model is a trace of TP mode.
        get_forward_context().skip_compiled = True
        self.in_sp, self._num_tokens = True, num_tokens
        positions = self._own_tokens(kwargs["positions"]).repeat_interleave(self.dims.sp)
        return args, kwargs | {"input_ids": self._own_tokens(kwargs["input_ids"]), "positions": positions}

    def _own_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Rows s*n ... (s+1)*n - 1 of [N], with zeros after the last token."""
        rows = self.dims.local_tokens(len(x))
        padded = F.pad(x, (0, rows * self.dims.sp - len(x)))
        return padded[self.dims.sp_rank * rows :][:rows]

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the model: hidden states [n, h] of every rank become [N, h] on all of them."""
        if not self.in_sp:
            return None
        self.in_sp = False
        if is_forward_context_available():
            get_forward_context().skip_compiled = False
        if output is None:  # the model raised
            return None
        return self.sp_group.all_gather(output, dim=0)[: self._num_tokens]

    def _before_attention(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.in_sp:
            return None
        exchanged = tokens_to_heads(*args[:3], self._group_name)
        # An attention backend may size its work by the rows it is given, so the padding goes.
        return tuple(x[: self._num_tokens] for x in exchanged) + args[3:], kwargs

    def _after_attention(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        if not self.in_sp:
            return None
        rows = self.dims.local_tokens(self._num_tokens) * self.dims.sp
        return heads_to_tokens(F.pad(output, (0, 0, 0, rows - len(output))), self._group_name)
