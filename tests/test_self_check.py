"""The self-check at start-up: sound engines pass in every dtype, bugs are found on every rank, with their layer."""

import math
from types import SimpleNamespace

import pytest
import torch
from mutations import MUTATIONS
from rank_group import SHARP_MUTATIONS, self_checks
from test_exchange import SimpleGroup
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_shift import rounding, self_check
from vllm_shift.dims import ParallelDims
from vllm_shift.prompts import Prompts, prompt_lengths
from vllm_shift.rounding import allowed_error, relative_error
from vllm_shift.self_check import TOKENS_PER_RANK, Difference, SelfCheck
from vllm_shift.switch import ModeSwitch


def fits(lengths):
    return sum(lengths) <= 1000


@pytest.mark.parametrize("threshold", [0, 1, 20, 64, 255, 600, 998])
@pytest.mark.parametrize("sp", [2, 3, 8])
def test_prompts_run_in_one_step_of_sp_mode(threshold, sp):
    lengths = prompt_lengths(threshold, sp, 2048, 8, 400, fits, TOKENS_PER_RANK)
    assert threshold < sum(lengths) <= 1000
    assert max(lengths) <= 400
    assert min(lengths) > 0
    assert len(lengths) > 1
    assert sum(lengths) % sp or threshold == 998


def test_prompts_respect_the_engine():
    assert prompt_lengths(10, 2, 2048, 1, 400, fits, TOKENS_PER_RANK) == [17]
    assert prompt_lengths(10, 2, 11, 8, 400, fits, TOKENS_PER_RANK) == [4, 4, 3]
    assert prompt_lengths(0, 2, 16, 8, 400, fits, TOKENS_PER_RANK) == [6, 5, 5]
    assert prompt_lengths(0, 2, 1, 1, 400, fits, TOKENS_PER_RANK) == [1]
    # No step can reach SP mode: too few tokens in a step, too few blocks, too few requests.
    assert prompt_lengths(128, 2, 128, 8, 400, fits, TOKENS_PER_RANK) is None
    assert prompt_lengths(1000, 2, 2048, 8, 400, fits, TOKENS_PER_RANK) is None
    assert prompt_lengths(500, 2, 2048, 1, 400, fits, TOKENS_PER_RANK) is None


def test_a_check_that_has_no_room_is_announced(caplog_vllm):
    check = object.__new__(SelfCheck)
    scheduler = SimpleNamespace(
        max_num_batched_tokens=512, max_num_scheduled_tokens=None, max_num_seqs=8, enable_chunked_prefill=True
    )
    model = SimpleNamespace(max_model_len=512, architecture="LlamaForCausalLM", runner_type="generate")
    check._worker = SimpleNamespace(
        scheduler_config=scheduler, model_config=model, vllm_config=SimpleNamespace(speculative_config=None), rank=0
    )
    check._switch = SimpleNamespace(max_tp_tokens=256, dims=SimpleNamespace(sp=2))
    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))]
    check._worker.model_runner = SimpleNamespace(kv_cache_config=SimpleNamespace(num_blocks=4, kv_cache_groups=groups))
    check._execute, check._share = None, 0.0
    assert not check.run()
    assert "no self-check, because no prompts of 257 tokens" in caplog_vllm.text
    caplog_vllm.clear()
    model.architecture = "NewForCausalLM"
    with pytest.raises(RuntimeError, match="NewForCausalLM is not among the tested architectures and needs one"):
        check.run()
    for most_scheduled, threshold in ((None, 512), (256, 256)):  # no step runs in SP mode
        scheduler.max_num_scheduled_tokens = most_scheduled
        check._switch.max_tp_tokens = threshold
        assert not check.run()
    assert not caplog_vllm.text


def test_blocks_of_draft_tokens_end_where_requests_end():
    prompts, group = object.__new__(Prompts), SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    prompts._worker, prompts._drafts = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512)), 5
    assert [prompts._num_blocks(group, length) for length in (11, 12, 507, 511)] == [1, 2, 32, 32]


