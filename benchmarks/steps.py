"""Time of a prefill and of a decode step in one engine, as a client of ``vllm.LLM`` sees them.

Example: python benchmarks/steps.py --shape 8b --sp 2 --threshold 256 --out shift.json
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from engines import SHAPES, add_engine_flags, engine_kwargs, write_config
from vllm import LLM, SamplingParams

import vllm_shift  # noqa: F401  (adds the flags to LLM)


def timed(llm: LLM, prompt_tokens: int, batch: int, output_tokens: int) -> float:
    """Seconds for ``batch`` random prompts of ``prompt_tokens`` tokens, each answered by ``output_tokens``."""
    prompts: Any = [{"prompt_token_ids": random.choices(range(10, 1000), k=prompt_tokens)} for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_engine_flags(parser)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
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
    result["prefill_ms"], result["decode_ms"] = {}, {}
    for tokens in args.prefill:
        timed(llm, tokens, 1, 1)
        runs = [timed(llm, tokens, 1, 1) for _ in range(args.repeats)]
        result["prefill_ms"][tokens] = round(1e3 * statistics.median(runs), 3)
    for batch in args.decode:
        runs = [timed(llm, 16, batch, 65) - timed(llm, 16, batch, 1) for _ in range(args.repeats)]
        result["decode_ms"][batch] = round(1e3 / 64 * statistics.median(runs), 3)
    if args.sp > 1:
        result["steps"] = llm.llm_engine.collective_rpc("shift_stats")[0]
    text = json.dumps(result)
    print("RESULT", text, flush=True)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
