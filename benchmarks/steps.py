"""Time of a prefill and of a decode step in one engine, and its throughput, as a client of ``vllm.LLM`` sees them.

With --together N --meet FOLDER, N of these commands start their engines at the same time and then measure in turns, so
that engines are compared within minutes on one machine. It needs room for all of them (--engine-args with
kv_cache_memory_bytes). Any plugin that VLLM_PLUGINS names takes part: Arctic Inference has the same flags as ours.
Example: python benchmarks/steps.py --shape 8b --sp 2 --threshold 256 --out shift.json
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines import SHAPES, add_engine_flags, engine_kwargs, write_config
from vllm import LLM, SamplingParams
from vllm.plugins import load_general_plugins


def timed(llm: LLM, prompt_tokens: int, batch: int, output_tokens: int) -> float:
    """Seconds for ``batch`` random prompts of ``prompt_tokens`` tokens, each answered by ``output_tokens``."""
    prompts: Any = [{"prompt_token_ids": random.choices(range(10, 1000), k=prompt_tokens)} for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


@contextlib.contextmanager
def turn(folder: Path | None, engines: int) -> Iterator[None]:
    """Wait until so many engines are up, then for those that measure."""
    if folder is None:
        yield
        return
    (folder / f"{os.getpid()}.up").touch()
    while len(list(folder.glob("*.up"))) < engines:
        time.sleep(0.5)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def measure(llm: LLM, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill ``result``."""
    result["prefill_ms"], result["decode_ms"], result["tokens_per_s"] = {}, {}, {}
    for tokens in args.prefill:
        timed(llm, tokens, 1, 1)
        runs = [timed(llm, tokens, 1, 1) for _ in range(args.repeats)]
        result["prefill_ms"][tokens] = round(1e3 * statistics.median(runs), 3)
    for batch in args.decode:
        runs = [timed(llm, 16, batch, 65) - timed(llm, 16, batch, 1) for _ in range(args.repeats)]
        result["decode_ms"][batch] = round(1e3 / 64 * statistics.median(runs), 3)
    for load in args.load:
        count, prompt, output = map(int, re.split("[x/]", load))
        timed(llm, prompt, count // 4, output)
        seconds = min(timed(llm, prompt, count, output) for _ in range(2))
        result["tokens_per_s"][load] = round(count * (prompt + output) / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_engine_flags(parser)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64, 128, 256])
    parser.add_argument(
        "--load", nargs="*", default=["24x8000/16", "96x2000/128"], metavar="COUNTxPROMPT/OUTPUT", help="for throughput"
    )
    parser.add_argument("--together", type=int, default=1, metavar="N", help="engines that measure in turns")
    parser.add_argument("--meet", type=Path, help="where they meet, an empty folder")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.together > 1 and args.meet is None:
        parser.error("--together needs --meet")
    load_general_plugins()  # which add their flags to LLM
    random.seed(0)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(SHAPES[args.shape], Path(folder))
        llm = LLM(model=str(model), load_format="dummy", enable_prefix_caching=False, max_num_batched_tokens=8192,
                  max_model_len=16384, **engine_kwargs(args))  # fmt: skip
    result: dict[str, Any] = {"args": {k: str(v) for k, v in vars(args).items()}}
    result["start_s"] = time.perf_counter() - begin
    cache = llm.llm_engine.vllm_config.cache_config
    result["kv_tokens"] = cache.num_gpu_blocks * cache.block_size
    with turn(args.meet, args.together):
        measure(llm, args, result)
    if llm.llm_engine.vllm_config.parallel_config.worker_cls.startswith("vllm_shift"):
        result["steps"] = llm.llm_engine.collective_rpc("shift_stats")[0]
    text = json.dumps(result)
    print("RESULT", text, flush=True)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