@pytest.mark.parametrize(("swap_bytes", "checks"), [(None, 1), (math.inf, 1), (4096, 2)])
@pytest.mark.parametrize("fails", [False, True])
def test_what_only_large_steps_do_is_checked_too(monkeypatch, swap_bytes, checks, fails):
    peers = None if swap_bytes is None else SimpleNamespace(swap_bytes=swap_bytes)
    monkeypatch.setattr(self_check, "_agree", lambda first: first)
    check, ran = object.__new__(SelfCheck), []
    check._switch = ModeSwitch(ParallelDims(2, 1, 0), 8, SimpleGroup(unique_name="sp", world_size=2), None)
    check._switch.exchange.peers = peers
    check._runner = SimpleNamespace(cudagraph_manager=SimpleNamespace(_graphs_captured=True))
    check._explain = lambda first: first.place

    def run(most_tokens):
        graphs = check._runner.cudagraph_manager._graphs_captured
        ran.append((check._switch.max_tp_tokens, check._switch.eager, graphs, peers and peers.swap_bytes))

    check._prompts, check._amplify = SimpleNamespace(run=run, read_cache=lambda: []), lambda: {}
    check._compare = lambda *args: [Difference(f"layer {len(ran)}", 0, float(fails and len(ran) == 3), 0.5)]
    if fails and checks == 2:
        with pytest.raises(RuntimeError, match="layer 3"):
            check._differences()
    else:
        assert [each.place for each in check._differences()] == ["layer 2", "layer 3"][:checks]
    # The reference, a step as it would be, and one in which everything is swapped, which its CUDA graph would not.
    # Once more where it fails, when it is known what rounding grows to; that it is right then does not help.
    assert ran == [(8, False, True, swap_bytes)] * 2 + [(8, False, False, 0)] * (checks - 1) * (1 + fails)
    assert peers is None or peers.swap_bytes == swap_bytes
    assert check._runner.cudagraph_manager._graphs_captured


def check_in_bfloat16(sp: int, is_moe: bool) -> SelfCheck:
    """Of a model of 48 layers, without an engine."""
    check = object.__new__(SelfCheck)
    check._switch = SimpleNamespace(dims=ParallelDims(sp, 1, 0))
    check._dtype, check._layers, check._quantizes, check._quantizes_cache = torch.bfloat16, 48, False, False
    check._share, check._bounds_outliers = check._outliers(is_moe)
    return check


@pytest.mark.parametrize("rank", range(4))
def test_a_share_that_may_differ_does_not_hide_a_rank(rank):
    """Of a mixture of experts that a quarter of the vectors may differ more, and a rank has a quarter of the tokens."""
    check = check_in_bfloat16(sp=4, is_moe=True)
    check._prompts = SimpleNamespace(lengths=[86, 86, 85], read_cache=lambda: [])
    reference = torch.randn(257, 16, generator=torch.Generator().manual_seed(0))

    def failures(wrong):
        found = reference.clone()
        found[wrong] *= -1
        return [each for each in check._compare(reference, found, [], 0) if each.fails]

    of_rank = torch.arange(257).split(65)[rank]
    # With the last prompt first, its tokens are in two places.
    assert failures(of_rank)
    assert failures((of_rank + 86) % 257)
    assert not failures(torch.randperm(257, generator=torch.Generator().manual_seed(rank))[:60])
    assert failures(torch.randperm(257, generator=torch.Generator().manual_seed(rank))[:90])


