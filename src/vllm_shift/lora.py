"""LoRA adapters in SP mode: on this rank's tokens, with adapters for all slots of its SP group.

vLLM wraps each layer of the model in one that adds B A x of the adapter that a token's request names. A layer with
slots gets such a wrapper for every slot, each filled by vLLM as on the rank that the slot belongs to. The outputs of a
column-parallel layer's slots lie side by side, so one product takes all their Bs as its slices; likewise the As of a
row-parallel layer, whose inputs do. vLLM knows the adapter of every token of a step; ``TokenAdapters`` has those of
this rank's tokens.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    LogitsProcessorWithLoRA,
    ReplicatedLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)

from vllm_shift.dims import ParallelDims
from vllm_shift.gathered import inside_gathered
from vllm_shift.layers import SlottedLinear, SlottedRowParallelLinear


class TokenAdapters:
    """The adapters of this rank's tokens, for vLLM's LoRA kernels.

    Args:
        stock: vLLM's ``PunicaWrapperBase`` of all tokens.
        dims: the rank's place.

    Attributes:
        punica: the same for this rank's tokens.
    """

    def __init__(self, stock: Any, dims: ParallelDims) -> None:
        self._stock, self._dims, self.punica = stock, dims, copy.copy(stock)
        self.punica._embeddings_indices = torch.zeros_like(stock._embeddings_indices)
        self._has_kernels = hasattr(stock, "token_mapping_meta")  # those for CUDA, not those in PyTorch for the CPU
        if self._has_kernels:
            meta = stock.token_mapping_meta
            # What is the same for all tokens stays shared: ids of the adapters in use, and numbers on the CPU.
            own = {
                name: torch.zeros_like(getattr(meta, name))
                for name in (
                    "token_lora_mapping", "token_indices_sorted_by_lora_ids", "num_tokens_per_lora",
                    "lora_token_start_loc",
                )
            }  # fmt: skip
            self.punica.token_mapping_meta = dataclasses.replace(meta, **own)
            return
        self.punica._token_lora_indices = torch.empty_like(stock._token_lora_indices)
        for name in ("_seq_start_locs", "_seq_lengths", "_lora_indices_per_batch"):
            # Padding may be a batch more.
            setattr(self.punica, name, torch.empty(len(getattr(stock, name)) + 1, dtype=torch.long))

    def take(self, num_tokens: int) -> None:
        """Of a step of so many tokens. CUDA graphs record what it does on the device, so it does not wait for that."""
        rows, own = self._dims.local_tokens(num_tokens), self._dims.local_slice(num_tokens)
        indices = self._stock._embeddings_indices[:, own]
        self.punica._embeddings_indices[:, : indices.shape[1]].copy_(indices)
        if self._has_kernels:
            self._take_for_kernels(own, rows)
        else:
            found = self._stock.token_lora_indices[own]
            self.punica._token_lora_indices[:rows].fill_(-1)
            self.punica._token_lora_indices[: len(found)].copy_(found)
            self.punica.indices_len = [rows, *self._stock.indices_len[1:]]
            self.punica._update_prefill_metadata(self.punica.token_lora_indices)
            self.punica.is_prefill = self._stock.is_prefill

    def _take_for_kernels(self, own_rows: slice, rows: int) -> None:
        """As vLLM's ``LoRAKernelMeta.prepare_tensors``, on the device."""
        stock, own = self._stock.token_mapping_meta, self.punica.token_mapping_meta
        if stock.no_lora_flag_cpu.item():
            return
        found, mapping = stock.token_lora_mapping[own_rows], own.token_lora_mapping[:rows]
        mapping.fill_(-1)
        mapping[: len(found)].copy_(found)
        own.token_indices_sorted_by_lora_ids[:rows].copy_(torch.argsort(mapping, stable=True))
        ids = stock.active_lora_ids.unsqueeze(1)
        own.num_tokens_per_lora.copy_((mapping == ids).sum(1))
        own.lora_token_start_loc[:-1].copy_((mapping < ids).sum(1))


class _ReplicatedLayer(BaseLayerWithLoRA):
    """One of vLLM's LoRA layers whose weights are the same on all ranks, on this rank's tokens in SP mode."""

    @property
    def punica_wrapper(self) -> Any:
        """Of the tokens of the mode that runs."""
        return self.token_adapters.punica if self.switch.in_sp else self.stock_punica


