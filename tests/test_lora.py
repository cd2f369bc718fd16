"""Which adapters the tokens of one rank have, as vLLM's kernels for CUDA read it; on the CPU, without kernels."""

from types import SimpleNamespace

import pytest
import torch
from test_early import bare
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

from vllm_shift.dims import ParallelDims
from vllm_shift.lora import TokenAdapters, attach_adapters

ADAPTERS, MOST = 4, 32


def stock_punica(mapping: list[int]) -> SimpleNamespace:
    meta = LoRAKernelMeta.make(ADAPTERS, MOST, "cpu")
    meta.token_lora_mapping.fill_(3)  # of an earlier step
    meta.prepare_tensors(torch.tensor(mapping))
    indices = torch.full((2, MOST), 7)
    indices[1, : len(mapping)] = torch.tensor(mapping) * 1000
    return SimpleNamespace(token_mapping_meta=meta, _embeddings_indices=indices)


def tokens_by_adapter(meta: LoRAKernelMeta, rows: int) -> dict[int, list[int]]:
    """As the kernels find them."""
    mapping, order, counts, starts, adapters, *_ = meta.meta_args(rows, specialize_active_lora=False)
    assert len(mapping) == len(order) == rows
    found = zip(adapters.tolist(), starts.tolist(), counts.tolist(), strict=False)
    return {
        adapter: sorted(order[start : start + count].tolist()) for adapter, start, count in found
        if adapter >= 0 and count
    }  # fmt: skip


@pytest.mark.parametrize("sp", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 31, 32])
def test_each_rank_finds_the_adapters_of_its_tokens(sp, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    # Adapter 3 is not in use; -1 is none.
    mapping = torch.randint(-1, 3, (num_tokens,), generator=generator).tolist()
    mapping[0] = 2
    stock, rows = stock_punica(mapping), -(-num_tokens // sp)
    for rank in range(sp):
        own = TokenAdapters(stock, ParallelDims(sp, 1, rank))
        own.take(num_tokens)
        expected: dict[int, list[int]] = {}
        for row, adapter in enumerate(mapping[rank * rows : (rank + 1) * rows]):
            assert own.punica._embeddings_indices[1, row] == adapter * 1000
            expected.setdefault(adapter, []).append(row)
        expected.pop(-1, None)
        found = tokens_by_adapter(own.punica.token_mapping_meta, rows)
        # Padding may have any adapter: nobody reads what comes of it.
        real = len(mapping[rank * rows : (rank + 1) * rows])
        found = {adapter: [row for row in each if row < real] for adapter, each in found.items()}
        assert {adapter: each for adapter, each in found.items() if each} == expected


def test_a_step_without_adapters_is_one_on_every_rank():
    stock = stock_punica([-1] * 9)
    own = TokenAdapters(stock, ParallelDims(2, 1, 1))
    own.take(9)
    flag = own.punica.token_mapping_meta.no_lora_flag_cpu
    assert flag.item()
    stock.token_mapping_meta.prepare_tensors(torch.tensor([0] * 9))
    assert not flag.item()


class Adapted(BaseLayerWithLoRA):
    def __init__(self) -> None:
        super().__init__()
        self.punica_wrapper = SimpleNamespace()


def attach(model, most):
    scheduler = SimpleNamespace(max_num_batched_tokens=most)
    switch = SimpleNamespace(dims=ParallelDims(3, 1, 0), token_adapters=None)
    attach_adapters(model, switch, SimpleNamespace(lora_config=None, scheduler_config=scheduler))


def test_adapters_of_gathered_modules_need_room_for_padding():
    model = nn.Sequential(bare(MultiHeadLatentAttentionWrapper, proj=Adapted()))
    attach(model, 9)
    with pytest.raises(NotImplementedError, match=r"0.proj: LoRA needs .* a multiple of 3, got 10"):
        attach(model, 10)
    attach(nn.Sequential(nn.Linear(2, 2)), 10)