@pytest.mark.parametrize(("sp", "may_differ"), [(2, 6), (8, 4)])
def test_few_tokens_of_a_trained_model_may_differ_more(sp, may_differ):
    check = check_in_bfloat16(sp, is_moe=False)
    reference = torch.nn.functional.normalize(torch.randn(65, 16, generator=torch.Generator().manual_seed(0)))

    def fails(tokens, by, layer=11, layers_before=0):
        found = reference.clone()
        found[:tokens] *= 1 + by
        name = f"layers.{layer}"
        check._prompts = SimpleNamespace(read_cache=lambda: [(name, found)])
        return check._compare(None, None, [(name, reference)], layers_before)[0].fails

    assert allowed_error(torch.bfloat16, 11) == 0.1875
    assert not fails(65, 0.18)
    assert not fails(may_differ, 0.45)
    assert fails(may_differ + 1, 0.2)
    assert fails(1, 0.51)
    assert not fails(65, 0.015, layer=0)
    assert fails(1, 0.017, layer=0)
    # Without a TP mode, whose reference is eager.
    assert not fails(65, 0.03, layer=0, layers_before=1)
    assert fails(1, 0.033, layer=0, layers_before=1)
    assert not fails(1, 0.4, layer=1, layers_before=1)
    check._dtype = torch.float32
    assert check._outliers(is_moe=False)[0] == check._outliers(is_moe=True)[0] == 0


def test_relative_error():
    x = torch.randn(50, 4, 32, generator=torch.Generator().manual_seed(0))
    assert relative_error(x, x, 0) == 0
    one_wrong = x.clone()
    one_wrong[7, 2] *= 1.5
    assert relative_error(x, one_wrong, 0) == pytest.approx(0.5, abs=0.1)
    assert relative_error(x, one_wrong, 0.25) == 0
    # All tokens of one head of many, and some of all heads: together less than a tenth.
    cache = torch.randn(3, 64, 16, 32, generator=torch.Generator().manual_seed(0))
    of_a_head = cache.clone()
    of_a_head[:, 5] *= 1.5
    of_a_head[0, :, :4] *= 1.5
    assert relative_error(cache, of_a_head, 0.1) == pytest.approx(0.5, abs=0.1)
    of_a_head[:, 5] = cache[:, 5]
    assert relative_error(cache, of_a_head, 0.1) == 0
    # A head of which nothing is written is no difference, if another one is.
    of_a_head[:, 1] = cache[:, 1] = 0
    assert relative_error(cache, of_a_head, 0.1) == 0
    # Nothing written in one of them, or in both.
    assert relative_error(x, torch.zeros_like(x), 0.25) > 0.5
    assert relative_error(torch.zeros_like(x), torch.zeros_like(x), 0) == math.inf
    one_wrong[3] = math.nan
    assert relative_error(x, one_wrong, 0.25) == math.inf
    assert relative_error(one_wrong, one_wrong, 0.25) == math.inf


def test_what_a_rounding_grows_to_is_allowed_where_it_does():
    check = check_in_bfloat16(sp=2, is_moe=False)
    check._amplified = {"layers.1": 0.02, "layers.2": 1e-6, "layers.3": math.inf}
    reference = torch.ones(100, 16)

    def allowed(layer):
        return check._difference(f"layers.{layer}", layer, reference, reference * 1.001, 0).allowed

    assert [allowed(layer) for layer in range(4)] == [2 * 2**-7, 2 * 0.02, 6 * 2**-7, rounding.MOST_ALLOWED]
    moved = rounding.round_otherwise(reference.bfloat16())
    assert moved.unique().tolist() == [1, 1 + 2**-7]
    assert reference.unique().tolist() == [1]


