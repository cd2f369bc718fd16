"""One rank of a shift storm: stock vLLM gives the reference, then schedules come in through a pipe and are run.

Usage: storm_rank.py JOB.json FD, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; FD is the
descriptor of a ``multiprocessing`` connection that takes schedules and gives results, both as JSON.
"""

import json
import os
import random
import sys
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rank_main import forget_engine, tokens_and_logprobs
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import vllm_shift  # noqa: F401  (adds the flags to LLM)
from vllm_shift.switch import ModeSwitch

TP_ALWAYS = 10**9
TOLERANCE = 1e-3


bug = {"planted": False, "after_sp": True}


def make_bug_plantable() -> None:
    """Where a schedule asks for it: in an SP step after a TP step, the last rank's tokens are one position further."""
    stock = ModeSwitch._enter

    def enter(self: Any, model: Any, args: Any, kwargs: Any) -> Any:
        changed = stock(self, model, args, kwargs)
        if bug["planted"] and changed is not None and not bug["after_sp"] and self.dims.sp_rank == self.dims.sp - 1:
            changed[1]["positions"].add_(1)
        bug["after_sp"] = changed is not None
        return changed

    ModeSwitch._enter = enter


class Modes:
    """Forces the mode of each step from outside, and counts what the scheduler did."""

    def __init__(self) -> None:
        self.start({"modes": [False]})

    def start(self, schedule: dict[str, Any]) -> None:
        self._modes, self._seed = schedule.get("modes"), schedule.get("seed")
        self._diverges_at = schedule.get("diverges_at")
        self._last: bool | None = None
        self.counts: Counter[str] = Counter()

    def _is_sp(self, step: int) -> bool:
        # By step number, so that all ranks draw the same.
        if self._modes is not None:
            return self._modes[step % len(self._modes)]
        return random.Random(f"{self._seed}:{step}").random() < 0.5

    def wrap(self, worker: Any) -> None:
        worker = worker.worker
        stock = worker.execute_model

        def execute_model(scheduler_output: Any) -> Any:
            if scheduler_output.total_num_scheduled_tokens:
                self._before(worker.switch, scheduler_output)
            return stock(scheduler_output)

        worker.execute_model = execute_model

    def _before(self, switch: ModeSwitch, step: Any) -> None:
        in_sp = self._is_sp(self.counts["steps"])
        if self.counts["steps"] == self._diverges_at and switch.dims.rank == switch.dims.world - 1:
            in_sp = not in_sp
        switch.max_tp_tokens = 0 if in_sp else TP_ALWAYS
        self.counts["steps"] += 1
        self.counts["SP steps"] += in_sp
        self.counts["tokens"] += step.total_num_scheduled_tokens
        self.counts["mode changes"] += self._last is not None and self._last != in_sp
        self._last = in_sp
        self.counts["resumed after preemption"] += len(step.scheduled_cached_reqs.resumed_req_ids)
        for request in step.scheduled_new_reqs:
            missing = len(request.prompt_token_ids) - request.num_computed_tokens
            self.counts["prefix cache hits"] += request.num_computed_tokens > 0
            self.counts["chunked prefills"] += step.num_scheduled_tokens[request.req_id] < missing


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=1, ignore_eos=True)


def found(output: Any) -> dict[str, Any]:
    tokens, logprobs = tokens_and_logprobs(output)
    return {"tokens": tokens, "logprobs": logprobs, "finished": output.finished}


def run(llm: LLM, schedule: dict[str, Any], prompts: list[list[int]], steps: int | None) -> dict[int, dict[str, Any]]:
    """Run a schedule to its end, or for so many steps of the engine; what was generated, by request."""
    engine = llm.llm_engine
    llm.reset_prefix_cache()
    arrivals = sorted(enumerate(schedule["requests"]), key=lambda item: item[1]["arrives"])
    outputs: dict[int, dict[str, Any]] = {}
    aborts: dict[int, list[int]] = {}
    step = 0
    while (arrivals or engine.has_unfinished_requests()) and (steps is None or step < steps):
        if not engine.has_unfinished_requests():
            step = max(step, arrivals[0][1]["arrives"])
        while arrivals and arrivals[0][1]["arrives"] <= step:
            number, request = arrivals.pop(0)
            outputs[number] = {"tokens": [], "logprobs": [], "finished": False}
            prompt = {"prompt_token_ids": prompts[request["prompt"]]}
            engine.add_request(str(number), prompt, params(request["max_tokens"]))
            if request["aborts_after"] is not None:
                aborts.setdefault(step + request["aborts_after"], []).append(number)
        engine.abort_request([str(n) for n in aborts.pop(step, ()) if not outputs[n]["finished"]])
        for output in engine.step():
            outputs[int(output.request_id)] = found(output)
        step += 1
    engine.abort_request([str(n) for n, output in outputs.items() if not output["finished"]])
    while engine.has_unfinished_requests():
        engine.step()
    return outputs


def differences(
    outputs: dict[int, dict[str, Any]], schedule: dict[str, Any], reference: list[dict[str, Any]]
) -> list[str]:
    """Finished requests that are not the reference's, and aborted ones that are not a prefix of it."""
    wrong = []
    for number, output in outputs.items():
        request = schedule["requests"][number]
        count = request["max_tokens"] if output["finished"] else len(output["tokens"])
        expected = reference[request["prompt"]]
        same = output["tokens"] == expected["tokens"][:count]
        close = all(abs(a - b) < TOLERANCE for a, b in zip(output["logprobs"], expected["logprobs"], strict=False))
        if not (same and close):
            wrong.append(f"request {number} {request}: {output}, expected {expected}")
    return wrong


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    pipe = Connection(int(sys.argv[2]))
    port = int(os.environ["MASTER_PORT"])
    llm = LLM(**job["common"], tensor_parallel_size=job["sp"] * job["tp"], enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    reference = [found(output) for output in llm.generate(prompts, params(job["max_tokens"]), use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    del llm
    forget_engine()
    os.environ["MASTER_PORT"] = str(port + 1)
    make_bug_plantable()
    shift = {"tensor_parallel_size": job["tp"], "ulysses_sequence_parallel_size": job["sp"]}
    llm = LLM(
        **job["common"], **shift, enable_shift_parallel=True, num_gpu_blocks_override=job["blocks"]
    )  # a KV cache too small for what is running
    modes = Modes()
    llm.llm_engine.collective_rpc(modes.wrap)
    pipe.send_bytes(b"{}")
    while schedule := json.loads(pipe.recv_bytes()):
        modes.start(schedule)
        bug.update(planted=schedule.get("bug", False), after_sp=True)
        try:
            outputs = run(llm, schedule, job["prompts"], schedule.get("steps"))
        except Exception:
            pipe.send_bytes(json.dumps({"wrong": [traceback.format_exc()], "counts": modes.counts}).encode())
            raise
        counts = modes.counts | Counter(
            {
                "requests": len(outputs),
                "finished requests": sum(output["finished"] for output in outputs.values()),
                "tokens compared": sum(len(output["tokens"]) for output in outputs.values()),
            }
        )
        result = {"wrong": differences(outputs, schedule, reference), "counts": counts}
        pipe.send_bytes(json.dumps(result).encode())
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
