"""Slot storage: one copy of the weights, the TP shard a view of it."""

import gc
import weakref

import pytest
import torch
from torch import nn

from vllm_shift.dims import ParallelDims
from vllm_shift.slots import Slots


class Layer:
    """A parameter with a loader in vLLM's manner: it takes the shard of the rank that the layer believes to be."""

    def __init__(self, shape: tuple[int, ...], dim: int, rank: int) -> None:
        self.rank, self.dim = rank, dim
        self.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.weight.weight_loader = self.load

    def impersonate(self, rank: int) -> None:
        self.rank = rank

    def load(self, param: nn.Parameter, whole: torch.Tensor) -> None:
        size = param.shape[self.dim]
        param.data.copy_(whole.narrow(self.dim, self.rank * size, size))


@pytest.mark.parametrize(("sp", "tp"), [(2, 1), (1, 4), (4, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_loading_fills_the_tp_shard_and_the_sp_weight(sp, tp, dim):
    whole = torch.arange(12.0 * 24).view(12, 24)
    for rank in range(sp * tp):
        dims = ParallelDims(sp, tp, rank)
        shape = [12, 24]
        shape[dim] //= dims.world
        layer = Layer(tuple(shape), dim, rank)
        slots = Slots(layer.weight, dim, dims, layer.impersonate)
        layer.weight.weight_loader(layer.weight, whole)
        assert layer.rank == rank
        assert torch.equal(layer.weight.data, whole.chunk(dims.world, dim)[rank])
        assert torch.equal(slots.whole, whole.chunk(tp, dim)[dims.tp_rank])


@pytest.mark.parametrize("dim", [0, 1])
def test_one_copy(dim):
    dims = ParallelDims(4, 1, 2)
    layer = Layer((6, 8), dim, 2)
    slots = Slots(layer.weight, dim, dims, layer.impersonate)
    assert slots.whole.untyped_storage().nbytes() == 4 * layer.weight.nbytes
    assert layer.weight.untyped_storage().data_ptr() == slots.whole.untyped_storage().data_ptr()
    assert layer.weight.data_ptr() == slots[2].data_ptr()
    # A slot is as dense as a weight of its own: its elements have no others between them.
    assert layer.weight.data.movedim(dim, 0).is_contiguous()


def test_a_model_may_add_dimensions_before_loading():
    dims = ParallelDims(2, 1, 1)
    layer = Layer((3, 4), 0, 1)
    slots = Slots(layer.weight, 0, dims, layer.impersonate)
    layer.weight.data = layer.weight.data.unsqueeze(1)  # as convolutions do
    whole = torch.arange(24.0).view(6, 1, 4)
    layer.weight.weight_loader(layer.weight, whole)
    assert torch.equal(layer.weight.data, whole[3:])
    assert torch.equal(slots.whole, whole.view(6, 4))
    slots.release()
    assert torch.equal(layer.weight.data, whole[3:])
    assert layer.weight.untyped_storage().nbytes() == whole[3:].nbytes
    assert layer.weight.weight_loader == layer.load


def test_dummy_weights_repeat_the_own_slot():
    dims = ParallelDims(3, 1, 1)
    layer = Layer((2, 5), 0, 1)
    slots = Slots(layer.weight, 0, dims, layer.impersonate)
    layer.weight.data.copy_(torch.arange(10.0).view(2, 5))
    slots.repeat_own()
    assert torch.equal(slots.whole, torch.arange(10.0).view(2, 5).repeat(3, 1))


def test_a_reload_counts_first_and_then_fills_all_slots():
    dims = ParallelDims(2, 1, 1)
    layer = Layer((3, 4), 0, 1)
    slots = Slots(layer.weight, 0, dims, layer.impersonate)
    load, whole = layer.weight.weight_loader, torch.arange(24.0).view(6, 4)
    slots.whole.zero_()
    load(nn.Parameter(torch.empty(3, 4, device="meta"), requires_grad=False), whole)
    assert not slots.whole.any()
    stands_for_it = nn.Parameter(torch.empty(3, 4), requires_grad=False)
    load(stands_for_it, whole)
    assert torch.equal(slots.whole, whole)
    assert torch.equal(stands_for_it, whole[3:])
    assert torch.equal(layer.weight, whole[3:])


def test_a_loader_keeps_neither_layer_nor_slots_alive():
    layer = Layer((3, 4), 0, 1)
    slots = Slots(layer.weight, 0, ParallelDims(2, 1, 1), layer.impersonate)
    loader, gone = layer.weight.weight_loader, [weakref.ref(layer), weakref.ref(slots)]  # noqa: F841
    del layer, slots
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_after_the_release_an_old_loader_is_the_stock_one():
    layer = Layer((3, 4), 0, 1)
    slots = Slots(layer.weight, 0, ParallelDims(2, 1, 1), layer.impersonate)
    loader, whole = layer.weight.weight_loader, torch.arange(24.0).view(6, 4)
    slots.release()
    del slots
    gc.collect()
    loader(layer.weight, whole)
    assert torch.equal(layer.weight, whole[3:])


def test_slots_have_the_type_of_the_parameter():
    layer = Layer((3, 4), 0, 1)
    layer.weight.data = layer.weight.data.bfloat16()
    slots = Slots(layer.weight, 0, ParallelDims(2, 1, 1), layer.impersonate)
    assert slots.whole.dtype == layer.weight.dtype == torch.bfloat16


def test_a_reload_that_counts_reaches_the_stock_loader():
    layer, counted = Layer((3, 4), 0, 1), []
    layer.weight.weight_loader = lambda param, loaded_weight: counted.append(param.is_meta)
    Slots(layer.weight, 0, ParallelDims(2, 1, 1), layer.impersonate)
    layer.weight.weight_loader(nn.Parameter(torch.empty(3, 4, device="meta"), requires_grad=False), torch.zeros(6, 4))
    assert counted == [True]