def test_what_a_rounding_grows_to_is_measured_without_the_vectors_that_may_differ_more():
    check = check_in_bfloat16(sp=2, is_moe=False)
    check._switch = ModeSwitch(ParallelDims(2, 1, 0), 8, SimpleGroup(unique_name="sp", world_size=2), None)
    embedding = object.__new__(VocabParallelEmbedding)
    torch.nn.Module.__init__(embedding)
    embedding.forward = lambda x: x
    check._runner = SimpleNamespace(
        cudagraph_manager=SimpleNamespace(_graphs_captured=True), get_model=lambda: torch.nn.ModuleList([embedding])
    )
    check._worker = SimpleNamespace(rank=1)
    ran = []

    def run(most_tokens):
        ran.append((check._switch.max_tp_tokens, check._switch.eager))
        hidden = embedding(torch.ones(100, 16))
        keys, values = hidden.clone(), 1 + 3 * (hidden - 1)
        values[:5] *= len(ran)  # of a hundred, in the second run
        check._prompts.read_cache = lambda: [("layers.1", values), ("layers.1", keys)]
        return keys

    check._prompts = SimpleNamespace(run=run)
    one = 2**-23 / math.sqrt(2)  # of every second value
    assert check._amplify() == pytest.approx({"layers.1": 3 * one, "hidden states": one}, rel=0.1)
    assert ran == [(8, True)] * 2
    assert not embedding._forward_hooks


def test_little_is_allowed_in_the_first_layers():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert allowed_error(dtype, 0) <= 0.016
        assert allowed_error(dtype, 0) < allowed_error(dtype, 10) <= allowed_error(dtype, 1000) <= 0.5


SOUND = [engine["name"] for engine in self_checks("") if "mutation" not in engine]


@pytest.mark.engine
@pytest.mark.parametrize("name", SOUND)
def test_sound_engines_start_and_keep_no_trace(groups, name):
    for rank, result in enumerate(groups(2).results):
        found = result[name]
        assert "refused" not in found
        assert set(found["written"]) == {0}
        assert set(found["stats"].values()) == {0}
        if not name.startswith("check-auto"):  # whose threshold may leave no step to SP mode
            ran = name not in ("check-never", "check-off") and rank == 0
            assert any("self-check passed" in line for line in found["lines"]) == ran


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MUTATIONS)
def test_bugs_are_refused_on_every_rank_by_their_layer(groups, name, dtype):
    _, layer = MUTATIONS[name]
    refusals = {result[f"{name}-{dtype}"]["refused"] for result in groups(2).results}
    (message,) = refusals
    assert f"model.{layer}" in message
    assert "is the first to differ" in message


@pytest.mark.engine
def test_a_model_in_which_rounding_grows_is_told_from_a_bug(groups):
    results = groups(2).results[0]
    assert any("one rounding of the embeddings grows to" in line for line in results["check-sharp"]["lines"])
    for name in SOUND:
        assert name == "check-sharp" or not any("of the embeddings" in line for line in results[name]["lines"])
    for name in SHARP_MUTATIONS:
        assert "is the first to differ" in results[f"{name}-sharp"]["refused"]


def test_quantization_allows_more_by_layer():
    plain = [allowed_error(torch.float32, layer) for layer in (0, 3, 4)]
    assert plain == pytest.approx([1e-4, 4e-4, 5e-4])
    inputs = [allowed_error(torch.float32, layer, quantizes=True) for layer in (0, 4, 1000)]
    assert inputs == pytest.approx([1e-4, 0.3, 0.5])
    assert allowed_error(torch.bfloat16, 0, quantizes=True) == allowed_error(torch.bfloat16, 0)
    cache = [allowed_error(torch.float32, layer, quantizes_cache=True) for layer in (0, 3, 1000)]
    assert cache == pytest.approx([1e-4 + 0.0625, 4e-4 + 0.125, 0.5])


def test_gpus_multiply_float32_in_tf32(monkeypatch):
    monkeypatch.setattr(rounding, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    assert allowed_error(torch.float32, 0) == 2 * 2**-10
    assert allowed_error(torch.bfloat16, 0) == 2 * 2**-7


def test_short_vectors_count():
    short = torch.full((4, 2), 0.1)
    assert relative_error(short, short, 0) == 0
    # Written in one of them only.
    expected, found = torch.ones(8, 2), torch.ones(8, 2)
    expected[0], found[0] = 0, 0.5
    assert relative_error(expected, found, 0) == pytest.approx(0.53, abs=0.01)