class _SlottedLayer(BaseLayerWithLoRA):
    """One of vLLM's LoRA layers around a layer with slots."""

    def forward(self, input_: torch.Tensor) -> Any:
        """In SP mode the layer itself, which adds the adapters; else vLLM's own forward."""
        return self.base_layer(input_) if self.base_layer.runs_in_sp() else super().forward(input_)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """As stock, for every slot."""
        super().set_lora(index, lora_a, lora_b)
        for each in self.other_slots:
            each.set_lora(index, lora_a, lora_b)

    def reset_lora(self, index: int) -> None:
        """As stock, for every slot."""
        super().reset_lora(index)
        for each in self.other_slots:
            each.reset_lora(index)


class SlotAdapters:
    """Adds all slots' adapters to the output of a layer.

    Args:
        layer: vLLM's LoRA layer around a layer with slots; becomes one that fills all slots.
        token_adapters: of the step that runs.
        lora_config: vLLM's.
    """

    def __init__(self, layer: Any, token_adapters: TokenAdapters, lora_config: Any) -> None:
        base, dims = layer.base_layer, layer.base_layer.switch.dims
        self._adapters = token_adapters
        is_row = isinstance(base, SlottedRowParallelLinear)
        slots = []
        for shard in dims.slots:
            if shard == dims.rank and not is_row:
                slots.append(layer)
                continue
            base.impersonate(shard)
            other = type(layer)(base)
            other.create_lora_weights(lora_config.max_loras, lora_config)
            slots.append(other)
        base.impersonate(dims.rank)
        if is_row:
            (a,) = layer.lora_a_stacked
            whole = a.new_zeros(*a.shape[:-1], dims.sp * a.shape[-1])
            for each, part in zip(slots, whole.split(a.shape[-1], dim=-1), strict=True):
                each.lora_a_stacked, each.lora_b_stacked = (part,), layer.lora_b_stacked
            self._a, self._b, self._slices = (whole,), layer.lora_b_stacked, layer.output_slices
        else:
            for each in slots:
                each.lora_a_stacked = layer.lora_a_stacked
            self._a = layer.lora_a_stacked * dims.sp
            self._b = tuple(b for each in slots for b in each.lora_b_stacked)
            self._slices = layer.output_slices * dims.sp
        layer.other_slots = tuple(each for each in slots if each is not layer)

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Change ``output`` [n, outputs of all slots] in place; ``x`` [n, inputs] or folded."""
        x = x.reshape(len(output), -1)
        # All slots at once: for one B at two places of outputs, vLLM's kernels would remember one place.
        self._adapters.punica.add_lora_linear(output, x, self._a, self._b, 1.0, self._slices)


def attach_adapters(model: nn.Module, switch: Any, vllm_config: Any) -> None:
    """Let the LoRA layers that vLLM has put into a model work in SP mode.

    Args:
        model: the model.
        switch: the ``ModeSwitch``; its ``token_adapters`` are told of each step of SP mode.
        vllm_config: of the engine.

    Raises:
        NotImplementedError: a layer or a number of tokens is not supported.
    """
    lora_config, most = vllm_config.lora_config, vllm_config.scheduler_config.max_num_batched_tokens
    inside = inside_gathered(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseLayerWithLoRA) or not hasattr(layer, "punica_wrapper"):
            continue  # vLLM wraps an embedding that is the LM head, too, once more, and leaves that one without
        if layer in inside:
            # It sees the padding of all ranks, for which vLLM has no adapters.
            if most % switch.dims.sp:
                raise NotImplementedError(
                    f"{name}: LoRA needs --max-num-batched-tokens that is a multiple of {switch.dims.sp}, got {most}"
                )
            continue
        if switch.token_adapters is None:
            switch.token_adapters = TokenAdapters(layer.punica_wrapper, switch.dims)
        base: Any = getattr(layer, "base_layer", None)
        kind: Any = _ReplicatedLayer
        if isinstance(layer, ReplicatedLinearWithLoRA | VocabParallelEmbeddingWithLoRA):
            layer.switch, layer.token_adapters, layer.stock_punica = switch, switch.token_adapters, layer.punica_wrapper
            del layer.punica_wrapper
        elif isinstance(base, SlottedLinear) and base.shifts:
            base.adapters = SlotAdapters(layer, switch.token_adapters, lora_config)
            kind = _SlottedLayer
        elif isinstance(layer, LogitsProcessorWithLoRA):
            continue  # runs as in TP mode
        else:
            raise NotImplementedError(f"{name}: {type(layer).__name__} of {type(base).__name__} is not supported")
        # As torch.distributed.fsdp.fully_shard extends a module: by a class of its own.
        layer.__class__ = type(f"Shift{type(layer).__name__}", (kind, type(layer)), {})
