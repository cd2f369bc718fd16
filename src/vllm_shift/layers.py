"""vLLM's parallel layers with a second way to run: on this rank's tokens, with the weights of TP=T.

In SP mode a tensor of "TP width" [N, w/P] becomes the *folded* view [n*S, w/P] of [n, w/T], n = ceil(N/S) being this
rank's tokens: row i*S + j is token i, slot j. It has as many rows and columns as in TP mode, so what a model does
between two parallel layers (splits, rotary embedding, norms over a head, activations) stays as it is.

What is traced asks for ``size(-1)``, not for ``shape[-1]``, which would trace the size of each dimension.

The classes take the place of vLLM's through ``PluggableLayer.register_oot``, while the model of a shift engine is
being built and at no other time.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor import custom_op
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.utils import dispatch_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_shift.exchange import qkv_widths
from vllm_shift.gathered import gathered_modules, inside_gathered
from vllm_shift.quantized import TwoModeMethod, WholeLinear, check_method
from vllm_shift.slots import Slots
from vllm_shift.switch import ModeSwitch, learns_positions

_switch: ModeSwitch | None = None


def _folded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.reshape(-1, weight.shape[1]), weight, bias)


def _folded_linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.numel() // weight.shape[1], weight.shape[0])


# Opaque to Inductor, which would copy what an activation function writes to get from [n*S, w/P] to [n, w/T].
_library = torch.library.Library("vllm_shift", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("folded_linear", _folded_linear, fake_impl=_folded_linear_fake, target_lib=_library)


class SlottedLinearMethod(UnquantizedLinearMethod):
    """vLLM's unquantized linear method, minus the packing that its CPU backend does."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight as loaded: a packed copy would no longer be a view of the slots."""
        layer.cpu_linear = F.linear


class Slotted:
    """What all layers of this module share.

    Attributes:
        shifts: whether the layer has a second way to run; without it, it runs as in TP mode in both.
        refusal: why it has none where one is needed.
    """

    switch: ModeSwitch
    shifts = True
    refusal = ""

    def runs_in_sp(self) -> bool:
        """Whether this call runs the second way."""
        return self.shifts and self.switch.in_sp

    def stop_shifting(self) -> None:
        """Run as in TP mode from now on, in memory of that size."""
        self.shifts = False
        for name in ("weight_slots", "bias_slots"):
            if (slots := getattr(self, name, None)) is not None:
                slots.release()
                setattr(self, name, None)


