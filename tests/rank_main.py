"""One rank of a process group that runs a list of engines, one after the other, through vLLM's external launcher.

Usage: rank_main.py JOB.json, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Starting Python and
vLLM costs far more than an engine of a tiny model, so the tests of tokens and KV cache share one group of processes.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import vllm_shift  # noqa: F401  (adds the flags to LLM)


def kv_caches(worker: Any) -> list[torch.Tensor]:
    """The KV cache of each layer, without block 0, which vLLM keeps as a null block."""
    return [cache[1:] for cache in worker.model_runner.kv_caches]


def zero_kv_caches(worker: Any) -> None:
    for cache in kv_caches(worker):
        cache.zero_()


def set_threshold(worker: Any, max_tp_tokens: int) -> None:
    worker.switch.max_tp_tokens = max_tp_tokens


def weight_facts(worker: Any) -> dict[str, Any]:
    from vllm_shift.worker import _all_slots, weight_bytes

    model = worker.model_runner.get_model()
    pointers = []
    for module in model.modules():
        for name in ("weight", "bias"):
            slots = getattr(module, f"{name}_slots", None)
            if slots is not None:
                own = slots[worker.switch.dims.sp_rank]
                parameter = getattr(module, name)
                pointers.append([parameter.data_ptr(), own.data_ptr(), list(parameter.shape), list(own.shape)])
    return {
        "pointers": pointers,
        "slots": len(_all_slots(model)),
        "bytes": weight_bytes(model),
        "slot_bytes": sum(slots.whole.nbytes for slots in _all_slots(model)),
    }


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    results = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logprobs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        results.append({"tokens": tokens, "logprobs": logprobs})
    return results


def run_engine(job: dict[str, Any], engine: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    llm = LLM(**job["common"], **engine["args"])
    rpc = llm.llm_engine.collective_rpc
    runs = []
    for number, threshold in enumerate(engine["thresholds"]):
        if threshold is not None:
            rpc(set_threshold, args=(threshold,))
            before = rpc("shift_stats")[0]
        llm.reset_prefix_cache()
        rpc(zero_kv_caches)
        run: dict[str, Any] = {"threshold": threshold}
        run["outputs"] = generate(llm, job["prompts"], job["max_tokens"])
        # The same prompts, longer: their beginnings are cached by now.
        longer = [p + r["tokens"] for p, r in zip(job["prompts"], run["outputs"], strict=True)]
        run["longer"] = generate(llm, longer, job["max_tokens"])
        if threshold is not None:
            after = rpc("shift_stats")[0]
            run["stats"] = {name: after[name] - before[name] for name in after}
            run["weights"] = rpc(weight_facts)[0]
        caches = rpc(kv_caches)[0]
        torch.save(caches, Path(job["folder"]) / f"kv-{engine['name']}-{number}-{rank}.pt")
        runs.append(run)
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return runs


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["RANK"])
    port = int(os.environ["MASTER_PORT"])
    results = {}
    for number, engine in enumerate(job["engines"]):
        os.environ["MASTER_PORT"] = str(port + number)
        results[engine["name"]] = run_engine(job, engine, rank)
    (Path(job["folder"]) / f"results-{rank}.json").write_text(json.dumps(results))


main()
