"""One rank of a group of processes that tries vLLM's features: stock vLLM first, then ours at several thresholds.

Usage: feature_main.py JOB.json, see ``rank_group.run_ranks``.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import rank_main
import tiny
import torch
import transformers
from rank_main import generate
from safetensors.torch import load_file
from vllm import LLM, PoolingParams, SamplingParams
from vllm.compilation.counter import compilation_counter
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams


def tokens(llm: Any, job: dict[str, Any]) -> Any:
    """Greedy decoding: tokens and their log-probabilities."""
    return [{"tokens": run["tokens"], "numbers": run["logprobs"]} for run in generate(llm, job["prompts"], 8)]


def repeats(llm: Any, job: dict[str, Any]) -> Any:
    """Greedy decoding, also under a grammar that makes the answer repeat itself, as n-gram speculation expects."""
    params = SamplingParams(
        temperature=0.0, max_tokens=12, structured_outputs=StructuredOutputsParams(regex="(w5w6w7){4}")
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    texts = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    return [*tokens(llm, job), *({"tokens": text, "numbers": []} for text in texts)]


def sampling(llm: Any, job: dict[str, Any]) -> Any:
    """Log-probabilities of prompts, choices that a grammar allows, beams."""
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    results = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        results.append({"tokens": [], "numbers": [row[token].logprob for token, row in rows]})
    grammar = StructuredOutputsParams(regex="(w[3-9]){6}")
    params = SamplingParams(temperature=0.0, max_tokens=8, structured_outputs=grammar)
    for output in llm.generate(prompts, params, use_tqdm=False):
        results.append({"tokens": output.outputs[0].text, "numbers": []})
    for output in llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=4)):
        for beam in output.sequences:
            results.append({"tokens": beam.tokens, "numbers": [beam.cum_logprob]})
    return results


def embeds(llm: Any, job: dict[str, Any]) -> Any:
    """Prompts as embeddings, those of other prompts as tokens in the same batch."""
    path = llm.llm_engine.model_config.model
    table = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).get_input_embeddings()
    prompts = [
        {"prompt_embeds": table(torch.tensor(prompt)).detach()} if number % 2 else {"prompt_token_ids": prompt}
        for number, prompt in enumerate(job["prompts"])
    ]
    return greedy(llm, prompts)


def greedy(llm: Any, prompts: list[Any], **kwargs: Any) -> Any:
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=1, ignore_eos=True)
    results = []
    for output in llm.generate(prompts, params, use_tqdm=False, **kwargs):
        ids, logprobs = rank_main.tokens_and_logprobs(output)
        results.append({"tokens": ids, "numbers": logprobs})
    return results


def pooling(llm: Any, job: dict[str, Any]) -> Any:
    """Embeddings of prompts."""
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = llm.embed(prompts, pooling_params=PoolingParams(), use_tqdm=False)
    return [{"tokens": [], "numbers": output.outputs.embedding} for output in outputs]


def images(llm: Any, job: dict[str, Any]) -> Any:
    """Prompts with an image, and without one in the same batch."""
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    for number in (0, 2):
        ids = prompts[number]["prompt_token_ids"]
        middle = len(ids) // 2
        marked = [tiny.IMAGE_TOKEN + i for i in (2, 0, 3)]
        prompts[number] = {
            "prompt_token_ids": ids[:middle] + marked + ids[middle:],
            "multi_modal_data": {"image": tiny.image(number)},
        }
    return greedy(llm, prompts)


def adapters(llm: Any, job: dict[str, Any]) -> Any:
    """Prompts with different LoRA adapters and without one in the same batch; then others in the place of the first."""
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    requests = [LoRARequest(path, number + 1, path) for number, path in enumerate(job["adapters"])]
    first, second = [None, *requests[:2]], requests[2:]
    results = []
    for chosen in (first, second, first):
        chosen = (chosen * len(prompts))[: len(prompts)]
        results += greedy(llm, prompts, lora_request=chosen)
        for number in {request.lora_int_id for request in chosen if request}:
            llm.llm_engine.remove_lora(number)
    return results


def stored(llm: Any, job: dict[str, Any]) -> Any:
    """Prompts whose KV cache a connector stores, and again when only the connector has it."""
    store = Path(job["folder"]) / "store" / os.environ["RANK"]
    before = len(list(store.glob("*")))  # 0, unless the start of the engine left something there
    first = tokens(llm, job)
    llm.reset_prefix_cache()
    second = tokens(llm, job)
    shutil.rmtree(store)
    return [{"tokens": before, "numbers": []}, *first, *second]


def reloads(llm: Any, job: dict[str, Any]) -> Any:
    """A second checkpoint by ``reload_weights``, then the first one again in the manner of a weight transfer."""
    results = tokens(llm, job)
    rpc, paths = llm.llm_engine.collective_rpc, job["checkpoints"]
    for update, path in ((reload_weights, paths[1]), (transfer_weights, paths[0])):
        rpc(spoil_weights)
        rpc(update, args=(path,))
        llm.reset_prefix_cache()
        results += tokens(llm, job)
    return results


def sleeps(llm: Any, job: dict[str, Any]) -> Any:
    """Before sleep, after sleep of level 1, which keeps the weights, and of level 2, after which they are loaded again.

    Stock vLLM stays awake: its allocator for sleep mode serves one engine of a process.
    """
    rpc = llm.llm_engine.collective_rpc
    results = tokens(llm, job)
    if not llm.llm_engine.model_config.enable_sleep_mode:
        return 3 * results
    llm.sleep(level=1)
    llm.wake_up()
    rpc(rank_main.zero_kv_caches)
    results += tokens(llm, job)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    rpc(reload_weights, args=(job["checkpoints"][0],))
    llm.wake_up(tags=["kv_cache"])
    rpc(rank_main.zero_kv_caches)
    return results + tokens(llm, job)


def spoil_weights(worker: Any) -> None:
    """As a level 2 sleep leaves them."""
    for parameter in worker.model_runner.get_model().parameters():
        whole = parameter.data.new_empty(0).set_(parameter.data.untyped_storage())
        whole.fill_(float("nan"))


def reload_weights(worker: Any, path: str) -> None:
    worker.reload_weights(weights_path=path)


def transfer_weights(worker: Any, path: str) -> None:
    """What vLLM's weight transfer engines do with what they receive."""
    model, weights = worker.model_runner.get_model(), load_file(Path(path) / "model.safetensors")
    initialize_layerwise_reload(model)
    for name, weight in weights.items():
        model.load_weights([(name, weight)])
    finalize_layerwise_reload(model, worker.model_config)


