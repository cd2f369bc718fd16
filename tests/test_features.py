"""vLLM's features in both modes: the same results as stock vLLM with TP=P, in fp32.

The thresholds are 0, where every step runs in SP mode, and 48, where prefills do and decoding does not.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from rank_group import TOLERANCE, run_ranks

pytestmark = pytest.mark.engine

THRESHOLDS = [0, 48]


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
        # These need whole prompts; the second one has no KV cache.
        "pooling, mean": {"ask": "pooling", "args": mean_pooling()},
        "pooling, attention both ways": {"ask": "pooling", "args": mean_pooling(hf_overrides={"is_causal": False})},
        # It stores what a prompt has in its first step.
        "KV connector": {
            "ask": "stored",
            "args": {"kv_transfer_config": connector(folder / "store"), "max_num_batched_tokens": 1024},
        },
        "reload": {"ask": "reloads", "args": {}},
        "streamed weights": {"ask": "tokens", "args": {"load_format": "runai_streamer"}},
        # One place more than adapters in a batch: vLLM's CPU backend gives the last one to prompts without an adapter.
        "LoRA": {"ask": "adapters", "args": {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}},
        "model of transformers": {"ask": "tokens", "args": {"model_impl": "transformers"}},
        "images": images(str(tiny.make_vision_checkpoint(folder))),
        "language model alone": language_model("qwen3_vl", folder),
    }


def mean_pooling(**args: Any) -> dict[str, Any]:
    return {"runner": "pooling", "pooler_config": {"pooling_type": "MEAN"}, "max_num_batched_tokens": 1024} | args


def images(model: str, **args: Any) -> dict[str, Any]:
    # vLLM's profile calls the processor in a way that this version of transformers refuses.
    limits = {"skip_mm_profiling": True, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    return {"ask": "images", "args": {"model": model} | limits | args}


def language_model(name: str, folder: Path) -> dict[str, Any]:
    """Of a checkpoint that takes images."""
    model = str(tiny.make_text_only_checkpoint(name, folder))
    return {"ask": "tokens", "args": {"model": model, "language_model_only": True}}


def connector(store: Path) -> dict[str, Any]:
    return {
        "kv_connector": "RankStore",
        "kv_connector_module_path": "rank_store",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
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


def run(
    world: int,
    sp: int,
    tp: int,
    features: dict[str, dict[str, Any]],
    model: str,
    folder: Path,
    piecewise: bool = False,
    **adapter: Any,
) -> list[dict]:
    """Results of every rank; with ``piecewise``, compiled as on CUDA."""
    job = {
        "folder": str(folder), "sp": sp, "tp": tp, "start_threshold": 20, "thresholds": THRESHOLDS,
        "prompts": prompts(), "common": common(model) | {"enforce_eager": not piecewise}, "piecewise": piecewise,
        "checkpoints": [model, str(tiny.make_checkpoint("llama", folder / "other", seed=1))],
        "adapters": [str(path) for path in tiny.make_adapters(folder, **adapter)],
        "features": [{"name": name} | feature for name, feature in features.items()],
    }  # fmt: skip
    variables = {"TORCHDYNAMO_DISABLE": str(int(not piecewise))}
    return run_ranks("feature_main.py", world, folder, job, ports=2 * len(features), variables=variables)


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
            assert ours["counts"] == stock["counts"]
            assert ours["kv_difference"] < TOLERANCE
            stats, threshold = ours["stats"], ours["threshold"]
            assert stats["sp_steps"] > 0
            assert (stats["tp_steps"] > 0) == (threshold > 0 and "pooling" not in name)
            assert any("self-check passed" in line for line in ours["lines"]) == (rank == 0)


NAMES = [
    "sampling",
    "prompt embeddings",
    "ngram",
    "eagle",
    "draft model",
    "pooling",
    "pooling, mean",
    "pooling, attention both ways",
    "KV connector",
    "reload",
    "streamed weights",
    "LoRA",
    "model of transformers",
    "images",
    "language model alone",
]


@pytest.mark.parametrize("name", NAMES)
def test_results_equal_stock_in_both_modes(two_ranks, name):
    assert_equal_to_stock(two_ranks, name)


@pytest.mark.parametrize("name", ["ngram", "draft model"])
def test_drafts_are_accepted(two_ranks, name):
    for run in two_ranks[0][name]["ours"]:
        assert run["counts"]["accepted"] > 20


def test_the_connector_has_what_was_asked_again_and_nothing_of_the_self_check(two_ranks):
    for result in two_ranks:
        for run in result["KV connector"]["ours"]:
            assert run["outputs"][0]["tokens"] == 0
            assert run["counts"]["loaded"] > 200


def test_a_reload_changes_the_weights(two_ranks):
    for run in two_ranks[0]["reload"]["ours"]:
        answers = [output["tokens"] for output in run["outputs"]]
        first, second, again = (answers[i : i + len(prompts())] for i in range(0, len(answers), len(prompts())))
        assert first == again
        assert first != second


def test_adapters_equal_transformers(two_ranks, model, tmp_path):
    adapters = tiny.make_adapters(tmp_path)
    for first, adapter in enumerate([None, *adapters[:2]]):
        reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapter is not None:
            tiny.merge_adapter(reference, adapter)
        for number in range(first, len(prompts()), 3):
            ids = torch.tensor([prompts()[number]])
            found = reference.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            for run in two_ranks[0]["LoRA"]["ours"]:
                assert run["outputs"][number]["tokens"] == found.tolist()


def test_images_equal_transformers(two_ranks, tmp_path):
    path = tiny.make_vision_checkpoint(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(path)
    number, prompt = 2, prompts()[2]
    seen = processor.image_processor(tiny.image(number), return_tensors="pt")
    places = int(seen["image_grid_thw"].prod()) // 4  # the model merges 2 x 2 patches
    start, image, end = (tiny.IMAGE_TOKEN + i for i in (2, 0, 3))
    middle = len(prompt) // 2
    ids = [*prompt[:middle], start, *[image] * places, end, *prompt[middle:]]
    kinds = torch.tensor([[int(token == image) for token in ids]])
    inputs = {"input_ids": torch.tensor([ids]), "mm_token_type_ids": kinds, **seen}
    found = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, len(ids) :]
    for run in two_ranks[0]["images"]["ours"]:
        assert run["outputs"][number]["tokens"] == found.tolist()


@pytest.mark.nightly
def test_images_with_the_encoder_split_by_images(model, tmp_path):
    name = "whole encoder on every rank"
    feature = images(str(tiny.make_vision_checkpoint(tmp_path)), mm_encoder_tp_mode="data")
    assert_equal_to_stock(run(2, 2, 1, {name: feature}, model, tmp_path), name)


@pytest.mark.nightly
def test_language_models_alone(model, tmp_path):
    chosen = {name: language_model(name, tmp_path) for name in ("gemma3", "llama4")}
    results = run(2, 2, 1, chosen, model, tmp_path)
    for name in chosen:
        assert_equal_to_stock(results, name)


# Embedding and LM head of Qwen3 are one module then, around which vLLM puts two.
TIED = {"hf_overrides": {"tie_word_embeddings": True}}


@pytest.mark.nightly
@pytest.mark.parametrize(("sp", "tp"), [(2, 2), (4, 1)])
def test_adapters_and_models_of_transformers_on_four_ranks(model, tmp_path, sp, tp):
    chosen = {name: features(model, tmp_path)[name] for name in ("LoRA", "model of transformers")}
    qwen3 = {"model": str(tiny.make_checkpoint("qwen3", tmp_path))}
    chosen["LoRA, tied"] = chosen["LoRA"] | {"args": chosen["LoRA"]["args"] | qwen3 | TIED}
    chosen["Qwen3 of transformers"] = {"ask": "tokens", "args": {"model_impl": "transformers"} | qwen3}
    results = run(4, sp, tp, chosen, model, tmp_path)
    for name in chosen:
        assert_equal_to_stock(results, name)


@pytest.mark.nightly
def test_adapters_of_layers_that_run_on_gathered_tokens(tmp_path):
    """OLMo 3 has norms over all heads, and its attention's output projection sums with a reduce-scatter."""
    olmo3 = str(tiny.make_checkpoint("olmo3", tmp_path))
    adapters = {"LoRA": features(olmo3, tmp_path)["LoRA"]}
    # vLLM has no adapters of this model's embedding.
    assert_equal_to_stock(run(2, 2, 1, adapters, olmo3, tmp_path, kv_heads=4, embedding=False), "LoRA")


@pytest.mark.nightly
def test_eagle3(model, tmp_path):
    eagle3 = speculative(method="eagle3", model=str(tiny.make_drafter("eagle3", tmp_path)))
    assert_equal_to_stock(run(2, 2, 1, {"eagle3": eagle3}, model, tmp_path), "eagle3")


@pytest.mark.nightly
def test_two_pipeline_stages_of_two_ranks(model, tmp_path):
    pipeline = {"ask": "tokens", "args": {"pipeline_parallel_size": 2}}
    assert_equal_to_stock(run(4, 2, 1, {"pipeline": pipeline}, model, tmp_path), "pipeline")
