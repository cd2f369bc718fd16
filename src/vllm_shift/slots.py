"""One copy of the weights for both modes: the TP=P shards of an SP group, side by side.

A rank of an (S, T) engine stores S *slots* per parallel weight, one for each TP=P shard of its SP group. All of them
together are its TP=T weight, for SP mode; the slot numbered by its SP rank is its TP=P weight, for TP mode, as a view.
vLLM's own weight loader fills the slots one by one, as if the layer were on the rank that the slot belongs to, so
every checkpoint layout and every KV head replication rule of vLLM holds.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from vllm_shift.dims import ParallelDims

# Puts the layer in the place of rank `shard` of TP=P, as far as its weight loader can tell.
Impersonate = Callable[[int], None]


class Slots:
    """Storage of one parallel parameter.

    Args:
        param: the parameter as vLLM created it, of its TP=P shard's shape. Its data becomes a view of its slot.
        dim: the dimension that tensor parallelism shards.
        dims: the rank's place.
        impersonate: called with a TP=P rank before vLLM's loader fills that rank's slot.

    Attributes:
        whole: all slots as one tensor, ``dims.sp`` times as large as ``param`` along ``dim``: the TP=T shard. In memory
            ``dim`` comes first, so that each slot is one dense block; a row-parallel weight is stored transposed.
    """

    def __init__(self, param: Any, dim: int, dims: ParallelDims, impersonate: Impersonate) -> None:
        self._dim, self._dims, self._impersonate = dim, dims, impersonate
        self._size = param.shape[dim]
        # In memory the slots follow each other, so that each is as dense as a weight of its own: a slice of every row
        # is slower in TP mode, a transposed weight is not (benchmarks/row_layout.py).
        outer, *inner = param.movedim(dim, 0).shape
        storage = torch.empty(outer * dims.sp, *inner, dtype=param.dtype, device=param.device)
        self.whole = storage.movedim(0, dim)
        self._param, self._stock_loader = param, param.weight_loader
        param.weight_loader = _loader(self)
        param.data = self[dims.sp_rank]

    def __getitem__(self, slot: int) -> torch.Tensor:
        """A slot as a view, in the shape of a TP=P shard."""
        return self.whole.narrow(self._dim, slot * self._size, self._size)

    def load(self, param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Fill every slot with vLLM's own weight loader, which is called with ``param`` in the slot's place.

        Args:
            param: the parameter, or what stands for it while vLLM reloads weights.
            loaded_weight: a weight of the checkpoint, whole.
            args: passed on.
            kwargs: passed on.
        """
        if param.is_meta:  # a reload that only counts what would be loaded
            self._stock_loader(param, loaded_weight, *args, **kwargs)
            return
        shape = param.shape  # a model may have added dimensions of 1 since
        for slot, shard in enumerate(self._dims.slots):
            self._impersonate(shard)
            param.data = self[slot].view(shape)
            self._stock_loader(param, loaded_weight, *args, **kwargs)
        self._impersonate(self._dims.rank)
        param.data = self[self._dims.sp_rank].view(shape)

    def repeat_own(self) -> None:
        """Fill the other slots with this rank's: vLLM's dummy weights are equal on every rank."""
        for slot in range(self._dims.sp):
            if slot != self._dims.sp_rank:
                self[slot].copy_(self[self._dims.sp_rank])

    def release(self) -> None:
        """Give the parameter memory of its own, of its TP=P shard alone."""
        self._param.data = self._param.data.clone()
        self._param.weight_loader = self._stock_loader


def _loader(slots: Slots) -> Callable[..., None]:
    """A weight loader that does not keep the weights alive: vLLM remembers loaders, for reloads."""
    stock_loader = slots._stock_loader
    stock_loader_ref = weakref.WeakMethod(stock_loader) if inspect.ismethod(stock_loader) else lambda: stock_loader
    slots_ref = weakref.ref(slots)

    def load(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        slots, stock_loader = slots_ref(), stock_loader_ref()
        assert stock_loader is not None
        (stock_loader if slots is None else slots.load)(param, loaded_weight, *args, **kwargs)

    return load
