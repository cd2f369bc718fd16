"""Which mode a step runs in, and what happens to the model's inputs and outputs when it is SP.

Everything is attached to the finished model from outside, with PyTorch's own hooks: on the model, to enter and leave
SP mode; on its attention layers, to exchange tokens for heads (with ``early``, the layer that makes q, k and v does the
first exchange). In TP mode the hooks return at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed.parallel_state import GraphCaptureContext, GroupCoordinator
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from vllm_shift.compiled import CompiledTwins
from vllm_shift.dims import ParallelDims
from vllm_shift.exchange import Exchange, as_rows, qkv_widths, why_not_direct
from vllm_shift.gathered import Gather, gathered_modules, inside_gathered


class ModeSwitch:
    """The mode of the running step, shared by the layers of one rank's model.

    It is made before the model, whose layers are tied to it; ``attach`` comes when the model is there.

    Args:
        dims: the rank's place.
        max_tp_tokens: steps of up to this many tokens run in TP mode, larger ones in SP mode.
        sp_group: the rank's SP group.
        tp_group: the rank's TP group of SP mode; None when T = 1.

    Attributes:
        in_sp: whether the step that runs is in SP mode.
        eager: run the modules as they are, in both modes, instead of what is compiled for them.
        early: q, k and v are exchanged where they are made, see ``layers.why_not_early``.
        exchange: of this engine, in the SP group.
        token_adapters: LoRA adapters of this rank's tokens, see ``lora.py``; None without LoRA.
        position_repeats: rows of ``positions`` a token in SP mode. S where rotary embedding sees folded views; 1 where
            a token has one row: in code of transformers, where all attention is gathered (code like DeepSeek-V2's
            compares these rows with those of hidden states), and where positions are learned.
        attention_layers: that exchange tokens for heads.
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
        self.exchange = Exchange(sp_group)
        self.in_sp = self.eager = self.early = False
        self.token_adapters: Any = None

    @contextmanager
    def threshold(self, max_tp_tokens: int) -> Iterator[None]:
        """Another threshold while this is open."""
        before, self.max_tp_tokens = self.max_tp_tokens, max_tp_tokens
        try:
            yield
        finally:
            self.max_tp_tokens = before

    def is_sp_step(self, num_tokens: int) -> bool:
        """Whether a step of this many tokens runs in SP mode."""
        return num_tokens > self.max_tp_tokens

    def all_reduce_tp(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the TP group of SP mode."""
        return x if self._tp_group is None else self._tp_group.all_reduce(x)

    def nccl_collectives(self) -> int:
        """How many of NCCL a layer has in SP mode, of its two exchanges and, with T > 1, two sums below 8 MiB."""
        exchanges = 2 if self.exchange.peers is None else 0
        sums = 0 if self._tp_group is None or why_not_direct(self._tp_group) is None else 2
        return exchanges + sums

    @contextmanager
    def graph_capture(self) -> Iterator[None]:
        """While CUDA graphs are captured: at its end the all-reduce of SP mode's TP group learns where they read.

        Until then they must not be replayed. vLLM does this for its own TP group only
        (``vllm.distributed.parallel_state.graph_capture``).
        """
        if self._tp_group is None or not current_platform.is_cuda():
            yield
            return
        with self._tp_group.graph_capture(GraphCaptureContext(torch.cuda.current_stream())):
            yield

    def finish_saves(self) -> None:
        """Wait until the traces of both modes are in vLLM's compile cache."""
        self._twins.saves.finish()

    def attach(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        """Put the hooks on a model and its attention layers.

        Raises:
            NotImplementedError: the model has no attention layer to exchange at, or one of a kind that SP mode does not
                know; or vLLM compiles it as a whole; or it needs a reduce-scatter that vLLM does not do here.
        """
        self._gathers = [Gather(self, module) for _, module in gathered_modules(model)]
        if self._gathers and current_platform.is_cuda() and self.sp_group.device_communicator.pynccl_comm.disabled:
            raise NotImplementedError(
                f"{type(model).__name__} has layers whose sums are reduce-scatters, for which vLLM needs its wrapper "
                "of NCCL, and that is off: unset VLLM_DISABLE_PYNCCL, and VLLM_NCCL_SO_PATH if it is no NCCL library"
            )
        inside = inside_gathered(model)
        layers = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
        layers = [layer for layer in layers if layer not in inside]
        of_transformers = _called_layers(model)
        self.attention_layers = layers = layers + of_transformers
        unknown = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, Attention)})
        if unknown:
            raise NotImplementedError(f"{type(model).__name__} has layers that SP mode does not know: {unknown}")
        if not layers and not inside:
            raise NotImplementedError(f"{type(model).__name__} has no attention layer that SP mode knows")
        unfolded = of_transformers or not layers or learns_positions(model)
        self.position_repeats = 1 if unfolded else self.dims.sp
        most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._most_rows = self.dims.local_tokens(most_tokens)
        if layers and current_platform.is_cuda():
            # Not at the top: the CPU backend has no Triton.
            from vllm_shift.peers import connect

            connect(self.exchange, layers, self.dims.padded_tokens(most_tokens), vllm_config)
        groups = [self.exchange.name, *([] if self._tp_group is None else [self._tp_group.unique_name])]
        self._twins = CompiledTwins(model, vllm_config, self.exchange.peers is not None, groups)
        self._buffers: dict[str, torch.Tensor] = {}
        # Some modules replace a buffer when they run as they are; traces, where vLLM makes any, go by what it was.
        compiles = vllm_config.compilation_config.mode != CompilationMode.NONE
        self._traced_buffers = [module._buffers for module in model.modules() if module._buffers and compiles]
        self._kept_buffers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        # A plain bool, because the hooks of attention layers are traced.
        self._keep_padding = bool(self._twins)
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)
        for layer in layers:
            layer.register_forward_pre_hook(self._before_attention, with_kwargs=True)
            layer.register_forward_hook(self._after_attention)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model: decide the mode; in SP mode, keep only this rank's tokens.

        What has a row per token, [N, ...], becomes [n, ...]: ``input_ids``, ``inputs_embeds`` and, between pipeline
        stages, ``intermediate_tensors``. ``positions`` [..., N] become [..., n*S]: this rank's, each repeated for every
        slot, or, with ``early``, those of all tokens, padded. Or [..., n], see ``position_repeats``.

        Raises:
            NotImplementedError: the model takes an input that SP mode does not know.
        """
        num_tokens = kwargs["positions"].shape[-1]
        in_sp = self.is_sp_step(num_tokens)
        # What vLLM has compiled is a trace of TP mode, the twins are those of SP mode.
        if self.eager or (in_sp and not self._twins):
            get_forward_context().skip_compiled = True
            self._kept_buffers = [(buffers, dict(buffers)) for buffers in self._traced_buffers]
        if not in_sp:
            return None
        inputs: dict[str, Any] = {}
        for name, x in kwargs.items():
            if x is None:
                continue
            if name in ("input_ids", "inputs_embeds"):
                inputs[name] = self._own_rows(name, x)
            elif name == "positions":
                inputs[name] = self._own_positions(x)
            elif name == "intermediate_tensors":
                inputs[name] = IntermediateTensors({key: self._own_rows(key, rows) for key, rows in x.items()})
            else:
                raise NotImplementedError(f"{type(model).__name__} takes {name}, which SP mode does not know")
        self.in_sp, self._num_tokens = True, num_tokens
        for gather in self._gathers:
            gather.take_over_sums(True)
        if self.token_adapters is not None:
            self.token_adapters.take(num_tokens)
        if not self.eager:
            self._twins.swap(in_sp=True)
        return args, kwargs | inputs

    def _own_rows(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of [N, ...], padded with zeros to [n, ...]; in memory that stays where it is.

        CUDA graphs of the twins read their inputs there.
        """
        if name not in self._buffers:
            self._buffers[name] = x.new_zeros(self._most_rows, *x.shape[1:])
        rows = self.dims.local_tokens(len(x))
        own = x[self.dims.local_slice(len(x))]
        buffer = self._buffers[name][:rows]
        buffer[: len(own)].copy_(own)
        buffer[len(own) :].zero_()
        return buffer

    def _own_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """This rank's of [..., N], repeated, or all of them, and padded with zeros; in memory that stays where it is.

        Rotary embeddings of several dimensions (M-RoPE) have a row for each.
        """
        repeats, rows = self.position_repeats, self.dims.local_tokens(positions.shape[-1])
        if "positions" not in self._buffers:
            # One more than needed, as in vLLM's model runners: torch.compile traces with the largest step, and would
            # take rows of several dimensions for contiguous ones in smaller steps, too.
            self._buffers["positions"] = positions.new_zeros(*positions.shape[:-1], self._most_rows * repeats + 1)
        own = positions
        if not self.early:
            own = own[..., self.dims.local_slice(own.shape[-1])].repeat_interleave(repeats, dim=-1)
        buffer = self._buffers["positions"][..., : rows * repeats]
        buffer[..., : own.shape[-1]].copy_(own)
        buffer[..., own.shape[-1] :].zero_()
        return buffer

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the model: hidden states [n, h] of every rank become [N, h] on all of them."""
        for buffers, kept in self._kept_buffers:
            buffers.update(kept)
        self._kept_buffers = []
        if not self.in_sp:
            return None
        self.in_sp = False
        for gather in self._gathers:
            gather.take_over_sums(False)
        self._twins.swap(in_sp=False)
        get_forward_context().skip_compiled = False
        if output is None:  # the model raised
            return None
        return self._all_rows(output)

    def _all_rows(self, output: Any) -> Any:
        """All ranks' rows of a model's output: hidden states, alone or with those for EAGLE-3, or between stages."""
        if isinstance(output, torch.Tensor):
            return self.sp_group.all_gather(output, dim=0)[: self._num_tokens]
        if isinstance(output, IntermediateTensors):
            return IntermediateTensors({name: self._all_rows(rows) for name, rows in output.items()})
        return type(output)(self._all_rows(part) for part in output)

    def _before_attention(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.in_sp:
            return None
        # Code of transformers gives all slots of a token in one row.
        q, k, v = (as_rows(x, width) for x, width in zip(args, qkv_widths(layer), strict=True))
        if not self.early:
            q, k, v = self.exchange.tokens_to_heads(q, k, v)
        return (self.without_padding(q), self.without_padding(k), self.without_padding(v)), kwargs

    def _after_attention(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        if not self.in_sp:
            return None
        return self.exchange.heads_to_tokens(self.with_padding(output))

    def without_padding(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of all tokens, [n*S, ...] to [N, ...]; in a compiled SP mode as they are."""
        # A trace can keep them: CUDA backends go by the tokens of the step, the CPU's by the rows it is given.
        return x if self._keep_padding else x[: self._num_tokens]

    def with_padding(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of ``without_padding``; rows that are added are zeros."""
        if self._keep_padding:
            return x
        rows = self.dims.padded_tokens(self._num_tokens)
        return torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:])))


def learns_positions(model: nn.Module) -> bool:
    """Whether positions are looked up in a table, as GPT-2's and OPT's, and not rotated with."""
    modules = list(model.modules())
    rotates = any("Rotary" in type(module).__name__ for module in modules)
    return not rotates and any(isinstance(module, nn.Embedding) for module in modules)


class _Called:
    """Stands for an attention layer whose ``forward`` is called by name, which would pass its hooks."""

    def __init__(self, layer: Attention) -> None:
        self.impl, self._layer = layer.impl, layer

    def forward(self, *args: torch.Tensor) -> Any:
        return self._layer(*args)


def _called_layers(model: Any) -> list[Attention]:
    """Attention layers that vLLM keeps beside a model of transformers, from now on called with their hooks."""
    layers: dict[int, Attention] = getattr(model, "attention_instances", {})
    if layers:
        model.attention_instances = {number: _Called(layer) for number, layer in layers.items()}
    return list(layers.values())
