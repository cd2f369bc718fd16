"""Step times of one rank of an SP x TP engine on one GPU, beside stock vLLM on the matching shards.

**One rank without communication**: collectives are local copies of the same size. Three engines run one after the
other. ``stock TP=P`` and ``stock TP=T`` are stock vLLM on a model with 1/P and 1/T of the heads, intermediate size and
vocabulary; ``shift`` is one rank of SP=S x TP=T. A step of N tokens in SP mode is compared with stock TP=T on N/S
tokens. N tokens are S prompts of N/S tokens each, so that both do the same attention. The ratio is that of the time
in kernels, stand-ins for collectives left out; a step takes longer where launching or the caller is the bottleneck.

Example: python benchmarks/one_rank.py --shape 8b --sp 2 --out one_rank.json
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engines import SHAPES, write_config

ENGINES = ("stock TP=P", "stock TP=T", "shift")

# Names of the kernels that stand in for collectives; ``write_rows`` is the exchange itself, to memory of this GPU.
STAND_INS = ("memcpy", "Memcpy", "CatArrayBatchedCopy", "write_rows")


def shard(shape: str, ranks: int) -> dict[str, int]:
    """The shape of one of ``ranks`` TP shards of a model."""
    sizes = SHAPES[shape] | {}
    for name in ("intermediate_size", "num_attention_heads", "vocab_size"):
        sizes[name] //= ranks
    sizes["num_key_value_heads"] = max(1, sizes["num_key_value_heads"] // ranks)
    return sizes


def start_engine(args: argparse.Namespace, folder: Path) -> Any:
    from vllm import LLM

    from vllm_shift.graphs import graph_sizes, most_graph_tokens

    world = args.sp * args.tp
    model = write_config(shard(args.shape, args.tp if args.engine == "stock TP=T" else world), folder)
    kwargs: dict[str, Any] = {"worker_cls": "one_rank_worker.MeasuredWorker"}
    if args.engine == "shift":
        settings = {"ulysses_sequence_parallel_size": args.sp, "tensor_parallel_size": args.tp}
        settings |= {"enable_shift_parallel": True, "shift_parallel_threshold": args.threshold, "self_check": False}
        kwargs["worker_cls"] = "one_rank_worker.OneRankWorker"
        kwargs["additional_config"] = {"one_rank": settings, "exchange": args.exchange}
    if args.engine == "shift" or args.same_graphs:
        stock = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
        threshold = args.threshold if args.engine == "shift" else 0
        most = min(args.most, most_graph_tokens(SHAPES[args.shape]["hidden_size"], world))
        sizes = graph_sizes(stock, threshold, most)
        kwargs["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    return LLM(
        str(model), load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=False, seed=0,
        max_num_batched_tokens=args.most, max_model_len=args.most + 128,
        **kwargs, **args.engine_args,
    )  # fmt: skip


def generate(llm: Any, prompts: int, prompt_tokens: int, output_tokens: int) -> None:
    from vllm import SamplingParams

    inputs: Any = [{"prompt_token_ids": random.choices(range(10, 1000), k=prompt_tokens)} for _ in range(prompts)]
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    llm.generate(inputs, params, use_tqdm=False)


def timings(llm: Any) -> list[tuple[int, float, float]]:
    return llm.llm_engine.collective_rpc("timings")[0]


def time_prefill(llm: Any, prompts: int, tokens: int, repeats: int) -> float:
    """Median ms of a step that prefills ``tokens`` tokens in ``prompts`` prompts; short ones more often."""
    repeats = max(repeats, min(50, repeats * 4096 // tokens))
    generate(llm, prompts, tokens // prompts, 1)
    timings(llm)
    for _ in range(repeats):
        generate(llm, prompts, tokens // prompts, 1)
    steps = [on_gpu for count, on_gpu, _ in timings(llm) if count == tokens]
    assert len(steps) == repeats, f"{len(steps)} steps of {tokens} tokens instead of {repeats}"
    return statistics.median(steps)


def time_decode(llm: Any, batch: int, repeats: int) -> float:
    """Median ms from one decode step to the next."""
    timings(llm)
    for _ in range(repeats):
        generate(llm, batch, 16, 65)
    # The last step of a repeat is followed by a pause.
    return statistics.median([wait for count, on_gpu, wait in timings(llm) if count == batch and wait < 2 * on_gpu + 5])


def kernel_times(llm: Any, prompts: int, tokens: int, output_tokens: int, repeats: int) -> dict[str, Any]:
    """GPU time by kernel, ms a step: of prefills, or of decoding where there is more than one output token."""
    rpc = llm.llm_engine.collective_rpc
    generate(llm, prompts, tokens // prompts, output_tokens)
    rpc("start_trace")
    for _ in range(repeats):
        generate(llm, prompts, tokens // prompts, output_tokens)
    kernels = [(name, ms / output_tokens / repeats) for name, _, ms in rpc("stop_trace")[0]]
    copies = sum(ms for name, ms in kernels if any(part in name for part in STAND_INS))
    largest = sorted(kernels, key=lambda kernel: -kernel[1])[:16]
    return {"ms": sum(ms for _, ms in kernels) - copies, "stand_ins_ms": copies, "largest": largest}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured of ``args.engine``, in this process."""
    random.seed(0)
    begin = time.perf_counter()
    # The same folder for every start: vLLM's compile cache goes by the model's path.
    llm = start_engine(args, args.out.parent)
    result: dict[str, Any] = {"start_s": time.perf_counter() - begin, "step_ms": {}, "kernels": {}}
    if args.start_only:
        return result
    for tokens in args.prefill:
        step = (1, tokens // args.sp) if args.engine == "stock TP=T" else (args.sp, tokens)
        result["step_ms"][f"prefill {tokens}"] = time_prefill(llm, *step, args.repeats)
        result["kernels"][f"prefill {tokens}"] = kernel_times(llm, *step, 1, args.repeats)
    for batch in args.decode if args.engine != "stock TP=T" else ():
        result["step_ms"][f"decode {batch}"] = time_decode(llm, batch, args.repeats)
        # Prompts of one token, so that the prefill is like a decode step.
        result["kernels"][f"decode {batch}"] = kernel_times(llm, batch, batch, 16, 1)
    return result | llm.llm_engine.collective_rpc(lambda worker: worker.facts)[0]


def run_child(args: argparse.Namespace, engine: str, folder: Path, *flags: str) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    here = str(Path(__file__).parent)
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    env["PYTHONPATH"] = os.pathsep.join([here, env.get("PYTHONPATH", "")])
    path = folder / "result.json"
    command = [sys.executable, __file__, *sys.argv[1:], *flags, "--engine", engine, "--out", str(path)]
    with open(folder / "log", "w") as log:
        code = subprocess.call(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    text = (folder / "log").read_text()
    if args.logs:
        (args.logs / f"{'-'.join([engine, *flags]).replace(' ', '-').replace('=', '-')}.log").write_text(text)
    if code:
        sys.exit(f"engine {engine!r} failed:\n{text[-3000:]}")
    return json.loads(path.read_text())


def table(args: argparse.Namespace, results: dict[str, Any]) -> str:
    """Ratios as Markdown."""
    stock_p, stock_t, shift = (results[engine] for engine in ENGINES)
    lines = [
        "| step | stock is | step, ms: stock | shift | kernels, ms: stock | shift | ratio | stand-ins, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, ours in shift["kernels"].items():
        kind, tokens = name.split()
        in_sp = kind == "prefill" and int(tokens) > args.threshold
        stock = stock_t if in_sp else stock_p
        theirs = stock["kernels"][name]["ms"]
        lines.append(
            f"| {name} | {'TP=T on N/S' if in_sp else 'TP=P'} | {stock['step_ms'][name]:.2f} "
            f"| {shift['step_ms'][name]:.2f} | {theirs:.2f} | {ours['ms']:.2f} | {ours['ms'] / theirs:.3f} "
            f"| {ours['stand_ins_ms']:.2f} |"
        )

    def graphs(result: dict[str, Any]) -> str:
        return f"{result['graph_bytes'] / 2**30:.2f}"

    lines += [
        "",
        f"weights / weights of TP=T: {shift['weight_bytes'] / stock_t['weight_bytes']:.3f}",
        f"start with nothing cached, s: {shift['start_s']:.1f}, stock TP=P {stock_p['start_s']:.1f}",
        f"start again, s: {shift['start_again_s']:.1f}, stock TP=P {stock_p['start_again_s']:.1f}",
        f"CUDA graphs, GiB: {graphs(shift)}, stock TP=P {graphs(stock_p)}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threshold", type=int, default=256)
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16, 64, 128, 256])
    parser.add_argument("--most", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--exchange", choices=["peers", "nccl"], default="peers", help="how SP mode exchanges")
    parser.add_argument("--same-graphs", action="store_true", help="give stock vLLM the CUDA graph sizes of shift, too")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--logs", type=Path, default=None, help="folder for the engines' logs")
    parser.add_argument("--start-only", action="store_true", help="with --engine: nothing but the start-up time")
    parser.add_argument("--engine", choices=ENGINES, default=None, help="measure this one only, in this process")
    args = parser.parse_args()
    if args.engine:
        args.out.write_text(json.dumps(measure(args)))
        return
    settings = {name: str(value) for name, value in vars(args).items()}
    results: dict[str, Any] = {}

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps({"settings": settings, "results": results}))

    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            results[engine] = run_child(args, engine, Path(folder))
            save()
        for engine in ("stock TP=P", "shift"):
            # vLLM's compile cache is filled by now.
            results[engine]["start_again_s"] = run_child(args, engine, Path(folder), "--start-only")["start_s"]
            save()
    print(table(args, results))


if __name__ == "__main__":
    main()
