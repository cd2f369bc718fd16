"""Rank arithmetic, for every layout of up to 16 ranks."""

from itertools import chain

import pytest

from vllm_shift.dims import ParallelDims

LAYOUTS = [(sp, tp) for sp in range(1, 17) for tp in range(1, 17) if sp * tp <= 16]


@pytest.mark.parametrize(("sp", "tp"), LAYOUTS)
def test_every_rank_is_in_one_group_of_each_kind(sp, tp):
    ranks = [ParallelDims(sp, tp, rank) for rank in range(sp * tp)]
    for dims in ranks:
        assert dims.world == sp * tp
        assert dims.rank == dims.tp_rank * sp + dims.sp_rank
        assert sorted(chain(*dims.sp_groups)) == sorted(chain(*dims.tp_groups)) == list(range(sp * tp))
        assert dims.sp_groups[dims.tp_rank][dims.sp_rank] == dims.rank
        assert dims.tp_groups[dims.sp_rank][dims.tp_rank] == dims.rank


@pytest.mark.parametrize(("sp", "tp"), LAYOUTS)
def test_slots_are_the_shards_of_the_sp_group(sp, tp):
    for rank in range(sp * tp):
        dims = ParallelDims(sp, tp, rank)
        # TP=P shard r belongs to rank r, so a rank's slots are the shards of the ranks of its SP group, in order.
        assert list(dims.slots) == dims.sp_groups[dims.tp_rank]
        assert dims.slots[dims.sp_rank] == rank


@pytest.mark.parametrize(("sp", "tp"), LAYOUTS)
def test_local_tokens_cover_the_step(sp, tp):
    dims = ParallelDims(sp, tp, 0)
    for num_tokens in range(1, 70):
        rows = dims.local_tokens(num_tokens)
        assert (rows - 1) * sp < num_tokens <= rows * sp
        tokens = list(range(num_tokens))
        held = [tokens[ParallelDims(sp, tp, rank).local_slice(num_tokens)] for rank in range(sp)]
        assert [token for each in held for token in each] == tokens
        assert max(map(len, held)) == rows


@pytest.mark.parametrize(("sp", "tp", "rank"), [(0, 1, 0), (1, 0, 0), (-2, -2, 1), (2, 2, 4), (2, 2, -1)])
def test_what_is_no_place_in_an_engine_is_refused(sp, tp, rank):
    with pytest.raises(ValueError, match="at least 1" if min(sp, tp) < 1 else "outside an engine of 4 ranks"):
        ParallelDims(sp, tp, rank)
