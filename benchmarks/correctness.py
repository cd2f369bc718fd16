"""Log-probabilities of one engine on a random tiny Llama, against transformers in fp32 on the same weights.

Prints the largest and the mean difference over prompts of several lengths, for the prompt tokens (prefill) and for the
generated ones (decode). Example: python benchmarks/correctness.py --sp 2 --threshold 256
With --model a checkpoint takes the place of the random Llama, and text from this repository that of random prompts.
With --sampled the answers are sampled. What ranks sampled differently would show in what they compute next.
With --shared-gpu all ranks share the first GPU (shared_gpu.py), which is slow.
With --form the checkpoint is quantized, and the reference has the weights that it stands for. --save keeps the
log-probabilities of the prompts, --against compares with kept ones: stock vLLM of TP=T for a run with --threshold 0, of
TP=P for one with a threshold that no step exceeds, quantized alike.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from engines import SHAPES, add_engine_flags, engine_kwargs
from vllm import LLM, SamplingParams

import vllm_shift  # noqa: F401  (adds the flags to LLM)

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from quantize import FORMS, quantize_checkpoint

README = Path(__file__).parents[1] / "README.md"
LENGTHS = (3, 40, 255, 300, 700, 1500)


def make_checkpoint(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES["tiny"], max_position_embeddings=4096, initializer_range=0.08)
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())  # so that the engine in fp16 has the reference's weights
    model.save_pretrained(folder)
    return model


def read_checkpoint(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in LENGTHS]


def text_prompts(folder: Path) -> list[list[int]]:
    """Pieces of this repository's README, one after the other."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder).encode(README.read_text())
    ends = list(itertools.accumulate(LENGTHS))
    return [tokens[end - length : end] for length, end in zip(LENGTHS, ends, strict=True)]


def quantize(reference: Any, source: Path, form: str) -> Path:
    """Quantize the checkpoint, and give the reference the weights that it stands for then."""
    path = source.with_name(form)
    weights = quantize_checkpoint(source, form, path)
    reference.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    return path


def compare(found: list[float], path: Path) -> dict[str, float]:
    differences = [abs(a - b) for a, b in zip(found, json.loads(path.read_text()), strict=True)]
    return {"max": max(differences), "mean": sum(differences) / len(differences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_engine_flags(parser)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--shared-gpu", action="store_true", help="all ranks on one GPU")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--sampled", action="store_true", help="sample the answers, with top-k and top-p")
    parser.add_argument("--form", choices=list(FORMS), help="quantize the checkpoint so")
    parser.add_argument("--save", type=Path, help="write the prompts' log-probabilities here")
    parser.add_argument("--against", type=Path, help="compare them with those in this file")
    args = parser.parse_args()
    if args.model and args.form:
        parser.error("--form is for the random Llama only, so not together with --model")
    # A forked rank would wait for the OpenMP threads with which the checkpoint was made.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    kwargs = engine_kwargs(args)
    if args.shared_gpu:
        import shared_gpu  # needs vLLM's CUDA build

        if not shared_gpu.is_rank():
            sys.exit(shared_gpu.run_ranks(args.tp * args.sp))
        kwargs |= shared_gpu.engine_args()
    prompts = text_prompts(args.model) if args.model else random_prompts()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "plain"
        reference = read_checkpoint(model) if args.model else make_checkpoint(model)
        if args.form:
            model = quantize(reference, model, args.form)
        llm = LLM(
            model=str(model),
            dtype=args.dtype,
            **{"max_model_len": 4096, "enable_prefix_caching": False, "max_num_batched_tokens": 1024} | kwargs,
        )
        choice = {"temperature": 1.0, "top_k": 50, "top_p": 0.9} if args.sampled else {"temperature": 0.0}
        params = SamplingParams(**choice, max_tokens=16, logprobs=0, prompt_logprobs=0, ignore_eos=True)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        # All at once, then one by one: the second way has steps small enough for CUDA graphs of SP mode.
        outputs = llm.generate(inputs, params, use_tqdm=False)
        for prompt in inputs:
            outputs += llm.generate(prompt, params, use_tqdm=False)
    differences: dict[str, list[float]] = {"prefill": [], "decode": []}
    of_prompts: list[float] = []
    most_likely = 0
    # Not before: engines start their ranks from a process that has not touched a GPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference.to(device)
    for prompt, output in zip(prompts * 2, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens], device=device)).logits[0]
        expected = logits.log_softmax(-1).cpu()
        rows = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        for i, (token, row) in enumerate(zip((prompt + tokens)[1:], rows, strict=True)):
            kind = "prefill" if i < len(prompt) - 1 else "decode"
            differences[kind].append(abs(row[token].logprob - float(expected[i, token])))
            if kind == "decode":
                most_likely += token == int(expected[i].argmax())
            else:
                of_prompts.append(row[token].logprob)
    result: dict[str, Any] = {"args": {k: str(v) for k, v in vars(args).items()}}
    for kind, values in differences.items():
        result[kind] = {"max": max(values), "mean": sum(values) / len(values), "count": len(values)}
    result["decode"]["most likely to transformers"] = most_likely
    if args.save:
        args.save.write_text(json.dumps(of_prompts))
    if args.against:
        result["against"] = compare(of_prompts, args.against)
    if args.sp > 1:
        result["steps"] = llm.llm_engine.collective_rpc("shift_stats")[0]
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
