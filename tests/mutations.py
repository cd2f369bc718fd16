"""Bugs of the kind that the self-check is there to find, put into an engine on purpose."""

from contextlib import AbstractContextManager
from unittest import mock

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_shift import layers, quantized
from vllm_shift.switch import ModeSwitch


def _linear(x, weight, bias):
    """Of an input that may be folded."""
    return torch.nn.functional.linear(x.reshape(-1, weight.shape[1]), weight, bias)


def _swapped_slots():
    """In one layer, SP mode takes the slots in another order than the exchange does."""

    def matmul(self, x, bias):
        whole = self.weight_slots.whole
        if "layers.1.self_attn.qkv_proj" in self.prefix:
            whole = torch.cat(whole.chunk(self.switch.dims.sp)[::-1])
        return _linear(x, whole, bias)

    return mock.patch.object(layers.SlottedLinear, "_matmul", matmul)


def _one_stale_slot():
    """One slot of the last layer was never loaded; it holds what another one should."""
    stock = layers.SlottedLinear._matmul

    def matmul(self, x, bias):
        whole = self.weight_slots.whole
        if "layers.2.mlp.down_proj" in self.prefix:
            parts = list(whole.chunk(self.switch.dims.sp, dim=1))
            whole = torch.cat([parts[0], *parts[:-1]], dim=1)
            return _linear(x, whole, bias)
        return stock(self, x, bias)

    return mock.patch.object(layers.SlottedLinear, "_matmul", matmul)


def _wrong_positions():
    """The last rank of the SP group takes its positions from 1 instead of 0."""
    stock = ModeSwitch._enter

    def enter(self, model, args, kwargs):
        changed = stock(self, model, args, kwargs)
        if changed is not None and self.dims.sp_rank == self.dims.sp - 1:
            changed[1]["positions"].add_(1)
        return changed

    return mock.patch.object(ModeSwitch, "_enter", enter)


def _norm_over_a_slot():
    """A norm over a token's whole MLP activation sees one slot of it in SP mode."""
    stock = layers.SlottedRowParallelLinear.forward

    def forward(self, x):
        if "layers.0.mlp.down_proj" in self.prefix:
            world = get_tp_group()
            squares = x.square().mean(-1, keepdim=True)
            if not self.switch.in_sp:
                squares = world.all_reduce(squares) / world.world_size
            x = x * torch.rsqrt(squares + 1e-6)
        return stock(self, x)

    return mock.patch.object(layers.SlottedRowParallelLinear, "forward", forward)


def _layer_without_slots():
    """One layer's output weight stays that of TP=P: SP mode multiplies every slot with this rank's shard."""

    def matmul(self, x, bias):
        whole = self.weight_slots.whole
        if "layers.1.self_attn.o_proj" in self.prefix:
            own = self.weight_slots[self.switch.dims.sp_rank]
            return _linear(x, own.repeat(1, self.switch.dims.sp), bias)
        return _linear(x, whole, bias)

    return mock.patch.object(layers.SlottedLinear, "_matmul", matmul)


def _one_rank_only():
    """Rank 1 alone writes wrong values to its KV cache, in the last layer: the others have to refuse, too."""
    stock = ModeSwitch._before_attention

    def before(self, layer, args, kwargs):
        changed = stock(self, layer, args, kwargs)
        if changed is not None and self.dims.rank == 1 and "layers.2" in layer.layer_name:
            (q, k, v), kwargs = changed
            changed = (q, k, v * 1.5), kwargs
        return changed

    return mock.patch.object(ModeSwitch, "_before_attention", before)


def _swapped_outputs():
    """In one quantized layer, SP mode has the slots in another order than the exchange does."""
    stock = quantized.WholeLinear.apply

    def apply(self, x, bias):
        out = stock(self, x, bias)
        return torch.cat(out.chunk(2, dim=1)[::-1], dim=1) if "layers.1.self_attn.qkv_proj" in self.prefix else out

    return mock.patch.object(quantized.WholeLinear, "apply", apply)


def _one_slot_twice():
    """In one quantized layer, one slot of the input takes the place of the other."""
    stock = quantized.WholeLinear.apply

    def apply(self, x, bias):
        if "layers.1.mlp.down_proj" in self.prefix:
            x = x.reshape(-1, self.input_size_per_partition).chunk(2, dim=1)[0].repeat(1, 2)
        return stock(self, x, bias)

    return mock.patch.object(quantized.WholeLinear, "apply", apply)


MUTATIONS = {
    "swapped slots": (_swapped_slots, "layers.1.self_attn.qkv_proj"),
    "one stale slot": (_one_stale_slot, "layers.2.mlp.down_proj"),
    "wrong positions": (_wrong_positions, "layers.0.self_attn"),
    "norm over a slot": (_norm_over_a_slot, "layers.0.mlp.down_proj"),
    "layer without slots": (_layer_without_slots, "layers.1.self_attn.o_proj"),
    "one rank only": (_one_rank_only, "layers.2.self_attn"),
}

MUTATIONS_OF_QUANTIZED = {
    "swapped outputs": (_swapped_outputs, "layers.1.self_attn.qkv_proj"),
    "one slot twice": (_one_slot_twice, "layers.1.mlp.down_proj"),
    "wrong positions, quantized": (_wrong_positions, "layers.0.self_attn"),
    "one rank only, quantized": (_one_rank_only, "layers.2.self_attn"),
}


def mutation(name: str) -> AbstractContextManager[object]:
    """Put the bug into the engines that start while this is open."""
    return (MUTATIONS | MUTATIONS_OF_QUANTIZED)[name][0]()
