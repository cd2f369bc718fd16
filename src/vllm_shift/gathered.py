"""Modules that SP cannot divide by tokens or heads: they run as in TP mode, on the tokens of the whole SP group.

Such a module mixes tokens (a state space model), heads (a norm over all heads), or has TP built into its own kernels
(experts). In SP mode an all-gather over the SP group gives it all N tokens, it runs with TP=P's weights and
communication, and each rank keeps its n tokens of the result. Its layers need no slots. Hooks do both, from outside.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

_CLASSES = (MambaBase, MoERunnerInterface, MultiHeadLatentAttentionWrapper)

# A module whose own code calls one of these works on all heads or all columns.
_COLLECTIVES = {
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "tensor_model_parallel_reduce_scatter",
}


def gathered_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of a model that have to see all tokens, by name."""
    if hasattr(model, "attention_instances"):
        return iter(())  # code of transformers: vLLM's norms for it gather heads only where they get a part of them

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if _needs_all_tokens(module):
            yield name, module
            return
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return walk("", model)


def inside_gathered(model: nn.Module) -> set[nn.Module]:
    """These modules and all that they consist of."""
    return {child for _, module in gathered_modules(model) for child in module.modules()}


def _needs_all_tokens(module: nn.Module) -> bool:
    if isinstance(module, _CLASSES):
        return True
    if isinstance(module, LinearBase | VocabParallelEmbedding | Attention | BaseLayerWithLoRA):
        return False  # these have a way of their own to run in SP mode
    layers = sum(isinstance(child, AttentionLayerBase) for child in module.modules())
    if layers > 1:
        return False  # a whole model
    methods = [method for _, method in inspect.getmembers(type(module), inspect.isfunction)]
    own = [method for method in methods if not method.__module__.startswith("torch.")]
    return any(_COLLECTIVES & set(method.__code__.co_names) for method in own)


# Arguments that are a module's own parameters: Falcon-H1 passes one to its Mamba layers.
_PARAMETERS = ("mup_vector",)


class Gather:
    """The hooks of one module.

    Args:
        switch: the mode of the running step; its SP group is the one to gather over.
        module: the module. Its tensor arguments are [n, ...], apart from ``positions`` [..., n*S] or [..., n], and
            parameters. An argument ``output`` is where it writes its result.
    """

    def __init__(self, switch: Any, module: nn.Module) -> None:
        self._switch = switch
        self._names = list(inspect.signature(module.forward).parameters)
        self._result: tuple[torch.Tensor, torch.Tensor] | None = None
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._switch.in_sp:
            return None
        found = dict(zip(self._names, args, strict=False)) | kwargs
        gathered = {name: self._all_tokens(name, x) for name, x in found.items()}
        if "output" in found:
            self._result = found["output"], gathered["output"]
        return (), gathered

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._switch.in_sp:
            return None
        if self._result is not None:
            (own, everything), self._result = self._result, None
            own.copy_(self._own_tokens(everything))
        if isinstance(output, tuple):
            return tuple(self._own_tokens(x) for x in output)
        return self._own_tokens(output)

    def _all_tokens(self, name: str, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or name in _PARAMETERS:
            return x
        if name == "positions":
            # Tokens come last where a token has several, as M-RoPE's.
            x = x.movedim(-1, 0)[:: self._switch.position_repeats].contiguous()
        x = self._switch.without_padding(self._switch.sp_group.all_gather(x, dim=0))
        return x.movedim(0, -1).contiguous() if name == "positions" else x

    def _own_tokens(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        sp, sp_rank = self._switch.dims.sp, self._switch.dims.sp_rank
        rows = self._switch.with_padding(x)
        return rows.view(sp, -1, *x.shape[1:])[sp_rank]