class SlottedLinear(Slotted, LinearBase):
    """What the linear layers share: slots, and the plain matrix product on all of them.

    Raises:
        NotImplementedError: a quantization method that is not known to work, or shards that do not join.
    """

    quant_method: Any
    weight_slots: Slots

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert _switch is not None
        self.switch = _switch
        # A layer without tensor parallelism is the same on every rank, and works on any rows.
        self.shifts = self.tp_size == self.switch.dims.world
        # A quantized layer has these instead of slots: its TP=T weight, and bytes of its TP=P weight if that is apart.
        self.whole: WholeLinear | None = None
        self.second_copy = 0
        # Adds LoRA to what comes out in SP mode (lora.py).
        self.adapters: Any = None

    def _make_slots(self, column: bool) -> None:
        if type(self.quant_method) is UnquantizedLinearMethod:
            self.quant_method = SlottedLinearMethod()
            dims, loads_as = self.switch.dims, self.impersonate
            self.weight_slots = Slots(self.weight, 0 if column else 1, dims, loads_as)
            self.bias_slots = Slots(self.bias, 0, dims, loads_as) if column and self.bias is not None else None
            return
        check_method(self)
        is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        self.quant_method = TwoModeMethod(self, column, is_dummy)

    def stop_shifting(self) -> None:
        """Run as in TP mode from now on, in memory of that size."""
        super().stop_shifting()
        if self.whole is not None:
            self.whole, self.second_copy = None, 0
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()

    def impersonate(self, shard: int) -> None:
        """Take what vLLM's loaders ask this layer for from the TP=P rank ``shard``."""
        self.tp_rank = shard
        self.update_param_tp_status()

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x``, folded or not, times the weight of all slots; with LoRA, if there is."""
        out = self._matmul(x, bias)
        if self.adapters is not None:
            self.adapters.add(x, out)
        return out

    def _matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.whole is not None:
            return self.whole.apply(x, bias)
        whole = self.weight_slots.whole
        if x.size(-1) != whole.shape[1]:
            folded: torch.Tensor = torch.ops.vllm_shift.folded_linear(x, whole, bias)
            return folded
        out: torch.Tensor = dispatch_unquantized_gemm()(self, x, whole, bias)
        return out


class SlottedColumnParallelLinear(SlottedLinear, ColumnParallelLinear):
    """``ColumnParallelLinear`` with slots: [n, in] -> folded [n*S, out/P].

    Slots of the weight: [S*out/P, in], of the bias: [S*out/P].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.shifts:
            return
        if self.gather_output or (self.skip_bias_add and self.bias is not None):
            self.refusal = f"gather_output={self.gather_output}, skip_bias_add={self.skip_bias_add}"
        self._make_slots(column=True)

    def _whole_bias(self) -> torch.Tensor | None:
        if self.whole is not None:
            bias: torch.Tensor | None = self.whole.bias
            return bias
        return None if self.bias_slots is None else self.bias_slots.whole

    def forward(self, input_: torch.Tensor) -> Any:
        """In SP mode: ``input_`` [n, in] gives [n*S, out/P]; else vLLM's own forward."""
        if not self.runs_in_sp():
            return super().forward(input_)
        out = self._rows(input_)
        return (out, None) if self.return_bias else out

    def _rows(self, input_: torch.Tensor) -> torch.Tensor:
        out = self._product(input_, self._whole_bias())
        return out.view(*out.shape[:-2], -1, out.size(-1) // self.switch.dims.sp)


class SlottedMergedColumnParallelLinear(SlottedColumnParallelLinear, MergedColumnParallelLinear):
    """``MergedColumnParallelLinear`` with slots, each of them all outputs of one TP=P shard."""


class SlottedQKVParallelLinear(SlottedColumnParallelLinear, QKVParallelLinear):
    """``QKVParallelLinear`` with slots, each of them the q, k and v heads of one TP=P shard.

    In the folded view, or with ``switch.early`` in the head view: of all tokens, this rank's heads.
    """

    def _rows(self, input_: torch.Tensor) -> torch.Tensor:
        switch = self.switch
        if not switch.early:
            return super()._rows(input_)
        if switch.exchange.peers is None:
            return switch.exchange.rows_to_heads((super()._rows(input_),))
        heads: torch.Tensor = torch.ops.vllm_shift.peers_product_to_heads(
            input_, self.weight_slots.whole, self._whole_bias(), switch.exchange.name
        )
        return heads


class UnfoldedQKVParallelLinear(SlottedQKVParallelLinear):
    """The same for code of transformers, which wants a token's q, k and v in one row: [.., n, out/T], not folded.

    See vLLM's models/transformers/fusers/qkv.py.
    """

    @property
    def tp_size(self) -> int:
        """P, or T in SP mode."""
        return self.switch.dims.tp if self.runs_in_sp() else self.switch.dims.world

    def _rows(self, input_: torch.Tensor) -> torch.Tensor:
        """[.., n, in] to [.., n, out/T]: q of all slots first, then k, v."""
        out: Any = super()._rows(input_)
        slots = out.unflatten(-2, (-1, self.switch.dims.sp))
        parts = slots.split([size // self.switch.dims.world for size in self.output_sizes], dim=-1)
        return torch.cat([part.flatten(-2) for part in parts], dim=-1)


class SlottedRowParallelLinear(SlottedLinear, RowParallelLinear):
    """``RowParallelLinear`` with slots: folded [n*S, in/P] -> [n, out]. Slots of the weight: [out, S*in/P]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.shifts:
            return
        if not self.input_is_parallel or not self.reduce_results:
            self.refusal = f"input_is_parallel={self.input_is_parallel}, reduce_results={self.reduce_results}"
        self._make_slots(column=False)

    def forward(self, input_: torch.Tensor) -> Any:
        """In SP mode: ``input_`` [n*S, in/P] gives [n, out], summed over the TP group; else vLLM's own forward."""
        if not self.runs_in_sp():
            return super().forward(input_)
        bias = self.bias if self.whole is None else self.whole.bias
        if self.switch.dims.tp_rank > 0 or self.skip_bias_add:
            bias = None
        out = self._product(input_, bias)
        if input_.dim() > 2:  # code of transformers; else nothing would change
            out = out.view(*input_.shape[:-2], -1, out.size(-1))
        out = self.switch.all_reduce_tp(out)
        if not self.return_bias:
            return out
        return out, self.bias if self.skip_bias_add else None


class SlottedVocabParallelEmbedding(Slotted, VocabParallelEmbedding):
    """``VocabParallelEmbedding`` with slots [S*vocab/P, hidden]: a rank's tokens in its TP=T shard, then a sum over T.

    Raises:
        NotImplementedError: added embeddings, or a quantized table.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert _switch is not None
        self.switch = _switch
        if self.num_added_embeddings:
            raise NotImplementedError("added embeddings are not supported in SP mode")
        if type(self.quant_method) is not UnquantizedEmbeddingMethod:
            raise NotImplementedError("a quantized embedding is not supported in SP mode")
        self.weight_slots = Slots(self.weight, 0, self.switch.dims, self.impersonate)

    def impersonate(self, shard: int) -> None:
        """As of ``SlottedLinear``."""
        self.shard_indices = self._get_indices(
            self.num_embeddings_padded,
            self.org_vocab_size_padded,
            self.num_embeddings,
            self.org_vocab_size,
            shard,
            self.tp_size,
        )

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """In SP mode: ``input_`` [n] token ids gives [n, hidden]; else vLLM's own forward."""
        if not self.runs_in_sp():
            out: torch.Tensor = super().forward(input_)
            return out
        table, dims = self.weight_slots.whole, self.switch.dims
        # Without added vocabulary the shards are consecutive ranges of token ids, and so are the slots of a rank. Ids
        # beyond all of them, which vLLM lets pass (as that of the tokenizer's size), give zeros as in TP mode.
        row = input_ - dims.tp_rank * table.shape[0]
        elsewhere = (row < 0) | (row >= table.shape[0])
        out = F.embedding(row.masked_fill(elsewhere, 0), table)
        return self.switch.all_reduce_tp(out.masked_fill_(elsewhere.unsqueeze(-1), 0))


def unfold(model: nn.Module) -> None:
    """Prepare a model whose code is that of transformers.

    Raises:
        NotImplementedError: it has an embedding of another kind.
    """
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, Slotted | ParallelLMHead):
            raise NotImplementedError(f"{name}: {type(module).__name__} is not supported in SP mode")
        if isinstance(module, SlottedQKVParallelLinear) and module.shifts:
            module.__class__ = UnfoldedQKVParallelLinear


def why_not_early(model: nn.Module) -> str | None:
    """Why q, k and v cannot be exchanged where they are made, before rotary embedding and norms of heads.

    What is sent then needs no packing, and between two ranks one half travels while the other is made. Attention gets
    the same: rows of all tokens, as in TP mode, with the positions of all tokens.

    Returns:
        None where they can: one layer, unquantized and without LoRA, makes q, k and v and no more, and nothing else
        takes positions.
    """
    if learns_positions(model):
        return "the model learns positions"
    inside, found = inside_gathered(model), False
    for name, module in gathered_modules(model):
        if _takes_positions(module):
            return f"{name} takes positions"
    for name, module in model.named_modules():
        attention = [child for child in module.children() if isinstance(child, Attention)]
        if not attention or module in inside:
            continue
        found = True
        made: list[Any] = [
            child for child in module.modules() if isinstance(child, SlottedColumnParallelLinear) and child.shifts
        ]
        if len(attention) != 1 or [type(layer) for layer in made] != [SlottedQKVParallelLinear]:
            return f"{name} does not make q, k and v in one layer"
        if made[0].output_size_per_partition != sum(qkv_widths(attention[0])):
            return f"{name} makes q, k and v together with more"
        if made[0].whole is not None or made[0].adapters is not None:
            return f"{name} makes q, k and v of quantized weights or with LoRA"
    return None if found else "no layer of the model has attention"


def _takes_positions(module: nn.Module) -> bool:
    return "positions" in inspect.signature(module.forward).parameters


def stop_shifting(modules: Iterable[nn.Module]) -> None:
    """Of modules that run as in TP mode in both modes, free the other slots."""
    for module in modules:
        if isinstance(module, Slotted) and module.shifts:
            module.stop_shifting()


def check_layers(model: nn.Module) -> None:
    """Refuse a model with a layer that would have to shift and cannot.

    Raises:
        NotImplementedError: names the first such layer and its settings.
    """
    for name, module in model.named_modules():
        if isinstance(module, Slotted) and module.shifts and module.refusal:
            raise NotImplementedError(f"{name}: {module.refusal} is not supported in SP mode")


_REPLACEMENTS = {
    "ColumnParallelLinear": SlottedColumnParallelLinear,
    "MergedColumnParallelLinear": SlottedMergedColumnParallelLinear,
    "QKVParallelLinear": SlottedQKVParallelLinear,
    "RowParallelLinear": SlottedRowParallelLinear,
    "VocabParallelEmbedding": SlottedVocabParallelEmbedding,
}


@contextmanager
def slotted_layers(switch: ModeSwitch) -> Iterator[None]:
    """While open, models are built from the layers of this module, tied to ``switch``.

    Raises:
        RuntimeError: another plugin has replaced one of these layers already.
    """
    global _switch
    taken = sorted(set(_REPLACEMENTS) & set(custom_op.op_registry_oot))
    if taken:
        raise RuntimeError(f"Shift Parallelism replaces {taken}, which another vLLM plugin has replaced already")
    _register()
    _switch = switch
    try:
        yield
    finally:
        _switch = None
        _unregister()


@contextmanager
def stock_layers() -> Iterator[None]:
    """While open, within ``slotted_layers``, models are built from vLLM's own layers."""
    _unregister()
    try:
        yield
    finally:
        _register()


def _register() -> None:
    for name, layer_cls in _REPLACEMENTS.items():
        custom_op.PluggableLayer.register_oot(layer_cls, name=name)


def _unregister() -> None:
    # vLLM has no call that takes a registration back; an engine of another kind may follow in this process.
    for name in _REPLACEMENTS:
        del custom_op.op_registry_oot[name]
