"""vLLM's features in both modes: the same results as stock vLLM with TP=P, in fp32.

The thresholds are 0, where every step runs in SP mode, and 48, where prefills do and decoding does not.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
from rank_group import run_ranks

pytestmark = pytest.mark.engine

THRESHOLDS = [0, 48]
TOLERANCE = 1e-3


def speculative(**config: Any) -> dict[str, Any]:
    return {"ask": "tokens", "args": {"speculative_config": {"num_speculative_tokens": 3} | config}}


def features(model: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What to ask of which engine, for two ranks, with `make test`."""
    return {
        "sampling": {"ask": "sampling", "args": {}},
        "prompt embeddings": {"ask": "embeds", "args": {"enable_prompt_embeds": True}},
        "ngram": speculative(method="ngram", prompt_lookup_max=3, prompt_lookup_min=1) | {"ask": "repeats"},
        "eagle": speculative(method="eagle", model=str(tiny.make_drafter("eagle", folder))),
        "draft model": speculative(method="draft_model", model=model),
        "pooling": {"ask": "pooling", "args": {"runner": "pooling"}},
    }


def prompts() -> list[list[int]]:
    """Prompts of 5 to 200 tokens; the last one repeats itself."""
    return [*tiny.prompts()[1:6:2], tiny.prompts()[-2], [9, 10, 11] * 30]


def common(model: str) -> dict[str, Any]:
    """Arguments of every engine."""
    return {
        "model": model, "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_batched_tokens": 128,
        "max_num_seqs": 8, "kv_cache_memory_bytes": 8 << 20, "block_size": 32, "seed": 0, "disable_log_stats": False,
        "distributed_executor_backend": "external_launcher",
    }  # fmt: skip


def run(world: int, sp: int, tp: int, features: dict[str, dict[str, Any]], model: str, folder: Path) -> list[dict]:
    job = {
        "folder": str(folder), "sp": sp, "tp": tp, "start_threshold": 20, "thresholds": THRESHOLDS,
        "prompts": prompts(), "common": common(model),
        "features": [{"name": name} | feature for name, feature in features.items()],
    }  # fmt: skip
    return run_ranks("feature_main.py", world, folder, job, ports=2 * len(features))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.make_checkpoint("llama", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def two_ranks(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run(2, 2, 1, features(model, folder), model, folder)


def assert_equal_to_stock(results: list[dict], name: str) -> None:
    for rank, result in enumerate(results):
        for ours, stock in zip(result[name]["ours"], result[name]["stock"], strict=True):
            assert len(ours["outputs"]) == len(stock["outputs"]) > 0
            for our, their in zip(ours["outputs"], stock["outputs"], strict=True):
                assert our["tokens"] == their["tokens"]
                assert our["numbers"] == pytest.approx(their["numbers"], abs=TOLERANCE)
            assert ours["drafts"] == stock["drafts"]
            assert ours["kv_difference"] < TOLERANCE
            stats, threshold = ours["stats"], ours["threshold"]
            assert stats["sp_steps"] > 0
            assert (stats["tp_steps"] > 0) == (threshold > 0 and name != "pooling")
            assert any("self-check passed" in line for line in ours["lines"]) == (rank == 0)


@pytest.mark.parametrize("name", ["sampling", "prompt embeddings", "ngram", "eagle", "draft model", "pooling"])
def test_results_equal_stock_in_both_modes(two_ranks, name):
    assert_equal_to_stock(two_ranks, name)


@pytest.mark.parametrize("name", ["ngram", "draft model"])
def test_drafts_are_accepted(two_ranks, name):
    for run in two_ranks[0][name]["ours"]:
        assert run["drafts"]["accepted_tokens"] > 20


@pytest.mark.nightly
def test_eagle3(model, tmp_path):
    eagle3 = speculative(method="eagle3", model=str(tiny.make_drafter("eagle3", tmp_path)))
    assert_equal_to_stock(run(2, 2, 1, {"eagle3": eagle3}, model, tmp_path), "eagle3")


@pytest.mark.nightly
def test_two_pipeline_stages_of_two_ranks(model, tmp_path):
    pipeline = {"ask": "tokens", "args": {"pipeline_parallel_size": 2}}
    assert_equal_to_stock(run(4, 2, 1, {"pipeline": pipeline}, model, tmp_path), "pipeline")
