"""Modules that SP cannot divide by tokens or heads: they run as in TP mode, on the tokens of the whole SP group.

Such a module mixes tokens (a state space model), heads (a norm over all heads), has a norm with weights for each head,
or has TP built into its own kernels (experts). In SP mode an all-gather over the SP group gives it all N tokens, and it
runs with TP=P's weights. Its sum over ranks becomes a reduce-scatter over the SP group and an all-reduce over the TP
group, which leave a rank with the result of its own n tokens. The three move as many bytes as TP mode's all-reduce over
P ranks. (A module with several such sums keeps its all-reduces, and each rank takes its rows of the result.) Its layers
need no slots. Hooks do it, from outside.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.minimax_rms_norm import MiniMaxText01RMSNormTP
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

_CLASSES = (MambaBase, MoERunnerInterface, MultiHeadLatentAttentionWrapper)

# Arguments that are a module's own parameters: Falcon-H1 passes one to its Mamba layers.
_PARAMETERS = ("mup_vector",)

# A module whose own code calls one of these works on all heads or all columns.
_COLLECTIVES = {
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "tensor_model_parallel_reduce_scatter",
}

# Where one of these attributes is False, such calls are for vLLM's own sequence parallelism of experts, which is not
# ours: it comes with data parallelism, which limits.py refuses for experts.
_SEQUENCE_PARALLEL_EXPERTS = ("is_sequence_parallel", "use_sequence_parallel_moe", "use_attn_reduce_scatter_for_moe")


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
    """The gathered modules of a model and all modules inside them."""
    return {child for _, module in gathered_modules(model) for child in module.modules()}


def _needs_all_tokens(module: nn.Module) -> bool:
    if isinstance(module, _CLASSES):
        return True
    if isinstance(module, LinearBase | VocabParallelEmbedding | Attention | BaseLayerWithLoRA | LogitsProcessor):
        return False  # these have a way of their own to run in SP mode, or run after the model
    layers = sum(isinstance(child, AttentionLayerBase) for child in module.modules())
    if layers > 1:
        return False  # a whole model
    if any(getattr(module, name, None) is False for name in _SEQUENCE_PARALLEL_EXPERTS):
        return False
    if any(isinstance(child, Attention) for child in module.children()) and _has_weights_of_heads(module):
        return True
    methods = inspect.getmembers(type(module), inspect.isfunction)
    return any(_COLLECTIVES & set(method.__code__.co_names) for _, method in methods)


def _has_weights_of_heads(module: nn.Module) -> bool:
    """Whether a norm in it may have weights of the heads of TP=P: a row of the folded view has other heads.

    Such weights have a dimension of heads and a loader that takes a shard; those of MiniMax M2 are flat.
    """
    apart = {part for child in module.modules() if isinstance(child, _CLASSES) for part in child.modules()}
    for child in module.modules():
        if isinstance(child, MiniMaxText01RMSNormTP):
            return True
        if child in apart or isinstance(child, LinearBase | Attention):
            continue
        for parameter in child.parameters(recurse=False):
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            if parameter.dim() > 1 and loader is not default_weight_loader:
                return True
    return False


class Gather:
    """The hooks of one module.

    Args:
        switch: the mode of the running step; its groups are those to gather and to sum over.
        module: the module. Its tensor arguments are [n, ...], apart from ``positions`` [..., n*S] or [..., n], and
            parameters. An argument ``output`` is where it writes its result.
    """

    def __init__(self, switch: Any, module: nn.Module) -> None:
        self._switch = switch
        self._names = list(inspect.signature(module.forward).parameters)
        self._result: tuple[torch.Tensor, torch.Tensor] | None = None
        self._experts = _experts_that_sum(module)
        self._layer: RowParallelLinear | None
        self._layer, called = _layer_that_sums(module)
        # Whether it returns partial sums, [N, ...], and not what a layer of it, whose hook has summed, made of them.
        self._returns_sums = self._experts is not None or (self._layer is not None and "output" in self._names)
        self._returns_own = False
        if called is not None and not self._returns_sums:
            called.register_forward_hook(self._after_layer)
            self._returns_own = True
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def take_over_sums(self, taken: bool) -> None:
        """Leave the sum over ranks to these hooks, as in SP mode, or give it back to the module and its all-reduce.

        Not in a hook of the module: what is traced, and custom ops in it, look at this while they run.
        """
        if self._experts is not None:
            self._experts.skip_final_all_reduce = taken
        if self._layer is not None:
            self._layer.reduce_results = not taken

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._switch.in_sp:
            return None
        found = dict(zip(self._names, args, strict=False)) | kwargs
        gathered: dict[str, Any] = {}
        for name, x in found.items():
            # Experts that route by themselves are given hidden states twice.
            again = next((known for known in gathered if found[known] is x), None)
            gathered[name] = self._all_tokens(name, x) if again is None else gathered[again]
        if "output" in found:
            self._result = found["output"], gathered["output"]
        return (), gathered

    def _after_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._switch.in_sp:
            return None
        # Layers return their bias, too, where its addition is left to others.
        return (self._sum(output[0]), *output[1:]) if isinstance(output, tuple) else self._sum(output)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._switch.in_sp or self._returns_own:
            return None
        own_tokens = self._sum if self._returns_sums else self._own_tokens
        if self._result is not None:
            (own, everything), self._result = self._result, None
            own.copy_(own_tokens(everything))
        if isinstance(output, tuple):
            return tuple(own_tokens(x) for x in output)
        return own_tokens(output)

    def _all_tokens(self, name: str, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or name in _PARAMETERS:
            return x
        if name == "output":
            return self._switch.without_padding(x.new_empty(len(x) * self._switch.dims.sp, *x.shape[1:]))
        if name == "positions":
            # Tokens come last where a token has several, as M-RoPE's.
            x = x.movedim(-1, 0)[:: self._switch.position_repeats].contiguous()
        x = self._switch.without_padding(self._switch.sp_group.all_gather(x, dim=0))
        return x.movedim(0, -1).contiguous() if name == "positions" else x

    def _sum(self, x: Any) -> Any:
        """The sum over ranks of partial sums of all tokens, [N, ...], for this rank's tokens, [n, ...]."""
        if not isinstance(x, torch.Tensor):
            return x
        return self._switch.all_reduce_tp(self._switch.sp_group.reduce_scatter(self._switch.with_padding(x), dim=0))

    def _own_tokens(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        sp, sp_rank = self._switch.dims.sp, self._switch.dims.sp_rank
        rows = self._switch.with_padding(x)
        return rows.view(sp, -1, *x.shape[1:])[sp_rank]


def _experts_that_sum(module: Any) -> Any:
    """The config of experts whose last step is an all-reduce that vLLM can leave out (``reduce_results=False``)."""
    if not isinstance(module, MoERunnerInterface):
        return None
    config = module.moe_config
    # As in vllm/model_executor/layers/fused_moe/layer.py and runner/moe_runner.py.
    leaves_out = not config.moe_parallel_config.use_all2all_kernels and not config.is_sequence_parallel
    has_several = config.tp_size > 1 or config.ep_size > 1
    adds_more = isinstance(module.router, ZeroExpertRouter)
    return config if leaves_out and has_several and not adds_more and not config.skip_final_all_reduce else None


def _layer_that_sums(module: nn.Module) -> tuple[RowParallelLinear, nn.Module] | tuple[None, None]:
    """The one layer of a module that sums over ranks, and what is called for it: itself, or itself with adapters."""
    if isinstance(module, MoERunnerInterface):
        return None, None
    adapted = {child.base_layer: child for child in module.modules() if isinstance(child, BaseLayerWithLoRA)}
    rows = [child for child in module.modules() if isinstance(child, RowParallelLinear)]
    layers = [layer for layer in rows if layer.reduce_results and layer.tp_size > 1]
    return (layers[0], adapted.get(layers[0], layers[0])) if len(layers) == 1 else (None, None)