COUNTERS = {
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:external_prefix_cache_hits": "loaded",
}


def counts(llm: Any) -> dict[str, int]:
    """Tokens so far: drafted, accepted of these, and loaded by a KV connector."""
    return {COUNTERS[metric.name]: metric.value for metric in llm.get_metrics() if metric.name in COUNTERS}


def try_feature(job: dict[str, Any], feature: dict[str, Any], stock_caches: list[Any] | None) -> Any:
    """One run per threshold, with the difference of its KV caches from stock's; or as many runs of stock vLLM."""
    ours = {"ulysses_sequence_parallel_size": job["sp"], "enable_shift_parallel": True}
    ours["shift_parallel_threshold"] = job["start_threshold"]
    size = job["tp"] if stock_caches else job["sp"] * job["tp"]
    ours |= feature.get("ours", {})
    before_start = compilation_counter.clone()
    with rank_main.log_lines() as lines:
        llm = LLM(**job["common"] | {"tensor_parallel_size": size} | feature["args"] | (ours if stock_caches else {}))
    traces = {
        name: getattr(compilation_counter, f"num_aot_{name}") - getattr(before_start, f"num_aot_{name}")
        for name in ("compiles", "artifacts_saved", "artifacts_loaded")
    }
    rpc = llm.llm_engine.collective_rpc
    runs = []
    for number, threshold in enumerate(job["thresholds"]):
        if stock_caches:
            rpc(rank_main.set_threshold, args=(threshold,))
            before = rpc("shift_stats")[0]
        llm.reset_prefix_cache()
        rpc(rank_main.zero_kv_caches)
        run: dict[str, Any] = {"threshold": threshold, "lines": lines, "traces": traces, "counts": counts(llm)}
        run["outputs"] = globals()[feature["ask"]](llm, job)
        run["counts"] = {name: value - run["counts"][name] for name, value in counts(llm).items()}
        caches = rpc(rank_main.kv_caches)[0]
        if stock_caches:
            after = rpc("shift_stats")[0]
            run["stats"] = {name: after[name] - before[name] for name in after}
            pairs = zip(caches, stock_caches[number], strict=True)
            differences = [float((ours - stock).abs().max() / stock.abs().max()) for ours, stock in pairs]
            run["kv_difference"] = max(differences, default=0.0)  # attention in both directions keeps nothing
        else:
            run["caches"] = [cache.clone() for cache in caches]
        runs.append(run)
    llm.llm_engine.engine_core.shutdown()
    del llm
    rank_main.forget_engine()
    return runs


def try_features(job: dict[str, Any]) -> dict[str, Any]:
    """All features of a job, each with stock vLLM first; results by name."""
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    for number, feature in enumerate(job["features"]):
        os.environ["MASTER_PORT"] = str(port + 2 * number)
        stock = try_feature(job, feature, None)
        caches = [run.pop("caches") for run in stock]
        os.environ["MASTER_PORT"] = str(port + 2 * number + 1)
        results[feature["name"]] = {"stock": stock, "ours": try_feature(job, feature, caches)}
    return results


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["piecewise"]:
        import piecewise

        piecewise.compile_as_on_cuda()
    results = try_features(job)
    (Path(job["folder"]) / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
