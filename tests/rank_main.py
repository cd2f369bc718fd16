"""One rank of a group of processes that runs a list of engines, one after the other, by vLLM's external launcher.

Usage: rank_main.py JOB.json, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Starting Python and
vLLM costs far more than an engine of a tiny model, so the tests of tokens and KV caches share one group of processes.
"""

import gc
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mutations import mutation
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor import custom_op

import vllm_shift  # noqa: F401  (adds the flags to LLM)

# vLLM would let garbage collection look through everything again at the end of each engine.
freeze = gc.freeze
gc.freeze = gc.unfreeze = lambda: None


def forget_engine() -> None:
    """Collect an engine that has ended, and let garbage collection pass by what is left, imports above all.

    To look through them took four fifths of the time of a tiny engine.
    """
    cleanup_dist_env_and_memory()
    gc.collect()
    freeze()


def kv_caches(worker: Any) -> list[torch.Tensor]:
    """The KV cache of each layer, without block 0, which vLLM keeps as a null block."""
    caches = worker.model_runner.kv_caches
    return [part[1:] for cache in caches for part in (cache if isinstance(cache, list) else [cache])]


def zero_kv_caches(worker: Any) -> None:
    for cache in kv_caches(worker):
        cache.zero_()


def set_threshold(worker: Any, max_tp_tokens: int) -> None:
    worker.switch.max_tp_tokens = max_tp_tokens


def threshold(worker: Any) -> int:
    return worker.switch.max_tp_tokens


def stock_facts(worker: Any) -> dict[str, Any]:
    """What a worker without the flags must not show: traces of this package."""
    model = worker.model_runner.get_model()
    return {
        "replaced": sorted(custom_op.op_registry_oot),
        "worker": type(worker.worker).__module__,
        "modules": sorted({type(module).__module__.split(".")[0] for module in model.modules()}),
        "hooks": sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()),
    }


def exchanges_early(worker: Any) -> bool:
    return worker.switch.early


def weight_facts(worker: Any) -> dict[str, Any]:
    """Where the weights are, and how many bytes they take."""
    from vllm_shift.worker import weight_bytes

    model = worker.model_runner.get_model()
    views = []
    for module in model.modules():
        for name in ("weight", "bias"):
            slots = getattr(module, f"{name}_slots", None)
            if slots is not None:
                parameter, own = getattr(module, name), slots[worker.switch.dims.sp_rank]
                views.append((parameter.data_ptr(), parameter.stride()) == (own.data_ptr(), own.stride()))
    return {"views": views, "bytes": weight_bytes(model)}


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=1, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    results = []
    for output in outputs:
        tokens, logprobs = tokens_and_logprobs(output)
        results.append({"prompt": output.prompt_token_ids, "tokens": tokens, "logprobs": logprobs})
    return results


def tokens_and_logprobs(output: Any) -> tuple[list[int], list[float]]:
    """Of a request with ``logprobs``."""
    (answer,) = output.outputs
    tokens = list(answer.token_ids)
    return tokens, [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]


def run_engine(job: dict[str, Any], engine: dict[str, Any], stock_caches: list[Any]) -> list[dict[str, Any]]:
    """One run per threshold; a threshold of null means stock vLLM, whose KV caches are kept in ``stock_caches``."""
    llm = LLM(**(job["common"] | engine["args"]))
    rpc = llm.llm_engine.collective_rpc
    runs = []
    for number, threshold in enumerate(engine["thresholds"]):
        if threshold is not None:
            rpc(set_threshold, args=(threshold,))
            before = rpc("shift_stats")[0]
        llm.reset_prefix_cache()
        rpc(zero_kv_caches)
        first = generate(llm, job["prompts"], job["max_tokens"])
        # The same prompts, longer: their beginnings are in the prefix cache by now.
        second = generate(llm, [run["prompt"] + run["tokens"] for run in first], job["max_tokens"])
        run: dict[str, Any] = {"threshold": threshold, "outputs": first + second}
        caches = rpc(kv_caches)[0]
        if threshold is None:
            # The n-th run of every engine is given the same blocks.
            stock_caches.append([cache.clone() for cache in caches])
            run["facts"] = rpc(stock_facts)[0]
        else:
            after = rpc("shift_stats")[0]
            run["stats"] = {name: after[name] - before[name] for name in after}
            run["weights"] = rpc(weight_facts)[0]
            run["early"] = rpc(exchanges_early)[0]
            pairs = list(zip(caches, stock_caches[number], strict=True))
            run["kv_difference"] = max(float((ours - stock).abs().max()) for ours, stock in pairs)
            run["kv_written"] = [int((cache != 0).any(-1).sum()) for pair in pairs for cache in pair]
        runs.append(run)
    llm.llm_engine.engine_core.shutdown()
    del llm
    forget_engine()
    return runs


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """What this package logs while this is open."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.vllm_shift")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def start_only(job: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, with a bug in it where the job names one; what it says, or the KV caches it leaves."""
    with log_lines() as lines:
        try:
            with mutation(engine["mutation"]) if "mutation" in engine else nullcontext():
                llm = LLM(**(job["common"] | engine["args"]))
            rpc = llm.llm_engine.collective_rpc
            result = {
                "written": [int(cache.count_nonzero()) for cache in rpc(kv_caches)[0]],
                "stats": rpc("shift_stats")[0],
                "threshold": rpc(threshold)[0],
            }
            llm.llm_engine.engine_core.shutdown()
            del llm
        except RuntimeError as error:
            result = {"refused": str(error)}
    forget_engine()
    return result | {"lines": lines}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    for number, engine in enumerate(job["engines"]):
        os.environ["MASTER_PORT"] = str(port + number)
        if "thresholds" not in engine:
            results[engine["name"]] = start_only(job, engine)
            continue
        if None in engine["thresholds"]:
            stock_caches: list[Any] = []
        results[engine["name"]] = run_engine(job, engine, stock_caches)
    (Path(job["folder"]) / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
