"""Tokens, log-probabilities and KV caches: transformers, stock vLLM at TP=P and both modes of ours agree, in fp32.

Prompts of 1 to 200 tokens run with chunks of 128, prefix caching, and P both below and above the 2 KV heads.
"""

import pytest
import tiny
import torch
import transformers
from rank_group import CASES, NEVER, ON_FOUR_RANKS, TOLERANCE, assert_same, thresholds_of

pytestmark = pytest.mark.engine


RUNS = [
    pytest.param(
        (case, number),
        marks=[pytest.mark.nightly] if case.nightly else [],
        id=f"{case.name}-sp{case.sp}-tp{case.tp}-threshold{threshold}",
    )
    for case in CASES
    for number, threshold in enumerate(thresholds_of(case.name, case.nightly))
]
CORE = [run for run in RUNS if run.values[0][0].name in tiny.CONFIGS]


@pytest.fixture(params=RUNS)
def runs(request, groups):
    """One run of ours on every rank, and the run of stock vLLM that was given the same KV blocks."""
    case, number = request.param
    results = groups(case.world, case.nightly).results
    ours = [result[f"{case.name}-{case.sp}x{case.tp}"][number] for result in results]
    return ours, results[0][f"{case.name}-stock"][number]


def test_tokens_equal_stock_on_every_rank(runs):
    ours, stock = runs
    for run in ours:
        assert_same(run, stock)


def test_kv_caches_equal_stock_on_every_rank(runs):
    for run in runs[0]:
        assert run["kv_difference"] < TOLERANCE
        assert min(run["kv_written"]) == max(run["kv_written"]) > 100


def test_the_threshold_decides_the_mode(runs):
    for run in runs[0]:
        stats = run["stats"]
        assert (stats["sp_steps"] > 0) == (run["threshold"] < NEVER)
        assert (stats["tp_steps"] > 0) == (run["threshold"] > 0)
        assert stats["sp_tokens"] > run["threshold"] * stats["sp_steps"] or stats["sp_steps"] == 0
        assert stats["tp_tokens"] <= run["threshold"] * stats["tp_steps"]


def test_two_ranks_exchange_q_k_and_v_where_they_are_made(runs, request):
    case, _ = request.node.callspec.params["runs"]
    # OLMo's norms see q and k of all heads, those of Command R+ have weights for each.
    expected = case.sp == 2 and case.name not in ("olmo2", "olmo3", "cohere-plus")
    assert [run["early"] for run in runs[0]] == [expected] * case.world


# The others have layers that run as in TP mode in both modes.
@pytest.mark.parametrize("runs", CORE, indirect=True)
def test_one_copy_of_the_weights(runs, groups, request):
    ours, _ = runs
    case, _ = request.node.callspec.params["runs"]
    name, sp, tp = case.name, case.sp, case.tp
    checkpoint = transformers.AutoModelForCausalLM.from_pretrained(groups(case.world, case.nightly).folder / name)
    config, bytes_per_value = checkpoint.config, 4
    sharded_once = 512 * config.hidden_size  # vocabulary, padded to a multiple of 64
    kv_copies = max(1, tp * sp // config.num_key_value_heads)  # a KV head per TP=P shard, at least
    kv_values = 2 * config.num_key_value_heads * kv_copies * 32 * config.hidden_size
    per_layer = kv_values + 2 * 8 * 32 * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    slots = (sharded_once + config.num_hidden_layers * per_layer) / tp
    head = 0 if config.tie_word_embeddings else sharded_once / (sp * tp)
    biases_and_norms = 20 * config.num_hidden_layers * config.hidden_size
    for run in ours:
        assert run["weights"]["views"]
        assert all(run["weights"]["views"])
        matrices = bytes_per_value * (slots + head)
        assert matrices <= run["weights"]["bytes"] <= matrices + bytes_per_value * biases_and_norms


STOCK = [
    pytest.param(
        case.name,
        case.world,
        case.nightly,
        marks=[pytest.mark.nightly] if case.nightly else [],
        id=f"{case.name}-{case.world}",
    )
    for case in CASES
    if case.tp == 1
]


@pytest.mark.parametrize(("name", "world", "nightly"), STOCK)
def test_stock_equals_transformers(groups, name, world, nightly):
    group = groups(world, nightly)
    model = transformers.AutoModelForCausalLM.from_pretrained(group.folder / name, dtype=torch.float32).eval()
    for output in group.results[0][f"{name}-stock"][0]["outputs"]:
        prompt, tokens = output["prompt"], output["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()
        assert output["logprobs"] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("world", "names"), [(2, tiny.CONFIGS), (4, ON_FOUR_RANKS)])
def test_an_engine_without_the_flags_has_nothing_of_ours(groups, world, names):
    # Engines with the flags have run in the same processes before all but the first of these.
    for result in groups(world).results:
        for name in names:
            facts = result[f"{name}-stock"][0]["facts"]
            assert facts["replaced"] == []
            assert facts["hooks"] == 0
            assert facts["worker"] == "vllm.v1.worker.cpu_worker"
            assert "vllm_shift" not in facts["modules"]
