"""Log-probabilities of one engine on a random tiny Llama, against transformers in fp32 on the same weights.

Prints the largest and the mean difference over prompts of several lengths, for the prompt tokens (prefill) and for the
generated ones (decode). Example: python benchmarks/correctness.py --sp 2 --threshold 256
With --shared-gpu all ranks share the first GPU (shared_gpu.py): slow, and without CUDA graphs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import shared_gpu
import torch
from engines import SHAPES, add_engine_flags, engine_kwargs
from vllm import LLM, SamplingParams

import vllm_shift  # noqa: F401  (adds the flags to LLM)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_engine_flags(parser)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--shared-gpu", action="store_true", help="all ranks on one GPU")
    args = parser.parse_args()
    kwargs = engine_kwargs(args)
    if args.shared_gpu:
        if not shared_gpu.is_rank():
            sys.exit(shared_gpu.run_ranks(args.tp * args.sp))
        kwargs |= shared_gpu.engine_args()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in LENGTHS]
    with tempfile.TemporaryDirectory() as folder:
        reference = make_checkpoint(Path(folder))
        llm = LLM(
            model=folder,
            dtype=args.dtype,
            max_model_len=4096,
            enable_prefix_caching=False,
            max_num_batched_tokens=1024,
            **kwargs,
        )
        params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=0, prompt_logprobs=0, ignore_eos=True)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        # All at once, then one by one: the second way has steps small enough for CUDA graphs of SP mode.
        outputs = llm.generate(inputs, params, use_tqdm=False)
        for prompt in inputs:
            outputs += llm.generate(prompt, params, use_tqdm=False)
    differences: dict[str, list[float]] = {"prefill": [], "decode": []}
    for prompt, output in zip(prompts * 2, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[0]
        expected = logits.log_softmax(-1)
        rows = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        for i, (token, row) in enumerate(zip((prompt + tokens)[1:], rows, strict=True)):
            kind = "prefill" if i < len(prompt) - 1 else "decode"
            differences[kind].append(abs(row[token].logprob - float(expected[i, token])))
    result: dict[str, Any] = {"args": {k: str(v) for k, v in vars(args).items()}}
    for kind, values in differences.items():
        result[kind] = {"max": max(values), "mean": sum(values) / len(values), "count": len(values)}
    if args.sp > 1:
        result["steps"] = llm.llm_engine.collective_rpc("shift_stats")[0]
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
