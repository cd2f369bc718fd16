"""Token ids that no embedding exists for: vLLM lets some pass, and SP mode must give what TP mode gives, zeros."""

from types import SimpleNamespace

import pytest
import torch

from vllm_shift.dims import ParallelDims
from vllm_shift.layers import SlottedVocabParallelEmbedding

TABLE = torch.arange(1.0, 33).view(16, 2)
IDS = torch.tensor([0, 15, 7, 8, 16, 17, 10**6, -1])


@pytest.mark.parametrize(("sp", "tp"), [(2, 1), (2, 2), (2, 4)])
def test_ids_beyond_the_table(sp, tp):
    found = torch.zeros(len(IDS), 2)
    for part, rows in enumerate(TABLE.chunk(tp)):
        layer = SlottedVocabParallelEmbedding.__new__(SlottedVocabParallelEmbedding)
        dims = ParallelDims(sp, tp, part * sp)
        switch = SimpleNamespace(dims=dims, in_sp=True, all_reduce_tp=lambda x: x)
        vars(layer).update(switch=switch, weight_slots=SimpleNamespace(whole=rows))
        found += layer.forward(IDS)
    expected = torch.stack([TABLE[i] if 0 <= i < 16 else torch.zeros(2) for i in IDS.tolist()])
    assert torch.equal(found, expected)
